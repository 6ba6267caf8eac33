"""Results of a benchmark → retention and differences, with intervals paired by prompt and seed. Pure.

Retention of a skill is (merged − base) / (expert − base), of the share of correct replies and of the log-probability
of reference replies, over the prompts of all seeds together. A bootstrap draw takes prompts (each belongs to one seed)
with replacement, the same for base, expert and every strategy, so differences between strategies are paired.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from wpmerge.bench_results import BASE_MODEL, EXPERT_MODEL, Key, Record
from wpmerge.statistics import (
    RESAMPLES,
    Interval,
    Outcomes,
    bootstrap_scores,
    mean_score,
    percentile_interval,
    retained_fraction,
)

Measure = Literal["generated", "logprob"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyRow:
    """One strategy on one subset.

    Attributes:
        strategy: its name.
        skills: skill → retention.
        mean: over skills.
        minimum: the worst skill's.
        mean_difference: mean minus the reference strategy's with the best mean; None for that strategy.
        minimum_difference: minimum minus the reference strategy's with the best minimum; None for that strategy.
        scores: skill → what the merge itself scored: share correct, or nats per token.
        retain: nats per token on the base's own replies to the retain prompts, minus the base's; None without prompts.
        evaluations: used in tuning, the most over seeds.
        parameters: seed → what tuning chose.
    """

    strategy: str
    skills: Mapping[str, Interval]
    mean: Interval
    minimum: Interval
    mean_difference: Interval | None
    minimum_difference: Interval | None
    scores: Mapping[str, float]
    retain: Interval | None
    evaluations: int
    parameters: Mapping[int, Mapping[str, object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """All strategies on one subset of experts, by one measure.

    Attributes:
        subset: the experts.
        measure: "generated": share of correct replies; "logprob": of the reference replies.
        seeds: those that every strategy here has finished.
        prompts: skill → test prompts, all seeds.
        base: skill → the base's score.
        expert: skill → its own expert's score.
        best_mean: the rival that means are compared with: the one with the best mean *here*, in the rivals' favour.
        best_minimum: the same for minima.
        rows: one per strategy, in the order they were asked for.
    """

    subset: tuple[str, ...]
    measure: Measure
    seeds: tuple[int, ...]
    prompts: Mapping[str, int]
    base: Mapping[str, float]
    expert: Mapping[str, float]
    best_mean: str
    best_minimum: str
    rows: tuple[StrategyRow, ...]


def make_cell(
    records: Mapping[Key, Record],
    subset: Sequence[str],
    strategies: Sequence[str],
    *,
    rivals: Sequence[str],
    measure: Measure,
    seeds: Sequence[int],
    resamples: int = RESAMPLES,
) -> Cell | None:
    """The table of one subset; None where nothing is finished, or nothing was judged.

    Args:
        records: finished work.
        subset: the experts.
        strategies: those to show; without a finished seed a strategy is left out.
        rivals: candidates for the strategy that differences are taken to.
        measure: which outcomes.
        seeds: those of the benchmark.
        resamples: bootstrap draws.
    """
    subset = tuple(subset)
    shown = [name for name in strategies if any((subset, name, seed) in records for seed in seeds)]
    needed = [(subset, name) for name in shown] + [((), BASE_MODEL)] + [((e,), EXPERT_MODEL) for e in subset]
    common = tuple(seed for seed in seeds if all((*key, seed) in records for key in needed))
    view = _View(records=records, subset=subset, seeds=common, measure=measure)
    if not shown or not common or not all(len(view.outcomes((), BASE_MODEL, skill).trials) for skill in subset):
        return None
    values, draws = _retentions(view, shown, resamples)
    among = [shown.index(name) for name in rivals if name in shown] or list(range(len(shown)))
    best = (_best(values.mean(axis=1), among), _best(values.min(axis=1), among))
    return Cell(
        subset=subset,
        measure=measure,
        seeds=common,
        prompts={skill: len(view.outcomes((), BASE_MODEL, skill).trials) for skill in subset},
        base={skill: view.score((), BASE_MODEL, skill) for skill in subset},
        expert={skill: view.score((skill,), EXPERT_MODEL, skill) for skill in subset},
        best_mean=shown[best[0]],
        best_minimum=shown[best[1]],
        rows=tuple(_row(view, name, i, best, values, draws, resamples) for i, name in enumerate(shown)),
    )


def finalists(
    tuned: Mapping[str, Mapping[str, float]], *, rivals: Sequence[str], always: Sequence[str], count: int
) -> tuple[str, ...]:
    """The strategies worth more seeds: the best rivals and the best others, by mean and by minimum.

    Args:
        tuned: strategy → skill → retention on the tuning prompts.
        rivals: names; every other strategy is a rule, or a control, named ``rule/control``, that goes with its rule.
        always: strategies that go on however they did.
        count: the best so many rivals by mean and as many by minimum; of rules alike.

    Returns:
        In the order of ``tuned``.
    """
    chosen = set(always)
    rules = [name for name in tuned if name not in rivals and "/" not in name]
    for group in ([name for name in tuned if name in rivals], rules):
        means = {name: sum(tuned[name].values()) / len(tuned[name]) for name in group}
        minima = {name: min(tuned[name].values()) for name in group}
        for values in (means, minima):
            chosen |= set(sorted(values, key=values.__getitem__, reverse=True)[:count])
    return tuple(name for name in tuned if name.partition("/")[0] in chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """The finished work that a cell is about."""

    records: Mapping[Key, Record]
    subset: tuple[str, ...]
    seeds: tuple[int, ...]
    measure: Measure

    def of(self, strategy: str) -> list[Record]:
        """A strategy's records, seed by seed."""
        return [self.records[self.subset, strategy, seed] for seed in self.seeds]

    def outcomes(self, subset: tuple[str, ...], strategy: str, skill: str) -> Outcomes:
        """Per prompt, seed after seed."""
        found: list[float] = []
        for seed in self.seeds:
            result = self.records[subset, strategy, seed].skills[skill]
            found += [float(bit) for bit in result.correct] if self.measure == "generated" else list(result.logprob)
        return Outcomes(successes=np.array(found), trials=np.ones(len(found)))

    def score(self, subset: tuple[str, ...], strategy: str, skill: str) -> float:
        """Share correct, or nats per token."""
        return mean_score(self.outcomes(subset, strategy, skill))


