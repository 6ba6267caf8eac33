"""The Scores artifact: recovery per unit, with what it was measured on and how far to trust it.

On disk a directory with ``scores.safetensors`` and ``scores.json``; docs/formats.md states both.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors.torch
import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from wpmerge.arch import MODEL_KINDS, Kind, Unit
from wpmerge.directory import read_json
from wpmerge.errors import CheckpointError, WpmergeError, describe
from wpmerge.output import write_file
from wpmerge.plan import InputModel
from wpmerge.tensorfile import SafetensorsFile

if TYPE_CHECKING:
    import pandas

HEADER_FILE, ARRAYS_FILE = FILES = ("scores.json", "scores.safetensors")
SCHEMA_VERSION = 2
ReadoutName = Literal["reference", "anchor", "divergence"]
AskedReadout = Literal["reference", "anchor", "divergence", "auto"]
"""What may be asked for: a readout, or the one that is measured to be the most reliable."""
Drawn = Literal["top", "random"]
Direction = Literal["sufficiency", "necessity"]
"""Whose unit is replaced: the base's by the expert's, or the expert's by the base's."""
DIRECTIONS: tuple[Direction, ...] = ("sufficiency", "necessity")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")  # null could not be read again


class Verified(_Record):
    """One unit that was replaced for real.

    Attributes:
        unit: its id.
        drawn: why it was chosen: among the screen's top, or at random from the rest.
        screen: estimated recovery, on the same prompts as ``exact``.
        exact: recovery, a fraction of the gap.
        stderr: standard error of ``exact`` over prompts.
    """

    unit: str
    drawn: Drawn
    screen: float
    exact: float
    stderr: float


class Verification(_Record):
    """How the screen did against exact patching, for one kind of unit.

    Attributes:
        units: the verified units.
        spearman: rank correlation of screen and exact over all verified units.
        spearman_random: the same over the random draw alone; None if the draw has fewer than 3 units.
        recall: share of the K strongest verified units (by |exact|) that were among the screen's top K; None if none
            were drawn as top.
        largest_error: largest |exact − screen| of the random draw, a fraction of the gap.
        missed_share: upper 95% confidence bound on the share of unverified units that are stronger (by |exact|) than
            the weakest of the K strongest found.
    """

    units: tuple[Verified, ...]
    spearman: float | None
    spearman_random: float | None
    recall: float | None
    largest_error: float | None
    missed_share: float | None


class AnchorCurvePoint(_Record):
    """One layer of an anchor's curve; see :class:`wpmerge.anchor.AnchorPoint`."""

    layer: int
    cosine: float
    gap: float
    t: float
    carried: float | None


class Candidate(_Record):
    """What one readout was worth, where the readout was chosen by its reliability.

    Attributes:
        readout: which.
        usable: it has a gap, and an anchor passed its criteria.
        refused: why not, where it is not.
        halves: rank correlation of the unit scores from two halves of the prompts, an anchor's direction and all taken
            anew from each; over the units that moved and that every candidate reads. None if it could not be measured.
        overlap: share of the strongest 5% of one half that are among the strongest 5% of the other.
        behaviour: rank correlation of its scores from one half with the reference's from the other half, mean of both
            ways: how far it foretells the behaviour on prompts it has not seen.
        l_star: the layer it is read after.
        gap_t: its gap's t-statistic over prompts.
        chosen: it carries the capability's name.
    """

    readout: ReadoutName
    usable: bool
    refused: str | None = None
    halves: float | None = None
    overlap: float | None = None
    behaviour: float | None = None
    l_star: int | None = None
    gap_t: float | None = None
    chosen: bool = False


class ReadoutRecord(_Record):
    """One readout of one capability, or of a retain set, which has no expert and so no gap.

    Attributes:
        capability: its name; the expert of that name is its own expert.
        readout: "reference", "divergence", or "anchor".
        anchor: "contrast" or "pair", for an anchor.
        l_star: the layer it is read after; units above it have no score.
        base: F(base), in the readout's unit: nats per token, or residual-stream units.
        expert: F(own expert); None for a retain set.
        gap: expert − base, what recoveries are fractions of; None for a retain set, whose scores are effects in the
            readout's unit.
        gap_t: the gap's t-statistic over prompts.
        noise_floor: largest change of a recovery with batch position and chunk size.
        prompts: how many were used.
        accepted: taken although unreliable, because the user insisted.
        curve: the anchor's numbers at every layer; empty for behavioural readouts.
        choice: the readouts that it was chosen from, where it was; empty where it was asked for by name.
        integrated_residual: Σ of the integrated shares minus 1, where all finest units were asked for.
        verification: direction → kind → how the linear screen did.
    """

    capability: str
    readout: ReadoutName
    anchor: Literal["contrast", "pair"] | None = None
    l_star: int
    base: float
    expert: float | None
    gap: float | None
    gap_t: float | None
    noise_floor: float | None = None
    prompts: int
    accepted: bool = False
    curve: tuple[AnchorCurvePoint, ...] = ()
    choice: tuple[Candidate, ...] = ()
    integrated_residual: float | None = None
    verification: dict[Direction, dict[str, Verification]] = {}


