"""The Plan artifact: every coefficient of a merge, with where it came from.

On disk a directory with ``plan.safetensors`` (keys ``{expert}/{tensor name}``, float32, a scalar or a vector) and
``plan.json`` (schema version, the axis of each vector, rule, operator, inputs with content hashes, provenance).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, ValidationError

from wpmerge.checkpoint import Checkpoint
from wpmerge.directory import read_json
from wpmerge.errors import CheckpointError, RecipeError, describe
from wpmerge.output import write_file
from wpmerge.tensorfile import SafetensorsFile

if TYPE_CHECKING:
    import pandas
    from torch import Tensor

SCHEMA_VERSION = 4
READ = (1, 2, 3, 4)
"""Versions that are read. The second and third kept what rule ``refine`` had added, under :data:`OLD_STEPS`."""
OLD_STEPS = "@steps"
BASE = "base"  # the base's name among checkpoints; no expert may bear it
_EXPERT_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")

Granularity = Literal["unit", "block", "tensor", "expert"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficient:
    """What a tensor's delta is multiplied by.

    ``values`` is float32: a scalar (0-d) with ``axis`` None, or a vector along ``axis``, as long as the tensor there.
    """

    values: Float[Tensor, "..."]
    axis: int | None = None

    def __post_init__(self) -> None:
        if str(self.values.dtype) != "torch.float32" or self.values.ndim != (0 if self.axis is None else 1):
            raise RecipeError(
                "a coefficient is malformed",
                got=f"{self.values.dtype}, {self.values.ndim} axes, along axis {self.axis}",
                expected="a float32 scalar, or a float32 vector along one axis",
            )

    def expand(self, shape: tuple[int, ...]) -> Float[Tensor, "..."]:
        """The coefficient with as many axes as the tensor, ready to multiply its delta."""
        if self.axis is None:
            return self.values
        return self.values.view([-1 if i == self.axis else 1 for i in range(len(shape))])


@dataclass(frozen=True, slots=True, kw_only=True)
class InputModel:
    """A base or an expert: how the user named it, which weights that were, and whether it is a LoRA adapter."""

    source: str
    content_hash: str
    adapter: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """What combines the weighted task vectors: their sum, or one of the field's operators.

    Attributes:
        method: ``task_arithmetic``; ``ties`` (trim, elect, disjoint sum); ``dare_linear`` (drop, sum); ``dare_ties``.
        density: the share of each tensor's task vector that TIES or DARE keep, in [0, 1].
        normalize: of TIES and DARE-TIES: divide by the coefficients that agree with the elected sign.
        seed: decides what DARE drops.

    Raises:
        RecipeError: a density outside [0, 1], or one that the method does not take.
    """

    method: Literal["task_arithmetic", "ties", "dare_linear", "dare_ties"] = "task_arithmetic"
    density: float = 1.0
    normalize: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1 or (self.method == "task_arithmetic" and self.density != 1):
            raise RecipeError("no density for this operator", where=self.method, got=self.density)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every coefficient of a merge: merged tensor = base + Σ_e coefficient[e] · (expert_e - base).

    Under another operator than task arithmetic the weighted task vectors are trimmed, dropped and elected as it says.

    Attributes:
        base: the base.
        experts: by name.
        coefficients: expert -> tensor -> coefficient; every expert has an entry for every tensor of the base.
        rule: the rule that made them (``uniform``, ``scaled``, ...).
        granularity: the finest level at which they differ; ``tensor`` and ``expert`` have scalars only.
        provenance: settings, seeds, versions, times; JSON values.
        operator: what combines the weighted task vectors.

    Raises:
        RecipeError: an expert without coefficients or with other tensors than the rest, a number that is not finite.
    """

    base: InputModel
    experts: Mapping[str, InputModel]
    coefficients: Mapping[str, Mapping[str, Coefficient]]
    rule: str
    granularity: Granularity
    provenance: Mapping[str, Any] = field(default_factory=dict)
    operator: Operator = field(default_factory=Operator)

    def __post_init__(self) -> None:
        if not self.experts or set(self.experts) != set(self.coefficients):
            raise RecipeError(
                "a plan needs coefficients for each of its experts and for no other",
                got=sorted(self.coefficients),
                expected=sorted(self.experts) or "at least one expert",
            )
        first = next(iter(self.coefficients))
        for expert, tensors in self.coefficients.items():
            if expert == BASE or not _EXPERT_NAME.fullmatch(expert):
                raise RecipeError("not a name for an expert", got=expert, expected="letters, digits, '_', '.', '-'")
            if odd := sorted(set(tensors) ^ set(self.coefficients[first])):
                raise RecipeError(
                    f"experts {first} and {expert} do not have coefficients for the same tensors", where=odd[0]
                )
            for name, coefficient in tensors.items():
                if not math.isfinite(float(coefficient.values.sum())) and not coefficient.values.isfinite().all():
                    raise RecipeError("a coefficient is not finite", where=f"expert {expert}, tensor {name}")
                if coefficient.axis is not None and self.granularity in ("tensor", "expert"):
                    raise RecipeError(
                        f"a plan of granularity {self.granularity} holds a vector",
                        where=f"expert {expert}, tensor {name}",
                    )

    @classmethod
    def load(cls, directory: str | Path) -> "Plan":
        """Read what :meth:`save`, or ``wpmerge fuse``, wrote; see :func:`load_plan`."""
        return load_plan(Path(directory))

    def to_dataframe(self) -> "pandas.DataFrame":
        """A row for every expert and tensor: ``expert``, ``tensor``, ``axis`` (NA for a scalar), ``count`` of
        coefficients along it, and their ``mean``, ``least`` and ``most``."""
        import pandas

        rows = [
            {
                "expert": expert,
                "tensor": name,
                "axis": coefficient.axis,
                "count": coefficient.values.numel(),
                "mean": float(coefficient.values.mean()),
                "least": float(coefficient.values.min()),
                "most": float(coefficient.values.max()),
            }
            for expert, tensors in self.coefficients.items()
            for name, coefficient in tensors.items()
        ]
        return pandas.DataFrame(rows).astype({"axis": "Int64"})

    def save(self, directory: str | Path) -> None:
        """Write ``plan.safetensors`` and ``plan.json`` into a directory, which is made where it is missing."""
        import safetensors.torch

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        arrays = {  # cloned: experts may share a tensor, which safetensors refuses
            f"{expert}/{name}": coefficient.values.clone()
            for expert, tensors in self.coefficients.items()
            for name, coefficient in tensors.items()
        }
        axes = {
            f"{expert}/{name}": coefficient.axis
            for expert, tensors in self.coefficients.items()
            for name, coefficient in tensors.items()
            if coefficient.axis is not None
        }
        header = _PlanFile(
            schema_version=SCHEMA_VERSION,
            rule=self.rule,
            granularity=self.granularity,
            operator=self.operator.method,
            operator_settings={key: value for key, value in asdict(self.operator).items() if key != "method"},
            base=_InputFile(**asdict(self.base)),
            experts={name: _InputFile(**asdict(expert)) for name, expert in self.experts.items()},
            axes=axes,
            provenance=dict(self.provenance),
        )
        write_file(directory / "plan.safetensors", safetensors.torch.save(arrays))
        write_file(directory / "plan.json", header.model_dump_json(indent=2))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _InputFile(_Strict):
    source: str
    content_hash: str
    adapter: bool


