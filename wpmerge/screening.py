"""Screen with an estimator, verify with exact patching, and say how far the screen can be trusted."""

import random
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from wpmerge.arch import KINDS, Kind, Layout, Unit
from wpmerge.attribution import UnitArrays, linear
from wpmerge.engine import Engine
from wpmerge.patching import HELD_BYTES, exact
from wpmerge.pieces import Keeper
from wpmerge.readouts import Readout
from wpmerge.rows import Row, pack
from wpmerge.scores import Drawn, Verification, Verified
from wpmerge.weights import WeightSource

NOISE_UNITS = 2
"""Units of each kind whose effect is computed a second time in another batch, for the noise floor."""


def choose_units(
    layout: Layout, kind: Kind, screen: Float[Tensor, "layers units"], *, top: int, sample: int, seed: int
) -> list[tuple[Unit, Drawn]]:
    """The ``top`` units by |screen| and ``sample`` of the rest at random, each with how it was drawn; NaN never."""
    units = list(layout.units(kind))
    sizes = screen.flatten().abs()
    order = [
        i for i in sizes.nan_to_num(nan=-1.0).argsort(descending=True, stable=True).tolist() if sizes[i] == sizes[i]
    ]
    best, rest = order[:top], sorted(order[top:])
    drawn = random.Random(f"{seed}/{kind}").sample(rest, min(sample, len(rest)))
    found: list[tuple[Unit, Drawn]] = [(units[i], "top") for i in best]
    return found + [(units[i], "random") for i in sorted(drawn)]


def verify(
    engine: Engine,
    base: WeightSource,
    expert: WeightSource,
    rows: Sequence[Row],
    readout: Readout,
    *,
    stored: UnitArrays,
    gap: float,
    top: int,
    sample: int,
    seed: int,
    kinds: Sequence[Kind] = KINDS,
    held_bytes: int = HELD_BYTES,
    keeper: Keeper | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[Kind, Verification], float]:
    """Replace each kind's strongest units, and a random sample of the others, and compare with the linear estimate.

    Both are computed on the prompts of ``rows``, so that they estimate the same number.

    Args:
        engine: runs the layers.
        base: what is patched.
        expert: where units come from.
        rows: the prompts to verify on.
        readout: F.
        stored: the screen on all prompts: its strongest units are the ones replaced.
        gap: what effects are fractions of; from all prompts, since that of a few may be near 0.
        top: units per kind, by |estimate|.
        sample: units per kind drawn from the rest.
        seed: of the draw.
        kinds: unit kinds to verify.
        held_bytes: see :func:`~wpmerge.patching.exact`.
        keeper: keeps finished parts of the exact patching.
        progress: called with units done and in all.

    Returns:
        The verification per kind, and the noise floor: the largest change of a verified recovery when it is computed
        in another batch and packing.
    """
    layout = engine.layout
    (screen,) = linear(engine, base, [expert], rows, readout, kinds=kinds)
    chosen = {kind: choose_units(layout, kind, stored[kind], top=top, sample=sample, seed=seed) for kind in screen}
    units = [unit for pairs in chosen.values() for unit, _ in pairs]
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, len(units))

    effects = exact(engine, base, expert, rows, readout, units, held_bytes=held_bytes, keeper=keeper, progress=tell)
    effects /= gap
    found = dict(zip(units, effects, strict=True))
    verified = {
        kind: _compare(kind, pairs, screen, found, gap, unverified=int((~screen[kind].isnan()).sum()) - len(pairs))
        for kind, pairs in chosen.items()
        if pairs
    }
    again = [unit for pairs in chosen.values() for unit, _ in pairs[:NOISE_UNITS]]
    noise = _noise_floor(engine, base, expert, rows, readout, {unit: found[unit] * gap for unit in again})
    return verified, noise / abs(gap)


def _noise_floor(
    engine: Engine,
    base: WeightSource,
    expert: WeightSource,
    rows: Sequence[Row],
    readout: Readout,
    effects: dict[Unit, Tensor],
) -> float:
    """Compute some effects again, one unit at a time and packed otherwise; the largest change of F."""
    sequences = _sequences(rows)
    alone = len(rows) == len(sequences)
    other = pack(sequences, tokens_per_row=sum(map(len, sequences)) if alone else 1)
    units = list(effects)
    if not units:
        return 0.0
    second = exact(engine, base, expert, other, readout, units, batch_tokens=1)
    first = torch.stack([effects[unit] for unit in units])
    return float((first.mean(dim=1) - second.mean(dim=1)).abs().max())


def _sequences(rows: Sequence[Row]) -> list[list[int]]:
    """The token sequences that were packed, in order of their numbers."""
    found = {number: row.tokens[0, place].tolist() for row in rows for number, place in row.places.items()}
    return [found[number] for number in sorted(found)]


def _compare(
    kind: Kind,
    pairs: Sequence[tuple[Unit, Drawn]],
    screen: UnitArrays,
    found: dict[Unit, Tensor],
    gap: float,
    *,
    unverified: int,
) -> Verification:
    units = []
    for unit, drawn in pairs:
        items = found[unit]
        stderr = float(items.std() / len(items) ** 0.5) if len(items) > 1 else 0.0
        estimate = float(screen[kind][unit.layer, unit.index]) / gap
        units.append(Verified(unit=str(unit), drawn=drawn, screen=estimate, exact=float(items.mean()), stderr=stderr))
    return summarise(units, unverified=unverified)


def summarise(units: Sequence[Verified], *, unverified: int) -> Verification:
    """The statistics of a verification.

    Args:
        units: the verified units; those drawn as "top" are the screen's K strongest.
        unverified: how many units of the kind were not replaced.
    """
    draw = [unit for unit in units if unit.drawn == "random"]
    count = sum(unit.drawn == "top" for unit in units)
    strongest = sorted(units, key=lambda unit: -abs(unit.exact))[:count]
    threshold = abs(strongest[-1].exact) if strongest else 0.0
    exceeding = sum(abs(unit.exact) > threshold for unit in draw)
    return Verification(
        units=tuple(units),
        spearman=_spearman(units),
        spearman_random=_spearman(draw),
        recall=sum(unit.drawn == "top" for unit in strongest) / len(strongest) if strongest else None,
        largest_error=max((abs(unit.exact - unit.screen) for unit in draw), default=None),
        missed_share=_upper_share(exceeding, len(draw)) if draw and unverified and count else None,
    )


def _upper_share(hits: int, trials: int) -> float:
    """Clopper and Pearson's one-sided upper 95% bound on a share, from ``hits`` of ``trials``."""
    from scipy.stats import beta

    return 1.0 if hits == trials else float(beta.ppf(0.95, hits + 1, trials - hits))


def _spearman(units: Sequence[Verified]) -> float | None:
    """Rank correlation of screen and exact; None where it says nothing: fewer than 3 units, or all effects equal."""
    from scipy.stats import spearmanr

    screen, exact_ = [unit.screen for unit in units], [unit.exact for unit in units]
    if len(units) < 3 or len(set(screen)) == 1 or len(set(exact_)) == 1:
        return None
    return float(spearmanr(screen, exact_).statistic)