def array_key(estimator: str, label: str, expert: str, kind: str, *, direction: Direction = "sufficiency") -> str:
    """The key of an array: ``{estimator}/{label}/{expert}/{kind}``, for necessity ``{estimator}-necessity/…``."""
    suffix = "" if direction == "sufficiency" else f"-{direction}"
    return f"{estimator}{suffix}/{label}/{expert}/{kind}"


class HeldOut(_Record):
    """Prompts that no score has seen, for choosing coefficients: their tokens, and where each reference starts."""

    prompts: tuple[str, ...]
    sequences: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]


class CapabilityRecord(_Record):
    """Where a capability's prompts came from, and those kept for choosing coefficients.

    Attributes:
        source: a built-in name or a file.
        content_hash: of its prompts.
        retain: it has no expert: what a merge must not lose. Its references are the base's own replies.
        scored: the prompts that scores were taken on.
        references: "given" with the prompts, the "expert"'s own greedy replies, or the "base"'s.
        held_out: prompts kept for choosing coefficients.
    """

    source: str
    content_hash: str
    retain: bool = False
    scored: tuple[str, ...]
    references: Literal["given", "expert", "base"]
    held_out: HeldOut


class _InputRecord(_Record):
    source: str
    content_hash: str
    adapter: bool


class _ScoresFile(_Record):
    schema_version: int
    base: _InputRecord
    experts: dict[str, _InputRecord]
    model_type: str
    counts: dict[str, int]
    layers: int
    labels: dict[str, list[str]]
    capabilities: dict[str, CapabilityRecord]
    readouts: dict[str, ReadoutRecord]
    provenance: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Recovery of every unit.

    Attributes:
        base: the base.
        experts: by name.
        model_type: the architecture, as transformers names it.
        layers: decoder layers.
        counts: kind → units per layer, or in the model.
        labels: kind → names of the units of a layer, for kinds whose numbers say little.
        capabilities: by name.
        readouts: label → what was read. The first readout of a capability has its name, others ``{name}@{readout}``.
        arrays: :func:`array_key` → recovery, fraction of the gap (for a retain set: effect, nats per token), float32
            [layers or 1, units]; NaN where the readout cannot see the unit.
        provenance: settings, seeds, versions, times, peak memory.
    """

    base: InputModel
    experts: Mapping[str, InputModel]
    model_type: str
    layers: int
    counts: Mapping[str, int]
    labels: Mapping[str, list[str]]
    capabilities: Mapping[str, CapabilityRecord]
    readouts: Mapping[str, ReadoutRecord]
    arrays: Mapping[str, Float[Tensor, "layers units"]]
    provenance: Mapping[str, Any]

    def array(
        self,
        label: str,
        expert: str,
        kind: Kind,
        *,
        estimator: str = "linear",
        direction: Direction = "sufficiency",
    ) -> Float[Tensor, "layers units"]:
        """One array, by the parts of its :func:`array_key`.

        Raises:
            WpmergeError: there is none, with the keys that there are.
        """
        key = array_key(estimator, label, expert, kind, direction=direction)
        if key not in self.arrays:
            raise WpmergeError(
                "there is no such score",
                got=key,
                expected=", ".join(sorted(self.arrays)[:12]) + ", …",
                mend="score again, without --kind if kinds were left out",
            )
        return self.arrays[key]

    @classmethod
    def load(cls, directory: str | Path) -> "Scores":
        """Read what :meth:`save`, or ``wpmerge score``, wrote; see :func:`load_scores`."""
        return load_scores(Path(directory))

    def to_dataframe(self) -> "pandas.DataFrame":
        """A row for every score: ``estimator``, ``label``, ``expert``, ``kind``, ``layer``, ``index``, ``unit`` and
        ``score``.

        That is a recovery, a fraction of the label's gap (of a retain set: an effect, nats per token); NaN where
        the readout cannot see the unit. ``estimator`` ends in ``-necessity`` where the expert was patched.
        """
        import pandas

        columns: dict[str, list[Any]] = {name: [] for name in ("estimator", "label", "expert", "kind")}
        columns |= {name: [] for name in ("layer", "index", "unit", "score")}
        for key, array in self.arrays.items():
            parts = key.split("/")
            for layer, row in enumerate(array.tolist()):
                for index, value in enumerate(row):
                    unit = str(Unit(kind=parts[3], layer=layer, index=index))  # type: ignore[arg-type]
                    for name, entry in zip(columns, (*parts, layer, index, unit, value), strict=True):
                        columns[name].append(entry)
        return pandas.DataFrame(columns)

    def save(self, directory: str | Path) -> None:
        """Write ``scores.safetensors`` and ``scores.json`` into a directory, which is made where it is missing."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        header = _ScoresFile(
            schema_version=SCHEMA_VERSION,
            base=_input_record(self.base),
            experts={name: _input_record(expert) for name, expert in self.experts.items()},
            model_type=self.model_type,
            counts=dict(self.counts),
            layers=self.layers,
            labels=dict(self.labels),
            capabilities=dict(self.capabilities),
            readouts=dict(self.readouts),
            provenance=dict(self.provenance),
        )
        arrays = {key: value.float().contiguous() for key, value in sorted(self.arrays.items())}
        write_file(directory / ARRAYS_FILE, safetensors.torch.save(arrays))
        write_file(directory / HEADER_FILE, header.model_dump_json(indent=1))


