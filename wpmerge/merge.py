"""Plan or recipe -> merged checkpoint, streamed block by block into a directory that appears only when it is whole."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

import wpmerge
from wpmerge.card import model_card, plan_summary
from wpmerge.checkpoint import Checkpoint, check_same_family, open_checkpoint
from wpmerge.errors import RecipeError
from wpmerge.output import check_output, check_space, output_directory, write_file
from wpmerge.plan import BASE, Plan, check_plan
from wpmerge.recipe import recipe_text
from wpmerge.shards import OutputTensor, Shard, index_json, layout_shards
from wpmerge.streaming import Job, Progress, Term, job_dtype, merge_jobs, merge_tensor
from wpmerge.recipe_jobs import recipe_jobs
from wpmerge.yaml_recipe import read_yaml_recipe

SHARD_BYTES = 5 * 10**9
OTHER_BYTES = 2**20  # configuration, plan, recipe and card, generously
# What a model needs beside its weights, taken from the base.
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeSummary:
    """What a merge wrote: where, tensors, bytes of weights, files of weights, seconds."""

    out: Path
    tensors: int
    nbytes: int
    shards: int
    seconds: float


def open_inputs(
    plan: Plan, models: Mapping[str, str | Path] | None = None, *, trust_remote_code: bool = False
) -> dict[str, Checkpoint]:
    """Open a plan's base, under ``base``, and its experts, under their names, where they live now.

    Args:
        plan: names the inputs.
        models: other places, by name (``base`` for the base).
        trust_remote_code: see :func:`~wpmerge.checkpoint.open_checkpoint`.

    Raises:
        RecipeError: a name that the plan does not have.
        CheckpointError: an input cannot be opened.
    """
    models = models or {}
    if unknown := sorted(set(models) - {BASE, *plan.experts}):
        raise RecipeError("the plan has no such model", got=unknown[0], expected=[BASE, *plan.experts])
    base = open_checkpoint(models.get(BASE, plan.base.source), trust_remote_code=trust_remote_code)
    return {BASE: base} | {
        name: open_checkpoint(models.get(name, expert.source), base=base, trust_remote_code=trust_remote_code)
        for name, expert in plan.experts.items()
    }


def check_inputs(plan: Plan, checkpoints: Mapping[str, Checkpoint]) -> None:
    """Refuse checkpoints that are not those the plan was made from, or not of one family.

    Raises:
        CheckpointError: an expert does not fit the base.
        RecipeError: a coefficient does not fit, or another checkpoint is meant.
    """
    base = checkpoints[BASE]
    for name in plan.experts:
        check_same_family(base, checkpoints[name], name=name)
    check_plan(plan, base)
    for name, model in {BASE: plan.base, **plan.experts}.items():
        if (found := checkpoints[name].content_hash()) != model.content_hash:
            raise RecipeError(
                f"{name} is not the checkpoint that the plan was made from",
                where=checkpoints[name].path,
                got=found,
                expected=model.content_hash,
                mend="give the original, or score and fuse again",
            )


def plan_jobs(plan: Plan, checkpoints: Mapping[str, Checkpoint], *, dtype: torch.dtype | None = None) -> list[Job]:
    """How each tensor of the output is made. Integers and booleans are the base's.

    Args:
        plan: fits the checkpoints.
        checkpoints: the base under ``base``, each expert under its name.
        dtype: of the output; None keeps that of each of the base's tensors.
    """
    base, jobs = checkpoints[BASE], []
    for name, info in base.tensors.items():
        terms = tuple(
            Term(checkpoint=checkpoints[expert], tensor=name, coefficient=plan.coefficients[expert][name])
            for expert in plan.experts
            if info.dtype.is_floating_point
        )
        output = OutputTensor(name=name, shape=info.shape, dtype=job_dtype(info.dtype, dtype))
        jobs.append(Job(output=output, base=(base, name), terms=terms))
    return jobs


def merged_tensor(
    plan: Plan, checkpoints: Mapping[str, Checkpoint], name: str, *, dtype: torch.dtype | None = None
) -> Shaped[Tensor, "..."]:
    """One tensor of the merge in memory, bit for bit as :func:`merge` writes it."""
    jobs = {job.output.name: job for job in plan_jobs(plan, checkpoints, dtype=dtype)}
    return merge_tensor(jobs[name])


def merged_state_dict(
    plan: Plan, checkpoints: Mapping[str, Checkpoint], *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The whole merge in memory, bit for bit as :func:`merge` writes it. A tied head is left out, as on disk."""
    check_inputs(plan, checkpoints)
    return {job.output.name: merge_tensor(job) for job in plan_jobs(plan, checkpoints, dtype=dtype)}


def merge(
    plan: Plan,
    checkpoints: Mapping[str, Checkpoint],
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | None = None,
    threads: int = 1,
    overwrite: bool = False,
    sync: bool = True,
    progress: Progress | None = None,
) -> MergeSummary:
    """Carry out a plan and write the merged checkpoint with plan, recipe and card.

    Args:
        plan: what to do.
        checkpoints: the base under ``base``, each expert under its name; see :func:`open_inputs`.
        out: the directory to be made.
        shard_bytes: most bytes of weights per file.
        dtype: of the output; None keeps that of each of the base's tensors.
        threads: blocks worked on at a time; the result is the same for any number.
        overwrite: replace an output that is already there, once the new one is whole.
        sync: bring the weights to disk before the directory takes its name.
        progress: called with bytes of weights written and in all.

    Raises:
        OutputError: the output cannot be written there; nothing was.
        CheckpointError: an input is damaged, not finite, or of another family.
        RecipeError: the plan does not fit its inputs.
    """
    inputs = list(checkpoints.values())
    check_output(out, inputs=[model.path for model in inputs], overwrite=overwrite)
    check_inputs(plan, checkpoints)

    def add_papers(directory: Path) -> None:
        recipe = recipe_text(plan, checkpoints)
        plan.save(directory)
        write_file(directory / "recipe.yml", recipe)
        models = [plan.base.source, *(expert.source for expert in plan.experts.values())]
        summary = plan_summary(plan)
        card = model_card(
            name=out.name, base=inputs[0], models=models, summary=summary, recipe=recipe, version=wpmerge.__version__
        )
        write_file(directory / "README.md", card)

    jobs = plan_jobs(plan, checkpoints, dtype=dtype)
    settings = _Settings(
        shard_bytes=shard_bytes, dtype=dtype, threads=threads, overwrite=overwrite, sync=sync, progress=progress
    )
    return _write(out, jobs, donor=checkpoints[BASE], inputs=inputs, add_papers=add_papers, settings=settings)


