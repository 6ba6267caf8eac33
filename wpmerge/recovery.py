"""One readout of one capability: its gap, the recovery of every unit, and how far the screen can be trusted."""

import logging
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from wpmerge.anchor import Anchor
from wpmerge.arch import KINDS
from wpmerge.attribution import UnitArrays
from wpmerge.errors import AnchorError
from wpmerge.estimators import EstimatorName, EstimatorSettings, completeness, estimate
from wpmerge.models import Family
from wpmerge.patching import HELD_BYTES
from wpmerge.pieces import Pieces
from wpmerge.readings import Case, Progress, Reading, ScoreSettings, fit_case_anchor, make_reading
from wpmerge.readouts import measure
from wpmerge.scores import Candidate, Direction, ReadoutName, ReadoutRecord, Verification, array_key
from wpmerge.screening import verify

logger = logging.getLogger(__name__)

LEAST_GAP_T = 2.0
"""A gap whose t-statistic over prompts is below this may be no gap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """A readout of a capability, and what base and expert give there.

    Attributes:
        case: the capability.
        name: which readout.
        label: what its arrays are called by.
        anchor: where the readout is one.
        base: F(base), nats per token or residual-stream units.
        expert: F(own expert); None for a retain set.
        gap: expert − base; None for a retain set.
        t: the gap's t-statistic over items.
        choice: the readouts that this one was chosen from, if it was.
    """

    case: Case
    name: ReadoutName
    label: str
    anchor: Anchor | None
    base: float
    expert: float | None = None
    gap: float | None = None
    t: float | None = None
    choice: tuple[Candidate, ...] = ()

    @property
    def scale(self) -> float:
        """What effects are divided by: the gap, or for a retain set nothing."""
        return 1.0 if self.gap is None else self.gap

    @property
    def accepted(self) -> bool:
        """Whether the user insisted on what would have been refused."""
        weak = self.t is not None and self.t < LEAST_GAP_T
        return weak or (self.anchor is not None and not self.anchor.reliable)


def measure_gap(
    family: Family, case: Case, name: ReadoutName, settings: ScoreSettings, held_bytes: int, *, first: bool
) -> Gap:
    """Fit the anchor, where the readout is one, and measure base and expert.

    Args:
        family: the models.
        case: the capability.
        name: which readout.
        settings: what was asked for.
        held_bytes: bound on residual streams held at a time.
        first: whether its arrays bear the capability's own name.

    Raises:
        AnchorError: the anchor is not reliable, or there may be no gap, and the settings do not insist.
    """
    own = case.scored.name
    label = own if first else f"{own}@{name}"
    anchor = fit_case_anchor(family, case, settings, held_bytes) if name == "anchor" else None
    reading = make_reading(family, case, anchor, settings, count=len(case.scored.prompts), name=name)
    before = measure(family.engine, family.weights[""], reading.rows, reading.readout).double()
    found = Gap(case=case, name=name, label=label, anchor=anchor, base=float(before.mean()))
    if case.retain:
        return found
    after = measure(family.engine, family.weights[own], reading.rows, reading.readout).double()
    gap, t = _gap(before, after, label, accept=settings.accept_anchor)
    return replace(found, expert=float(after.mean()), gap=gap, t=t)


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


def score_readout(
    family: Family, measured: Gap, settings: ScoreSettings, held_bytes: int, pieces: Pieces, tell: Progress
) -> tuple[ReadoutRecord, dict[str, Tensor]]:
    """Every unit's recovery by the asked estimators, in the asked directions, and the verification of the screen.

    Args:
        family: the models.
        measured: what is read, and its gap.
        settings: what was asked for.
        held_bytes: bound on residual streams held at a time.
        pieces: keep what is finished.
        tell: told what is being done.
    """
    arrays: dict[str, Tensor] = {}
    verification: dict[Direction, Any] = {}
    case = measured.case
    # made here, not kept with the gap: a divergence's teacher brings a vocabulary's matrices
    reading = make_reading(family, case, measured.anchor, settings, count=len(case.scored.prompts), name=measured.name)
    record: dict[str, Any] = {
        "capability": measured.case.scored.name,
        "readout": measured.name,
        "l_star": reading.readout.layer,
        "base": measured.base,
        "expert": measured.expert,
        "gap": measured.gap,
        "gap_t": measured.t,
        "prompts": len(measured.case.scored.prompts),
        "accepted": measured.accepted,
        "choice": measured.choice,
    }
    if measured.anchor is not None:
        record |= {"anchor": measured.anchor.kind, "curve": [asdict(point) for point in measured.anchor.curve]}
    for direction in _directions(measured, settings):
        for estimator in settings.estimators:
            # the path from base to expert has one set of shares, whichever end it is walked from
            if estimator == "integrated" and direction == "necessity":
                continue
            arrays |= _estimates(family, measured, reading, estimator, direction, settings, held_bytes, pieces, tell)
        if (settings.top or settings.sample) and not measured.case.retain:
            stored = _own(arrays, "linear", measured, direction, settings)
            found, noise = _verify(family, measured, direction, stored, settings, pieces, tell)
            verification[direction] = found
            record["noise_floor"] = max(noise, record.get("noise_floor", 0.0))
    if "integrated" in settings.estimators and set(settings.kinds) >= set(KINDS) and not measured.case.retain:
        shares = _own(arrays, "integrated", measured, "sufficiency", settings)
        record["integrated_residual"] = completeness({k: v for k, v in shares.items() if k in KINDS}) - 1
    return ReadoutRecord.model_validate({**record, "verification": verification}), arrays


def _directions(measured: Gap, settings: ScoreSettings) -> list[Direction]:
    """Those of the asked directions that this readout has; what it has not is said."""
    found = [each for each in settings.directions if each == "sufficiency" or not measured.case.retain]
    if measured.name == "divergence" and "necessity" in found:
        logger.warning("%s: no necessity: −KL is largest at the expert, so its slope there is 0", measured.label)
        found.remove("necessity")
    return found


def _own(
    arrays: dict[str, Tensor], estimator: str, measured: Gap, direction: Direction, settings: ScoreSettings
) -> UnitArrays:
    own = measured.case.scored.name
    keys = {kind: array_key(estimator, measured.label, own, kind, direction=direction) for kind in settings.kinds}
    return {kind: arrays[key] for kind, key in keys.items() if key in arrays}


def _estimates(
    family: Family,
    measured: Gap,
    reading: Reading,
    estimator: EstimatorName,
    direction: Direction,
    settings: ScoreSettings,
    held_bytes: int,
    pieces: Pieces,
    tell: Progress,
) -> dict[str, Tensor]:
    """One estimator in one direction. Necessity patches the expert with the base's units, so effects change sign."""
    own, label = measured.case.scored.name, measured.label
    cross = estimator == "linear" and direction == "sufficiency" and (settings.cross or measured.case.retain)
    experts = list(family.experts) if cross or measured.case.retain else [own]
    sources = [family.weights[name] for name in experts]
    base, sign = family.weights[""], 1.0
    if direction == "necessity":
        base, sources, sign = sources[0], [base], -1.0
    name = f"{estimator}-{label}-{direction}"
    options = EstimatorSettings(kinds=settings.kinds, points=settings.integrated_points, held_bytes=held_bytes)
    words = estimator if direction == "sufficiency" else f"{estimator}, {direction}"

    def compute() -> dict[str, Tensor]:
        found = estimate(
            estimator,
            family.engine,
            base,
            sources,
            reading.rows,
            reading.readout,
            options,
            keeper=pieces.below(name),
            progress=lambda done, of: tell(f"{label}: {words}", done, of),
        )
        return {
            array_key(estimator, label, expert, kind, direction=direction): (sign * array / measured.scale).float()
            for expert, arrays in zip(experts, found, strict=True)
            for kind, array in arrays.items()
        }

    return pieces.tensors(name, compute)