class _PlanFile(_Strict):
    """``plan.json``."""

    schema_version: int
    rule: str
    granularity: Granularity
    operator: Literal["task_arithmetic", "ties", "dare_linear", "dare_ties"]
    operator_settings: dict[str, bool | int | float] = {}
    base: _InputFile
    experts: dict[str, _InputFile]
    axes: dict[str, int]
    provenance: dict[str, Any]


def input_model(checkpoint: Checkpoint) -> InputModel:
    """A checkpoint as a plan records it."""
    return InputModel(source=checkpoint.source, content_hash=checkpoint.content_hash(), adapter=checkpoint.adapter)


def load_plan(directory: Path) -> Plan:
    """Read a plan from a directory.

    Raises:
        RecipeError: a file is missing or malformed, or was written by a later version.
    """
    try:
        raw = read_json(directory / "plan.json")
        arrays = SafetensorsFile(directory / "plan.safetensors")
    except CheckpointError as error:
        raise RecipeError(
            "a plan cannot be read",
            where=error.where,
            got=error.got or error.what,
            expected="plan.json, plan.safetensors",
        ) from None
    where = directory / "plan.json"
    if raw.get("schema_version") not in READ:
        raise RecipeError(
            "a plan of an unknown schema version",
            where=where,
            got=raw.get("schema_version"),
            expected=" or ".join(map(str, READ)),
            mend="use the version of wpmerge that wrote it",
        )
    old_steps = raw["schema_version"] in (2, 3) and raw.pop("steps", None)
    try:
        header = _PlanFile.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise RecipeError("a plan is malformed", where=where, got=describe(error)) from None
    coefficients: dict[str, dict[str, Coefficient]] = {name: {} for name in header.experts}
    for key, info in arrays.tensors.items():
        expert, _, tensor = key.partition("/")
        if expert == OLD_STEPS and old_steps:
            continue
        if expert not in coefficients:
            raise RecipeError("a plan holds coefficients of an unknown expert", where=arrays.path, got=key)
        values = arrays.read(key, 0, info.numel).view(info.shape)
        coefficients[expert][tensor] = Coefficient(values=values, axis=header.axes.get(key))
    if stray := sorted(set(header.axes) - set(arrays.tensors)):
        raise RecipeError("a plan names the axis of a coefficient that it does not hold", where=where, got=stray[0])
    return Plan(
        base=InputModel(**header.base.model_dump()),
        experts={name: InputModel(**entry.model_dump()) for name, entry in header.experts.items()},
        coefficients=coefficients,
        rule=header.rule,
        granularity=header.granularity,
        # in earlier versions more was added after the factors
        provenance={key: value for key, value in header.provenance.items() if key != "factors" or not old_steps},
        operator=_operator(header, where),
    )


def _operator(header: _PlanFile, where: Path) -> Operator:
    try:
        return Operator(method=header.operator, **header.operator_settings)  # type: ignore[arg-type]
    except TypeError as error:
        raise RecipeError("a plan is malformed", where=where, got=error) from None


def check_plan(plan: Plan, base: Checkpoint) -> None:
    """Refuse a plan whose coefficients do not fit the base.

    Raises:
        RecipeError: names the first tensor that is missing, unknown or of another length.
    """
    for expert, tensors in plan.coefficients.items():
        if odd := sorted(set(tensors) ^ set(base.tensors)):
            kind = "has no coefficient for" if odd[0] in base.tensors else "has a coefficient for an unknown"
            raise RecipeError(f"the plan {kind} tensor {odd[0]}", where=f"expert {expert}", mend="fuse again")
        for name, coefficient in tensors.items():
            shape = base.tensors[name].shape
            axis = coefficient.axis
            if axis is not None and not (0 <= axis < len(shape) and coefficient.values.numel() == shape[axis]):
                raise RecipeError(
                    f"a coefficient does not fit tensor {name}",
                    where=f"expert {expert}",
                    got=f"{coefficient.values.numel()} values along axis {axis}",
                    expected=f"shape {shape}",
                )
