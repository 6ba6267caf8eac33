"""Recompute a merged checkpoint's tensors from its plan or recipe and its inputs, and compare them bit for bit."""

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wpmerge.card import front_matter
from wpmerge.checkpoint import Checkpoint, open_checkpoint
from wpmerge.checksum import Checksum
from wpmerge.directory import read_json
from wpmerge.dtypes import FLOATS
from wpmerge.errors import CheckpointError, RecipeError
from wpmerge.jobs import Job
from wpmerge.merging import check_inputs, jobs_of_recipe, open_inputs, open_recipe, plan_jobs
from wpmerge.plan import BASE, load_plan
from wpmerge.streaming import merge_stream
from wpmerge.vocabulary import match_vocabulary
from wpmerge.writing import RECORD, SCHEMA_VERSION
from wpmerge.yaml_recipe import read_yaml_recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was compared: names of tensors, how many there are in all, and what is wrong, by name."""

    checked: tuple[str, ...]
    tensors: int
    faults: Mapping[str, str]

    @property
    def passed(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.faults


def verify(
    directory: Path,
    *,
    models: Mapping[str, str | Path] | None = None,
    sample: int | None = 16,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Recompute tensors of a merge and compare them with what is stored and with the recorded checksums.

    Args:
        directory: a merged checkpoint, with ``merge.json``.
        models: where its inputs live now, by the plan's names (``base`` for the base) or the recipe's.
        sample: how many tensors, drawn at random; None checks them all.
        seed: of the draw.
        trust_remote_code: see :func:`~wpmerge.checkpoint.open_checkpoint`.
        progress: called with tensors done and in all.

    Raises:
        CheckpointError: the merge or an input cannot be read.
        RecipeError: the record is missing or damaged, or an input is not the one that was merged.
    """
    record = _read_record(directory)
    merged = open_checkpoint(directory, trust_remote_code=trust_remote_code)
    jobs = {job.output.name: job for job in _jobs(directory, record, models, trust_remote_code)}
    recorded = record["tensors"]
    faults = dict.fromkeys({*jobs, *recorded} - set(merged.tensors), "is missing")
    faults |= dict.fromkeys(set(merged.tensors) - (set(jobs) & set(recorded)), "was not made by this merge")
    names = sorted(set(merged.tensors) - set(faults))
    if sample is not None and sample < len(names):
        names = sorted(random.Random(seed).sample(names, sample))
    for number, name in enumerate(names, start=1):
        if fault := _compare(merged, jobs[name], recorded[name], allow_nan=bool(record["allow_nan"])):
            faults[name] = fault
        if progress:
            progress(number, len(names))
    return Verification(checked=tuple(names), tensors=len(merged.tensors), faults=faults)


def _compare(merged: Checkpoint, job: Job, recorded: str, *, allow_nan: bool) -> str | None:
    """What is wrong with a tensor, if anything is."""
    name, info = job.output.name, merged.tensors[job.output.name]
    if (info.shape, info.dtype) != (job.output.shape, job.output.dtype):
        return f"is {info.dtype} {info.shape}, not {job.output.dtype} {job.output.shape}"
    made = Checksum()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for start, stop, block in merge_stream(job, allow_nan=allow_nan):
            made.add(start * info.dtype.itemsize, block)
            stored = merged.load_elements(name, start, stop)
            different = (stored.view(torch.uint8) != block.view(torch.uint8)).nonzero()
            if len(different):
                return (
                    f"differs from its recomputation at flat index {start + int(different[0]) // info.dtype.itemsize}"
                )
    finally:
        torch.set_num_threads(before)
    return None if made.text() == recorded else f"has checksum {made.text()}, {RECORD} says {recorded}"


def _read_record(directory: Path) -> dict[str, Any]:
    where = directory / RECORD
    try:
        record = read_json(where)
    except CheckpointError as error:
        raise RecipeError(
            "a merge has no readable record", where=where, got=error.got, mend="only merges made by wpmerge have one"
        ) from None
    if record.get("schema_version") != SCHEMA_VERSION or not isinstance(record.get("tensors"), dict):
        raise RecipeError("a merge's record is malformed", where=where, got=record.get("schema_version"))
    stated = front_matter(directory).get("wpmerge_record")
    found = f"sha256:{hashlib.sha256(where.read_bytes()).hexdigest()}"
    if stated != found:
        raise RecipeError(
            "the record is not the one that the model card states", where=where, got=found, expected=stated
        )
    return record


def _jobs(
    directory: Path, record: Mapping[str, Any], models: Mapping[str, str | Path] | None, trust_remote_code: bool
) -> list[Job]:
    """The jobs of the merge, made again from its plan or recipe on inputs that must be the same."""
    dtype = FLOATS.get(record.get("dtype") or "")
    vocab = record.get("vocab")
    if record.get("from") == "plan":
        plan = load_plan(directory)
        checkpoints = match_vocabulary(open_inputs(plan, models, trust_remote_code=trust_remote_code), BASE, vocab)
        check_inputs(plan, checkpoints)
        return plan_jobs(plan, checkpoints, dtype=dtype)
    path = directory / "recipe.yml"
    recipe = read_yaml_recipe(path)
    checkpoints = open_recipe(recipe, models, trust_remote_code=trust_remote_code)
    known = set(record["inputs"].values())
    for name, model in checkpoints.items():
        if (found := model.content_hash()) not in known:
            raise RecipeError(f"{name} is not the checkpoint that was merged", where=model.path, got=found)
    return jobs_of_recipe(
        recipe, checkpoints, path, dtype=dtype, vocab=vocab, seed=record.get("seed", 0), parity=record.get("parity")
    ).jobs