def without_retain_sets(scores: Scores) -> Scores:
    """The same scores, as if no retain set had been asked for."""
    kept = {name for name, record in scores.capabilities.items() if record.retain}
    return replace(
        scores,
        capabilities={name: record for name, record in scores.capabilities.items() if name not in kept},
        readouts={label: record for label, record in scores.readouts.items() if record.capability not in kept},
        arrays={key: array for key, array in scores.arrays.items() if key.split("/")[1] not in kept},
    )


def load_scores(directory: Path) -> Scores:
    """Read Scores from a directory.

    Raises:
        WpmergeError: a file is missing or malformed, or was written by a later version.
    """
    where = directory / HEADER_FILE
    try:
        raw = read_json(where)
        arrays = SafetensorsFile(directory / ARRAYS_FILE)
    except CheckpointError as error:
        raise WpmergeError(
            "scores cannot be read",
            where=error.where,
            got=error.what if error.got is None else f"{error.what}: {error.got}",
            expected="scores.json and scores.safetensors, as `wpmerge score` writes them",
        ) from None
    if raw.get("schema_version") != SCHEMA_VERSION:
        raise WpmergeError(
            "scores of an unknown schema version",
            where=where,
            got=raw.get("schema_version"),
            expected=SCHEMA_VERSION,
            mend="use the version of wpmerge that wrote them",
        )
    try:
        header = _ScoresFile.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise WpmergeError("scores are malformed", where=where, got=describe(error)) from None
    if fault := next(_misfits(header, {key: tuple(info.shape) for key, info in arrays.tensors.items()}), None):
        raise WpmergeError(
            "scores do not fit together",
            where=where,
            got=fault,
            mend="take them as wpmerge score wrote them, or score again",
        )
    tensors = {key: arrays.read(key, 0, info.numel).view(info.shape) for key, info in arrays.tensors.items()}
    return Scores(
        base=InputModel(**header.base.model_dump()),
        experts={name: InputModel(**expert.model_dump()) for name, expert in header.experts.items()},
        model_type=header.model_type,
        layers=header.layers,
        counts=header.counts,
        labels=header.labels,
        capabilities=header.capabilities,
        readouts=header.readouts,
        arrays={key: value.to(torch.float32) for key, value in tensors.items()},
        provenance=header.provenance,
    )


def _misfits(header: _ScoresFile, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """What no scores that were written whole could say."""
    settings = header.provenance.get("settings", {})
    if not isinstance(settings, dict):
        yield f"provenance.settings: {settings!r}"
    if not header.experts:
        yield "no expert"
    for name, record in header.capabilities.items():
        sequences, starts = record.held_out.sequences, record.held_out.starts
        if not sequences or len(starts) != len(sequences):
            yield f"{name}: {len(sequences)} held-out prompts, {len(starts)} starts of their references"
        for sequence, start in zip(sequences, starts, strict=False):
            if not 0 < start < len(sequence) or min(sequence) < 0:
                yield f"{name}: a held-out prompt of {len(sequence)} tokens whose reference starts at {start}"
    for key, shape in shapes.items():
        kind = key.split("/")[-1]
        rows = 1 if kind in MODEL_KINDS else header.layers
        if len(shape) != 2 or shape[0] != rows or shape[1] != header.counts.get(kind, shape[1]):
            yield f"{key}: shape {list(shape)}, of {header.layers} layers with {header.counts.get(kind)} units each"


def _input_record(model: InputModel) -> _InputRecord:
    return _InputRecord(source=model.source, content_hash=model.content_hash, adapter=model.adapter)
