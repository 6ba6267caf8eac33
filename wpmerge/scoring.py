"""From a base, its experts and their capabilities to Scores: the work behind ``wpmerge score``."""

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from wpmerge.anchor import Anchor
from wpmerge.attribution import UnitArrays, linear
from wpmerge.capability import Capability, load_capability
from wpmerge.errors import AnchorError, CapabilityError
from wpmerge.gradients import integrated
from wpmerge.models import Family, open_family
from wpmerge.output import check_output, check_space, output_directory
from wpmerge.pieces import Pieces
from wpmerge.plan import input_model
from wpmerge.provenance import provenance
from wpmerge.readings import (
    Case,
    Progress,
    Reading,
    ScoreSettings,
    capability_record,
    fit_case_anchor,
    make_reading,
    prepare_case,
)
from wpmerge.readouts import measure
from wpmerge.rows import Row
from wpmerge.scores import ReadoutName, ReadoutRecord, Scores
from wpmerge.screening import verify

NAME = re.compile(r"(?!base$)[A-Za-z0-9][\w.-]*", re.ASCII)
"""Of experts and capabilities: "/" and "@" part the keys of arrays, pieces are files, and plans name the base so."""

LEAST_GAP_T = 2.0
"""A gap whose t-statistic over prompts is below this may be no gap."""


