"""Merging strategies that are compared: mergekit's methods and our rules, as data.

A rival is mergekit's name, what may be tuned, and how a point becomes mergekit's parameters. One of our rules is what
``wpmerge fuse`` would be told; a new rule is one more entry of :data:`OURS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wpmerge.bench_mergekit import EPSILON, GAMMA, Numbers
from wpmerge.calibration import GRID, Tunable
from wpmerge.coefficients import MAX_COEFFICIENT
from wpmerge.rules import FuseSettings

Point = Mapping[str, float]
"""A parameter's name → its value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What a method may tune.

    Attributes:
        start: every parameter's first value; also what is evaluated where there is nothing to tune.
        tunables: in the order they are searched.
    """

    start: Mapping[str, float]
    tunables: tuple[Tunable, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """One of mergekit's methods, tuned.

    Attributes:
        method: as mergekit's recipes name it.
        space: subset → what is tuned.
        numbers: subset and point → mergekit's parameters.
        largest: most experts it can merge; None for any number.
        drawn: whether it draws at random.
    """

    method: str
    space: Callable[[Sequence[str]], Space]
    numbers: Callable[[Sequence[str], Point], Numbers]
    largest: int | None = None
    drawn: bool = False


def _weights(subset: Sequence[str], point: Point) -> dict[str, float]:
    return {name: point[f"weight.{name}"] for name in subset}


def _weight_keys(subset: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"weight.{name}" for name in subset)


def _each(subset: Sequence[str], *, high: float = MAX_COEFFICIENT) -> tuple[Tunable, ...]:
    return tuple(Tunable(names=(key,), high=high) for key in _weight_keys(subset))


def _choice(names: tuple[str, ...], grid: tuple[float, ...]) -> Tunable:
    """One of some values, for all of ``names`` alike."""
    return Tunable(names=names, high=max(grid), grid=grid, steps=())


def _sparse_space(densities: tuple[float, ...]) -> Callable[[Sequence[str]], Space]:
    """A common weight, the density, then the weight of each expert."""

    def space(subset: Sequence[str]) -> Space:
        keys = _weight_keys(subset)
        return Space(
            start=dict.fromkeys(keys, 0.7) | {"density": densities[0]},
            tunables=(
                _choice(keys, GRID),
                _choice(("density",), densities),
                *_each(subset),
            ),
        )

    return space


def _normalized_space(densities: tuple[float, ...]) -> Callable[[Sequence[str]], Space]:
    """For methods that divide by the weights' sum: lambda is the scale, and weights count relative to each other."""

    def space(subset: Sequence[str]) -> Space:
        return Space(
            start=dict.fromkeys(_weight_keys(subset), 1.0) | {"lambda": 1.0, "density": densities[0]},
            tunables=(
                Tunable(names=("lambda",), high=3.0, grid=(0.7, 1.0, 1.4, 1.8)),
                _choice(("density",), densities),
                *_each(subset, high=3.0),
            ),
        )

    return space


def _sparse(*, drop: tuple[str, ...] = (), **shared: Any) -> Callable[[Sequence[str], Point], Numbers]:
    def numbers(subset: Sequence[str], point: Point) -> Numbers:
        more = {"lambda": point["lambda"]} if "lambda" in point else {}
        return Numbers(weights=_weights(subset, point), density=point.get("density"), shared={**shared, **more})

    return numbers


def _uniform_space(subset: Sequence[str]) -> Space:
    keys = _weight_keys(subset)
    steps = (0.1, 0.05, 0.025)
    return Space(
        start=dict.fromkeys(keys, 0.7),
        tunables=(Tunable(names=keys, high=MAX_COEFFICIENT, grid=(*GRID, 1.1), steps=steps),),
    )


def _scaled_space(subset: Sequence[str]) -> Space:
    keys = _weight_keys(subset)
    return Space(start=dict.fromkeys(keys, 0.7), tunables=(_choice(keys, GRID), *_each(subset)))


def _linear_space(subset: Sequence[str]) -> Space:
    """An average: only the weights' ratios count, so the first expert's is fixed."""
    keys = _weight_keys(subset)
    others = tuple(Tunable(names=(key,), grid=(0.5, 1.0, 2.0), steps=(0.4, 0.2, 0.1), high=8.0) for key in keys[1:])
    return Space(start=dict.fromkeys(keys, 1.0), tunables=others)


def _sce_space(_: Sequence[str]) -> Space:
    grid = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1.0)
    one = Tunable(names=("select_topk",), grid=grid, steps=(0.05, 0.02), low=0.01, high=1.0)
    return Space(start={"select_topk": 1.0}, tunables=(one,))