def _row(
    view: _View,
    name: str,
    i: int,
    best: tuple[int, int],
    values: Float[np.ndarray, "strategies skills"],
    draws: Float[np.ndarray, "strategies skills resamples"],
    resamples: int,
) -> StrategyRow:
    means, minima = values.mean(axis=1), values.min(axis=1)
    mean_draws, minimum_draws = draws.mean(axis=1), draws.min(axis=1)
    skills = enumerate(view.subset)
    return StrategyRow(
        strategy=name,
        skills={skill: percentile_interval(float(values[i, k]), draws[i, k]) for k, skill in skills},
        mean=percentile_interval(float(means[i]), mean_draws[i]),
        minimum=percentile_interval(float(minima[i]), minimum_draws[i]),
        mean_difference=_difference(means, mean_draws, i, best[0]),
        minimum_difference=_difference(minima, minimum_draws, i, best[1]),
        scores={skill: view.score(view.subset, name, skill) for skill in view.subset},
        retain=_retain(view, name, resamples),
        evaluations=max(record.evaluations for record in view.of(name)),
        parameters={record.seed: dict(record.parameters) for record in view.of(name)},
    )


def _best(values: Float[np.ndarray, " strategies"], among: Sequence[int]) -> int:
    return max(among, key=lambda i: -np.inf if np.isnan(values[i]) else values[i])


def _difference(
    values: Float[np.ndarray, " strategies"], draws: Float[np.ndarray, "strategies resamples"], one: int, other: int
) -> Interval | None:
    if one == other:
        return None
    return percentile_interval(float(values[one] - values[other]), draws[one] - draws[other])


def _retentions(
    view: _View, shown: Sequence[str], resamples: int
) -> tuple[Float[np.ndarray, "strategies skills"], Float[np.ndarray, "strategies skills resamples"]]:
    """Retention per strategy and skill, and its bootstrap draws; NaN where the expert is no better than the base."""
    values, draws = [], []
    for number, skill in enumerate(view.subset):
        wanted = [((), BASE_MODEL), ((skill,), EXPERT_MODEL), *((view.subset, name) for name in shown)]
        outcomes = [view.outcomes(*key, skill) for key in wanted]
        scores = np.array([[mean_score(each)] for each in outcomes])
        values.append(retained_fraction(scores[0], scores[1], scores[2:])[:, 0])
        drawn = bootstrap_scores(outcomes, resamples=resamples, seed=number)
        draws.append(retained_fraction(drawn[0], drawn[1], drawn[2:]))
    return np.stack(values, axis=1), np.stack(draws, axis=1)


def _retain(view: _View, strategy: str, resamples: int) -> Interval | None:
    """Mean difference to the base on its own replies, over the prompts of all seeds."""
    base = [value for seed in view.seeds for value in view.records[(), BASE_MODEL, seed].retain]
    merged = [value for record in view.of(strategy) for value in record.retain]
    if not base or len(merged) != len(base):
        return None
    differences = np.array(merged) - np.array(base)
    outcome = Outcomes(successes=differences, trials=np.ones(len(differences)))
    return percentile_interval(float(differences.mean()), bootstrap_scores([outcome], resamples=resamples)[0])
