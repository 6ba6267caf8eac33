"""Jobs -> a model directory: weights, index, configuration, tokenizer, and the record that verification reads."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wpmerge
from wpmerge.checkpoint import Checkpoint
from wpmerge.dtypes import Dtype
from wpmerge.jobs import Job
from wpmerge.output import check_space, output_directory, write_file
from wpmerge.shards import Shard, index_json, layout_shards
from wpmerge.streaming import Progress, merge_jobs

SCHEMA_VERSION = 1
RECORD = "merge.json"
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
_TOKENIZER = frozenset(_COPIED[1:10])


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeSummary:
    """What a merge wrote: where, tensors, bytes of weights, files of weights, seconds."""

    out: Path
    tensors: int
    nbytes: int
    shards: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """How a merge is written.

    Attributes:
        shard_bytes: most bytes of weights per file.
        dtype: of the output, for its configuration; None keeps the donor's.
        threads: blocks worked on at a time.
        overwrite: replace an output that is already there, once the new one is whole.
        sync: bring the weights to disk before the directory takes its name.
        allow_nan: let values pass that are not finite.
        progress: called with bytes of weights written and in all.
        config: entries of the donor's configuration that change.
        record: what else verification needs to make the jobs again.
    """

    shard_bytes: int
    dtype: Dtype | None
    threads: int
    overwrite: bool
    sync: bool
    allow_nan: bool = False
    progress: Progress | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)


def write_model(
    out: Path,
    jobs: Sequence[Job],
    *,
    donor: Checkpoint,
    inputs: Sequence[Checkpoint],
    papers: Callable[[Path, str], None],
    writing: Writing,
) -> MergeSummary:
    """Write weights, index, and everything that makes a directory of weights a model.

    Args:
        out: the directory to be made.
        jobs: how each tensor is made.
        donor: gives configuration and tokenizer.
        inputs: every checkpoint that is read.
        papers: writes plan, recipe and card into a directory; is given the SHA-256 of the record.
        writing: the settings.

    Raises:
        OutputError: the output cannot be written there.
        CheckpointError: an input is damaged or not finite.
        RecipeError: a result overflows the output dtype.
    """
    began = time.monotonic()
    shards = layout_shards([job.output for job in jobs], writing.shard_bytes)
    copied = [
        path
        for name in _COPIED
        if (path := (donor.tokenizer_path if name in _TOKENIZER else donor.path) / name).is_file()
    ]
    total = sum(shard.nbytes for shard in shards) + sum(file.stat().st_size for file in copied) + OTHER_BYTES
    check_space(out, total=total, largest=max(shard.nbytes for shard in shards))
    hashes = {model.source: model.content_hash() for model in inputs}
    with output_directory(
        out,
        inputs=[model.path for model in inputs],
        overwrite=writing.overwrite,
        fingerprint=_fingerprint(jobs, shards, writing),
        total=total,
    ) as directory:
        if len(shards) > 1:
            write_file(directory / "model.safetensors.index.json", index_json(shards))
        config = _config(donor.config, writing)
        write_file(directory / "config.json", json.dumps(config, indent=2))
        for file in copied:
            write_file(directory / file.name, file.read_bytes())
        papers(directory, "")  # before the weights: what cannot be written should fail early
        checksums = merge_jobs(
            jobs,
            shards,
            directory,
            threads=writing.threads,
            sync=writing.sync,
            allow_nan=writing.allow_nan,
            progress=writing.progress,
        )
        record = _record(writing, hashes, checksums)
        write_file(directory / RECORD, record)
        papers(directory, hashlib.sha256(record.encode()).hexdigest())
    return MergeSummary(
        out=out,
        tensors=len(jobs),
        nbytes=sum(job.output.nbytes for job in jobs),
        shards=len(shards),
        seconds=time.monotonic() - began,
    )


def _record(writing: Writing, hashes: Mapping[str, str], checksums: Mapping[str, str]) -> str:
    """``merge.json``: settings, inputs, and the checksum of every tensor."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "wpmerge": wpmerge.__version__,
        "dtype": None if writing.dtype is None else str(writing.dtype),
        "allow_nan": writing.allow_nan,
        **writing.record,
        "inputs": dict(hashes),
        "tensors": dict(sorted(checksums.items())),
    }
    return json.dumps(document, indent=2)


def _config(config: Mapping[str, Any], writing: Writing) -> dict[str, Any]:
    """The base's configuration, with the output's dtype and without the place it was once loaded from."""
    changed = {key: value for key, value in config.items() if key != "_name_or_path"} | dict(writing.config)
    if writing.dtype is not None:
        key = "torch_dtype" if "torch_dtype" in changed else "dtype"
        changed[key] = str(writing.dtype)
    return changed


def _fingerprint(jobs: Sequence[Job], shards: Sequence[Shard], writing: Writing) -> str:
    """Identifies inputs, coefficients, operator and layout: equal fingerprints give equal files."""
    models = {id(term.checkpoint): term.checkpoint for job in jobs for term in job.terms}
    models |= {id(job.base[0]): job.base[0] for job in jobs if job.base}
    hashes = {key: model.content_hash() for key, model in models.items()}
    digest = hashlib.sha256(f"{wpmerge.__version__} {writing.allow_nan}".encode())
    for job in jobs:
        base = (hashes[id(job.base[0])], job.base[1]) if job.base else None
        how = (job.method, job.normalize, job.rescale, job.scale, job.parity, job.weights)
        digest.update(f"{job.output}{base}{how}".encode())
        for term in job.terms:
            settings = (hashes[id(term.checkpoint)], term.tensor, term.coefficient.axis, term.density, term.seed)
            digest.update(f"{settings}".encode())
            digest.update(term.coefficient.values.tobytes())
    for shard in shards:
        digest.update(f"{shard.name} {shard.nbytes}".encode())
    return digest.hexdigest()