def merge_recipe(
    path: Path,
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | None = None,
    threads: int = 1,
    overwrite: bool = False,
    sync: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> MergeSummary:
    """Carry out a mergekit recipe; mergekit itself is not used.

    Args:
        path: the recipe's file.
        trust_remote_code: see :func:`~wpmerge.checkpoint.open_checkpoint`.

    The other arguments and errors are those of :func:`merge`.
    """
    recipe = read_yaml_recipe(path)
    names = recipe.model_names()
    checkpoints: dict[str, Checkpoint] = {}
    for name in names:
        whole, _, adapter = name.partition("+")
        if whole not in checkpoints:
            checkpoints[whole] = open_checkpoint(whole, trust_remote_code=trust_remote_code)
        if adapter:
            checkpoints[name] = open_checkpoint(adapter, base=checkpoints[whole], trust_remote_code=trust_remote_code)
    inputs = list(checkpoints.values())
    check_output(out, inputs=[path, *(model.path for model in inputs)], overwrite=overwrite)
    for name, model in checkpoints.items():
        check_same_family(inputs[0], model, name=name)
    made = recipe_jobs(recipe, checkpoints, dtype=dtype, where=path)

    def add_papers(directory: Path) -> None:
        text = path.read_text(encoding="utf-8")
        write_file(directory / "recipe.yml", text)
        summary = f"A merge of {len(names)} models by `{recipe.merge_method}`."
        card = model_card(
            name=out.name,
            base=made.donor,
            models=names,
            summary=summary,
            recipe=text if text.endswith("\n") else text + "\n",
            version=wpmerge.__version__,
        )
        write_file(directory / "README.md", card)

    settings = _Settings(
        shard_bytes=shard_bytes, dtype=made.dtype, threads=threads, overwrite=overwrite, sync=sync, progress=progress
    )
    return _write(out, made.jobs, donor=made.donor, inputs=inputs, add_papers=add_papers, settings=settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    shard_bytes: int
    dtype: torch.dtype | None
    threads: int
    overwrite: bool
    sync: bool
    progress: Progress | None


def _write(
    out: Path,
    jobs: Sequence[Job],
    *,
    donor: Checkpoint,
    inputs: Sequence[Checkpoint],
    add_papers: Callable[[Path], None],
    settings: _Settings,
) -> MergeSummary:
    """The weights, the index, and everything that makes a directory of weights a model."""
    began = time.monotonic()
    shards = layout_shards([job.output for job in jobs], settings.shard_bytes)
    copied = [donor.path / name for name in _COPIED if (donor.path / name).is_file()]
    total = sum(shard.nbytes for shard in shards) + sum(file.stat().st_size for file in copied) + OTHER_BYTES
    check_space(out, total=total, largest=max(shard.nbytes for shard in shards))
    with output_directory(
        out,
        inputs=[model.path for model in inputs],
        overwrite=settings.overwrite,
        fingerprint=_fingerprint(jobs, shards),
        total=total,
    ) as directory:
        if len(shards) > 1:
            write_file(directory / "model.safetensors.index.json", index_json(shards))
        write_file(directory / "config.json", json.dumps(_config(donor.config, settings.dtype), indent=2))
        for file in copied:
            write_file(directory / file.name, file.read_bytes())
        add_papers(directory)
        merge_jobs(jobs, shards, directory, threads=settings.threads, sync=settings.sync, progress=settings.progress)
    return MergeSummary(
        out=out,
        tensors=len(jobs),
        nbytes=sum(job.output.nbytes for job in jobs),
        shards=len(shards),
        seconds=time.monotonic() - began,
    )


def _config(config: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """The base's configuration, with the output's dtype and without the place it was once loaded from."""
    changed = {key: value for key, value in config.items() if key != "_name_or_path"}
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in changed else "dtype"
        changed[key] = str(dtype).removeprefix("torch.")
    return changed


def _fingerprint(jobs: Sequence[Job], shards: Sequence[Shard]) -> str:
    """Identifies inputs, coefficients and layout: equal fingerprints give equal files."""
    models = {id(term.checkpoint): term.checkpoint for job in jobs for term in job.terms}
    models |= {id(job.base[0]): job.base[0] for job in jobs if job.base}
    hashes = {key: model.content_hash() for key, model in models.items()}
    digest = hashlib.sha256(wpmerge.__version__.encode())
    for job in jobs:
        digest.update(f"{job.output}{hashes[id(job.base[0])] if job.base else None}".encode())
        for term in job.terms:
            digest.update(f"{hashes[id(term.checkpoint)]} {term.tensor} {term.coefficient.axis}".encode())
            digest.update(term.coefficient.values.contiguous().view(-1).view(torch.uint8).numpy().data)
    for shard in shards:
        digest.update(f"{shard.name} {shard.nbytes}".encode())
    return digest.hexdigest()