def _verify(
    family: Family,
    measured: Gap,
    direction: Direction,
    stored: UnitArrays,
    settings: ScoreSettings,
    pieces: Pieces,
    tell: Progress,
) -> tuple[dict[str, Verification], float]:
    """Exact patching of the screen's top and of a sample, on the first prompts, as fractions of the whole gap."""
    case, name = measured.case, f"verify-{measured.label}-{direction}"
    count = min(settings.verify_prompts, len(case.scored.prompts))
    reading = make_reading(family, case, measured.anchor, settings, count=count, name=measured.name)
    base, expert, sign = family.weights[""], family.weights[case.own], 1.0
    if direction == "necessity":
        base, expert, sign = expert, base, -1.0
    words = "exact" if direction == "sufficiency" else f"exact, {direction}"

    def compute() -> dict[str, Any]:
        found, noise = verify(
            family.engine,
            base,
            expert,
            reading.rows,
            reading.readout,
            stored=stored,
            gap=sign * measured.scale,
            kinds=settings.kinds,
            top=settings.top,
            sample=settings.sample,
            seed=settings.seed,
            # weights in memory are there for every group; those on disk are read once for many
            held_bytes=1 if family.resident else HELD_BYTES,
            keeper=pieces.below(name),
            progress=lambda done, of: tell(f"{measured.label}: {words}", done, of),
        )
        return {"kinds": {str(kind): entry.model_dump(mode="json") for kind, entry in found.items()}, "noise": noise}

    record = pieces.record(name, compute)
    kinds = {kind: Verification.model_validate(entry) for kind, entry in record["kinds"].items()}
    return kinds, record["noise"]