def score(
    *,
    base: str,
    experts: Mapping[str, str],
    capabilities: Mapping[str, str],
    out: Path,
    settings: ScoreSettings | None = None,
    device: str = "cpu",
    resident: bool = True,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Scores:
    """Score every unit of every expert and write the Scores artifact.

    Args:
        base: a directory or a hub id.
        experts: name → directory, hub id or LoRA adapter.
        capabilities: name → built-in name or JSONL file; one for each expert, under the expert's name.
        out: the directory to be made.
        settings: see :class:`ScoreSettings`.
        device: where to run, as torch names it.
        resident: keep weights in memory; otherwise read each layer from disk when it is run.
        overwrite: replace an output that is already there.
        trust_remote_code: see :func:`~wpmerge.checkpoint.open_checkpoint`.
        progress: told what is being done.

    Raises:
        WpmergeError: an input, capability, anchor or output cannot be used; nothing is written under ``out`` then.
    """
    started = time.monotonic()
    settings = settings or ScoreSettings()
    tell: Progress = progress or (lambda *_: None)
    loaded = {name: load_capability(name, spec) for name, spec in capabilities.items()}
    _check_names(experts, loaded)
    _check_readouts(settings)
    files = [path for spec in capabilities.values() if (path := Path(spec)).is_file()]
    check_output(out, inputs=files, overwrite=overwrite)
    tell("opening models", 0, 1)
    family = open_family(base, experts, device=device, resident=resident, trust_remote_code=trust_remote_code)
    inputs = [family.base.path, *(expert.path for expert in family.experts.values()), *files]
    check_space(out, total=_bytes(family, loaded, settings))
    fingerprint = _fingerprint(family, loaded, settings)
    with output_directory(out, inputs=inputs, overwrite=overwrite, fingerprint=fingerprint) as staging:
        pieces = Pieces(staging / "pieces")
        arrays: dict[str, Tensor] = {}
        readouts: dict[str, ReadoutRecord] = {}
        # all gaps and anchors first: what is refused is refused before the long work
        cases = {name: prepare_case(family, capability, settings, pieces, tell) for name, capability in loaded.items()}
        measured = [
            _measure(family, case, readout, name if number == 0 else f"{name}@{readout}", settings, tell)
            for name, case in cases.items()
            for number, readout in enumerate(settings.readouts)
        ]
        for gap in measured:
            readouts[gap.label], found = _score_readout(family, gap, settings, pieces, tell)
            arrays |= found
        scores = Scores(
            base=input_model(family.base),
            experts={name: input_model(expert) for name, expert in family.experts.items()},
            model_type=str(family.layout.config["model_type"]),
            layers=family.layout.layers,
            counts={str(kind): count for kind, count in family.layout.counts.items()},
            labels={str(k): names for k in family.layout.counts if (names := family.layout.labels(k)) is not None},
            capabilities={name: capability_record(loaded[name], case) for name, case in cases.items()},
            readouts=readouts,
            arrays=arrays,
            provenance=provenance(settings, started, device=device),
        )
        scores.save(staging)
        pieces.remove()
    return scores


def _bytes(family: Family, capabilities: Mapping[str, Capability], settings: ScoreSettings) -> int:
    """What the arrays need on disk: float32 in the artifact, and the float32 pieces of an unfinished run beside it."""
    units = sum(math.prod(family.layout.shape(kind)) for kind in settings.kinds if kind in family.layout.counts)
    estimates = len(family.experts) if settings.cross else 1
    arrays = len(capabilities) * len(settings.readouts) * (estimates + bool(settings.integrated_points))
    return 2 * 4 * units * arrays


def _check_readouts(settings: ScoreSettings) -> None:
    if "divergence" in settings.readouts:
        raise CapabilityError("the readout divergence is not served here", expected="reference or anchor")


def _check_names(experts: Mapping[str, str], capabilities: Mapping[str, Capability]) -> None:
    for name in (*experts, *capabilities):
        if not NAME.fullmatch(name):
            raise CapabilityError(
                "this cannot be used as a name: names are parts of keys and of file names",
                got=repr(name),
                expected="letters, digits, '_', '.', '-', beginning with a letter or digit; not base",
            )
    for name in experts:
        if name not in capabilities:
            raise CapabilityError(
                f"expert {name} has no capability to be scored on",
                got=", ".join(capabilities) or "none",
                expected=f"one named {name}",
                mend=f"add --capability {name}=FILE.jsonl or a built-in name",
            )
    for name in capabilities:
        if name not in experts:
            raise CapabilityError(
                f"capability {name} has no expert to measure its gap to",
                got=", ".join(experts) or "none",
                mend=f"add --expert {name}=PATH, or rename the capability after its expert",
            )


def _fingerprint(family: Family, capabilities: Mapping[str, Capability], settings: ScoreSettings) -> str:
    """What decides the result: pieces of a killed run are used again only if it is the same."""
    parts = {
        "base": family.base.content_hash(),
        "experts": {name: expert.content_hash() for name, expert in family.experts.items()},
        "capabilities": {name: capability.content_hash() for name, capability in capabilities.items()},
        # what tokenizer and chat template make of the prompts, and what no weight shows
        "tokens": [family.chat.prompt_tokens(prompt.prompt) for c in capabilities.values() for prompt in c.prompts],
        "config": family.base.config,
        "settings": repr(settings),
        "version": version("wpmerge"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gap:
    """A readout of a capability, and what base and expert give there."""

    case: Case
    name: ReadoutName
    label: str
    anchor: Anchor | None
    reading: Reading
    base: float
    expert: float
    gap: float
    t: float

    @property
    def accepted(self) -> bool:
        """Whether the user insisted on what would have been refused."""
        return self.t < LEAST_GAP_T or (self.anchor is not None and not self.anchor.reliable)


def _measure(
    family: Family, case: Case, name: ReadoutName, label: str, settings: ScoreSettings, tell: Progress
) -> _Gap:
    """Fit the anchor, where the readout is one, and measure the gap."""
    tell(f"{label}: gap", 0, 1)
    anchor = fit_case_anchor(family, case, settings) if name == "anchor" else None
    reading = make_reading(family, case, anchor, settings, count=len(case.scored.prompts))
    own = case.scored.name
    before, after = (
        measure(family.engine, family.weights[source], reading.rows, reading.readout).double() for source in ("", own)
    )
    gap, t = _gap(before, after, label, accept=settings.accept_anchor)
    return _Gap(
        case=case,
        name=name,
        label=label,
        anchor=anchor,
        reading=reading,
        base=float(before.mean()),
        expert=float(after.mean()),
        gap=gap,
        t=t,
    )


def _score_readout(
    family: Family, measured: _Gap, settings: ScoreSettings, pieces: Pieces, tell: Progress
) -> tuple[ReadoutRecord, dict[str, Tensor]]:
    """One readout of one capability: estimates for the experts, verification of its own expert's."""
    own, label, gap, reading = measured.case.scored.name, measured.label, measured.gap, measured.reading
    scored = list(family.experts) if settings.cross else [own]

    def estimate() -> dict[str, Tensor]:
        found = _linear_in_parts(family, scored, reading, settings, lambda n, of: tell(f"{label}: linear", n, of))
        return {
            f"linear/{label}/{expert}/{kind}": (array / gap).float()
            for expert, arrays in zip(scored, found, strict=True)
            for kind, array in arrays.items()
        }

    arrays = pieces.tensors(f"linear-{label}", estimate)
    record: dict[str, Any] = {
        "capability": own,
        "readout": measured.name,
        "l_star": reading.readout.layer,
        "base": measured.base,
        "expert": measured.expert,
        "gap": gap,
        "gap_t": measured.t,
        "prompts": len(measured.case.scored.prompts),
        "accepted": measured.accepted,
    }
    if measured.anchor is not None:
        record |= {"anchor": measured.anchor.kind, "curve": [asdict(point) for point in measured.anchor.curve]}
    if settings.integrated_points:
        base, expert = family.weights[""], family.weights[own]
        shares, residual = integrated(
            family.engine, base, expert, reading.rows, reading.readout, points=settings.integrated_points
        )
        arrays |= {f"integrated/{label}/{own}/{kind}": (array / gap).float() for kind, array in shares.items()}
        record["integrated_residual"] = residual / gap
    if settings.top or settings.sample:
        prefix = f"linear/{label}/{own}/"
        stored = {kind: arrays[prefix + kind] for kind in settings.kinds if prefix + kind in arrays}
        record |= pieces.record(f"verify-{label}", lambda: _verify(family, measured, stored, settings, tell))
    return ReadoutRecord.model_validate(record), arrays


def _gap(
    before: Float[Tensor, " items"], after: Float[Tensor, " items"], label: str, *, accept: bool
) -> tuple[float, float]:
    """The gap and its t over items; a gap that may be none is refused."""
    change = after - before
    gap = float(change.mean())
    t = gap / max(float(change.std() / len(change) ** 0.5), 1e-12)
    if gap == 0.0 or not math.isfinite(gap) or (t < LEAST_GAP_T and not accept):
        raise AnchorError(
            "the expert does not show this capability more strongly than the base",
            where=label,
            got=f"gap {gap:.4g}, t = {t:.1f} over {len(change)} prompts",
            expected=f"a positive gap, t at least {LEAST_GAP_T}",
            mend="other or more prompts, the right expert, or --accept-anchor",
        )
    return gap, t


HELD_BYTES = 1 << 30
"""Residual streams that the linear estimator may hold, bytes."""


def _linear_in_parts(
    family: Family,
    experts: Sequence[str],
    reading: Reading,
    settings: ScoreSettings,
    tell: Callable[[int, int], None],
) -> list[UnitArrays]:
    """The linear estimator over groups of rows whose residual streams fit in memory; effects add up."""
    per_token = family.layout.hidden * 4 * (reading.readout.layer + 2)
    groups = list(_row_groups(reading.rows, HELD_BYTES // per_token))
    total: list[UnitArrays] = []
    for number, rows in enumerate(groups):
        tell(number, len(groups))
        sources = [family.weights[name] for name in experts]
        found = linear(family.engine, family.weights[""], sources, rows, reading.readout, kinds=settings.kinds)
        total = [_added(*pair) for pair in zip(total, found, strict=True)] if total else found
    tell(len(groups), len(groups))
    return total


def _added(one: UnitArrays, other: UnitArrays) -> UnitArrays:
    return {kind: one[kind] + other[kind] for kind in one}


def _row_groups(rows: Sequence[Row], tokens: int) -> Iterator[list[Row]]:
    group: list[Row] = []
    held = 0
    for row in rows:
        if group and held + row.tokens.shape[1] > tokens:
            yield group
            group, held = [], 0
        group.append(row)
        held += row.tokens.shape[1]
    yield group


def _verify(
    family: Family, measured: _Gap, stored: UnitArrays, settings: ScoreSettings, tell: Progress
) -> dict[str, Any]:
    """Exact patching of the screen's top and of a sample, on the first prompts, as fractions of the whole gap."""
    case = measured.case
    count = min(settings.verify_prompts, len(case.scored.prompts))
    reading = make_reading(family, case, measured.anchor, settings, count=count)
    found, noise = verify(
        family.engine,
        family.weights[""],
        family.weights[case.scored.name],
        reading.rows,
        reading.readout,
        stored=stored,
        gap=measured.gap,
        kinds=settings.kinds,
        top=settings.top,
        sample=settings.sample,
        seed=settings.seed,
        progress=lambda done, of: tell(f"{measured.label}: exact", done, of),
    )
    verification = {str(kind): entry.model_dump(mode="json") for kind, entry in found.items()}
    return {"verification": verification, "noise_floor": noise}