def _stock_space(_: Sequence[str]) -> Space:
    return Space(start={"filter_wise": 0.0}, tunables=(_choice(("filter_wise",), (0.0, 1.0)),))


def _nuslerp_space(subset: Sequence[str]) -> Space:
    """The share of the second expert."""
    share = Tunable(names=("t",), grid=(0.3, 0.5, 0.7), steps=(0.1, 0.05, 0.025), high=1.0)
    rows = _choice(("flatten",), (1.0, 0.0))
    return Space(start={"t": 0.5, "flatten": 1.0}, tunables=(share, rows))


def _nuslerp(subset: Sequence[str], point: Point) -> Numbers:
    weights = dict(zip(subset, (1.0 - point["t"], point["t"]), strict=True))
    return Numbers(weights=weights, shared={"nuslerp_flatten": bool(point["flatten"])})


RIVALS: Mapping[str, Rival] = {
    "uniform": Rival(method="task_arithmetic", space=_uniform_space, numbers=_sparse()),
    "scaled": Rival(method="task_arithmetic", space=_scaled_space, numbers=_sparse()),
    "linear": Rival(method="linear", space=_linear_space, numbers=_sparse()),
    "ties": Rival(method="ties", space=_normalized_space((0.5, 0.2, 0.8)), numbers=_sparse()),
    "dare_linear": Rival(method="dare_linear", space=_sparse_space((0.8, 0.5, 0.2)), numbers=_sparse(), drawn=True),
    "dare_ties": Rival(method="dare_ties", space=_sparse_space((0.8, 0.5, 0.2)), numbers=_sparse(), drawn=True),
    "della": Rival(
        method="della", space=_normalized_space((0.7, 0.5, 0.3)), numbers=_sparse(epsilon=EPSILON), drawn=True
    ),
    "breadcrumbs": Rival(method="breadcrumbs", space=_sparse_space((0.9, 0.7, 0.4)), numbers=_sparse(gamma=GAMMA)),
    "sce": Rival(
        method="sce",
        space=_sce_space,
        numbers=lambda _, point: Numbers(weights={}, shared={"select_topk": point["select_topk"]}),
    ),
    "model_stock": Rival(
        method="model_stock",
        space=_stock_space,
        numbers=lambda _, point: Numbers(weights={}, shared={"filter_wise": bool(point["filter_wise"])}),
    ),
    "nuslerp": Rival(method="nuslerp", space=_nuslerp_space, numbers=_nuslerp, largest=2),
    "karcher": Rival(method="karcher", space=lambda _: Space(start={}), numbers=lambda *_: Numbers(weights={})),
}
"""Strategy → mergekit's method. Karcher has nothing to tune; SCE and Model Stock have no scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ours:
    """One of our rules.

    Attributes:
        settings: what ``wpmerge fuse`` is told; the benchmark sets evaluations and seed.
        retain: whether the retain sets of the scores bind it. Rivals know of none.
    """

    settings: FuseSettings
    retain: bool = False


OURS: Mapping[str, Ours] = {
    "fuse:uniform": Ours(settings=FuseSettings(rule="uniform")),
    "fuse:scaled": Ours(settings=FuseSettings(rule="scaled")),
    "fuse:proportional": Ours(settings=FuseSettings(rule="proportional", calibrate=True)),
    "fuse:select": Ours(settings=FuseSettings(rule="select", calibrate=True)),
    "fuse:joint": Ours(settings=FuseSettings(rule="joint", calibrate=True)),
    "fuse:refine-expert": Ours(settings=FuseSettings(rule="refine", granularity="expert")),
    "fuse:refine-tensor": Ours(settings=FuseSettings(rule="refine", granularity="tensor")),
    "fuse:refine": Ours(settings=FuseSettings(rule="refine")),
    "fuse:refine+retain": Ours(settings=FuseSettings(rule="refine"), retain=True),
}
"""Strategy → rule. ``refine-expert`` is one scale per expert, found as ``refine`` finds its coefficients: what finer
coefficients add to it is not owed to prompts or search. ``refine-tensor`` is as fine as a recipe of the experts
alone can be in mergekit."""

SAME_AS_RIVALS = ("fuse:uniform", "fuse:scaled")
"""Rules whose merges are those of a rival's; run only when asked for by name."""

ALWAYS = ("uniform", "scaled", "fuse:refine-expert")
"""What is run on every seed: one scale for all, and one per expert, by search and by ``refine``'s own steps."""
