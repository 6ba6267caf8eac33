"""What lies in a directory: scores, a plan, a proof, a checkpoint, an evaluation, or several; and what each says."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wpmerge.adapter import CONFIG_NAME, is_adapter
from wpmerge.arch import LAYER_KINDS
from wpmerge.checkpoint import Checkpoint, open_checkpoint
from wpmerge.console import Table, number
from wpmerge.directory import locate, read_json
from wpmerge.errors import CheckpointError, WpmergeError
from wpmerge.evaluation import FILE as EVALUATION
from wpmerge.evaluation import load_evaluation
from wpmerge.models import layout_of
from wpmerge.plan import load_plan
from wpmerge.proof import FILE as PROOF
from wpmerge.proof import load_proof, proof_tables
from wpmerge.scores import load_scores
from wpmerge.summaries import (
    evaluation_summary,
    evaluation_tables,
    plan_summary,
    plan_tables,
    scores_summary,
    scores_tables,
)
from wpmerge.tensorfile import TensorInfo, open_tensor_file

_ADAPTER_FIELDS = ("base_model_name_or_path", "r", "lora_alpha", "target_modules", "use_rslora", "modules_to_save")
_PROVENANCE = ("seconds", "peak_memory_bytes", "machine", "device")


def inspect(source: str, *, top: int = 5, trust_remote_code: bool = False) -> dict[str, Any]:
    """Everything recognised in a directory.

    Args:
        source: a directory, one of the files that make it an artifact, or a hub id.
        top: strongest units of each kind.
        trust_remote_code: see :func:`~wpmerge.checkpoint.open_checkpoint`.

    Returns:
        ``path``, ``kinds``, ``files`` (name → bytes), and under the name of each kind what it says; JSON values.

    Raises:
        WpmergeError: nothing is recognised, or what is there is damaged.
    """
    given = Path(source)
    path = given.parent if given.is_file() else locate(source)
    files = {file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.is_file()}
    found: dict[str, Any] = {}
    if "scores.json" in files:
        found["scores"] = scores_summary(load_scores(path), top=top)
    if "plan.json" in files:
        found["plan"] = plan_summary(load_plan(path))
    if EVALUATION in files:
        found["evaluation"] = evaluation_summary(load_evaluation(path))
    if PROOF in files:
        found["proof"] = load_proof(path)
    if is_adapter(path):
        found["adapter"] = _adapter_summary(path)
    elif "config.json" in files:
        found["checkpoint"] = checkpoint_summary(open_checkpoint(path, trust_remote_code=trust_remote_code))
    if not found:
        raise WpmergeError(
            "nothing here that wpmerge knows",
            where=path,
            got=", ".join(files) or "no file",
            expected=f"scores.json, plan.json, {PROOF}, {EVALUATION}, config.json or {CONFIG_NAME}",
        )
    return {"path": str(path), "kinds": list(found), "files": files, **found}


def checkpoint_summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """Architecture, parameters, dtypes, tensors, units."""
    return {
        "path": str(checkpoint.path),
        "model_type": checkpoint.config.get("model_type"),
        "content_hash": checkpoint.content_hash(),
        "tied": dict(checkpoint.tied),
        **_tensors(checkpoint.tensors),
        "units": _units(checkpoint),
    }


def _adapter_summary(path: Path) -> dict[str, Any]:
    """A LoRA adapter as it lies: its base is not needed."""
    config = read_json(path / CONFIG_NAME)
    stored = sorted(path.glob("adapter_model.*"))
    if not stored:
        raise CheckpointError("an adapter has no weights", where=path, expected="adapter_model.safetensors")
    settings = {field: config.get(field) for field in _ADAPTER_FIELDS}
    return {"path": str(path), **settings, **_tensors(open_tensor_file(stored[0]).tensors)}


def _tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    dtypes: dict[str, int] = {}
    for info in tensors.values():
        dtypes[str(info.dtype)] = dtypes.get(str(info.dtype), 0) + info.numel
    return {
        "parameters": sum(info.numel for info in tensors.values()),
        "bytes": sum(info.numel * info.dtype.itemsize for info in tensors.values()),
        "parameters_by_dtype": dtypes,
        "tensors": {name: {"dtype": str(info.dtype), "shape": list(info.shape)} for name, info in tensors.items()},
    }


def _units(checkpoint: Checkpoint) -> dict[str, Any]:
    """Kind → units in the model; for an architecture without a table of units, why there are none."""
    try:
        layout = layout_of(checkpoint)
    except CheckpointError as error:
        return {"unknown": error.what}
    return {kind: count * (layout.layers if kind in LAYER_KINDS else 1) for kind, count in layout.counts.items()}


def inspection_tables(found: Mapping[str, Any]) -> list[Table]:
    """What :func:`inspect` found, for people."""
    sizes = [(name, f"{size:,}") for name, size in found["files"].items()]
    tables = [Table(title=f"{found['path']}: {', '.join(found['kinds'])}", header=("file", "bytes"), rows=sizes)]
    if "scores" in found:
        tables += [_inputs(found["scores"]), *scores_tables(found["scores"]), _provenance(found["scores"])]
    if "plan" in found:
        tables += [*plan_tables(found["plan"]), _provenance(found["plan"])]
    if "evaluation" in found:
        tables += evaluation_tables(found["evaluation"])
    if "proof" in found:
        tables += [*proof_tables(found["proof"], found["path"]), _provenance(found["proof"])]
    for kind in ("checkpoint", "adapter"):
        if kind in found:
            tables += _weights_tables(kind, found[kind])
    return tables


def _inputs(summary: Mapping[str, Any]) -> Table:
    models = {"base": summary["base"], **summary["experts"]}
    rows = [(name, each["source"], "yes" if each["adapter"] else "no") for name, each in models.items()]
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in summary["units"].items())
    title = f"scores of {summary['model_type']}, {summary['layers']} layers; units of a layer or the model: {kinds}"
    return Table(title=title, header=("name", "model", "LoRA adapter"), rows=rows)


def _provenance(summary: Mapping[str, Any]) -> Table:
    known = summary["provenance"]
    rows = [(field.replace("_", " "), _plain(known[field])) for field in _PROVENANCE if field in known]
    for group in ("settings", "versions"):
        rows += [(f"{group[:-1]} {name}", _plain(value)) for name, value in (known.get(group) or {}).items()]
    return Table(title="provenance", header=("what", "value"), rows=rows)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return number(value, 6)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _weights_tables(kind: str, summary: Mapping[str, Any]) -> list[Table]:
    shown = ("model_type", "content_hash", *_ADAPTER_FIELDS)
    rows = [(field.replace("_", " "), _plain(summary[field])) for field in shown if summary.get(field) is not None]
    rows += [("parameters", f"{summary['parameters']:,}"), ("bytes of weights", f"{summary['bytes']:,}")]
    rows += [(f"parameters in {dtype}", f"{count:,}") for dtype, count in summary["parameters_by_dtype"].items()]
    rows += [(name, f"the same tensor as {other}") for name, other in summary.get("tied", {}).items()]
    rows += [
        (f"units: {name}", f"{each:,}" if isinstance(each, int) else each)
        for name, each in summary.get("units", {}).items()
    ]
    groups: dict[tuple[str, str, str], int] = {}
    for name, entry in summary["tensors"].items():
        key = re.sub(r"(?<=\.)\d+(?=\.)", "*", name), entry["dtype"], " × ".join(map(str, entry["shape"])) or "scalar"
        groups[key] = groups.get(key, 0) + 1
    counted = [(name, str(count), dtype, shape) for (name, dtype, shape), count in groups.items()]
    title = f"{len(summary['tensors'])} tensors, those of all layers in one row"
    return [
        Table(title=kind, header=("what", "value"), rows=rows),
        Table(title=title, header=("tensor", "count", "dtype", "shape"), rows=counted),
    ]
