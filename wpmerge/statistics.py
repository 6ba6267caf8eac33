"""Standard errors, paired bootstrap intervals and retention, on outcomes per document. Pure numpy, seeded.

A score is a ratio of sums over documents, Σ successes / Σ trials: one trial a document for accuracy, several for
IFEval's instruction level. The document is what was sampled, so it is what standard errors and the bootstrap resample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

RESAMPLES = 10_000
CONFIDENCE = 0.95
_CHUNK_ELEMENTS = 4_000_000  # bounds the bootstrap's weights to 32 MB at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """What each document contributed to a score.

    Attributes:
        successes: summed credit of the document's trials.
        trials: how many were judged; 0 where the metric does not apply to the document.
        strata: sizes of the document sets they are pooled from, in order; documents are resampled within their own.
            () is one set.
    """

    successes: Float[np.ndarray, " documents"]
    trials: Float[np.ndarray, " documents"]
    strata: tuple[int, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the document sets, in order: outcomes with the same can be drawn together."""
        return self.strata or (len(self.trials),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with its bootstrap percentile interval; bounds are NaN where the bootstrap leaves it undefined.

    Attributes:
        value: the estimate on the documents as they are.
        low: lower bound.
        high: upper bound.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SkillOutcomes:
    """One skill, as base, expert and merge did on the same documents.

    Attributes:
        documents: names the document set; skills with the same name are resampled together.
        base, expert, merged: outcomes per document, in the same order.
    """

    documents: str
    base: Outcomes
    expert: Outcomes
    merged: Outcomes


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """(merged − base) / (expert − base) per skill: 0 is the base, 1 the expert. NaN where the expert is no better.

    Attributes:
        skills: retention of each skill.
        mean: mean over skills.
        minimum: the worst skill's.
    """

    skills: Mapping[str, Interval]
    mean: Interval
    minimum: Interval


def mean_score(outcomes: Outcomes) -> float:
    """Σ successes / Σ trials, a fraction; NaN when nothing was judged."""
    trials = float(outcomes.trials.sum())
    return float(outcomes.successes.sum()) / trials if trials else float("nan")


def standard_error(outcomes: Outcomes) -> float:
    """Standard error of :func:`mean_score` with documents as clusters (linearised ratio estimator; Cochran, Sampling
    Techniques, section 6.4).

    With one trial a document it is s/√n, as lm-eval reports it. Documents without a trial are left out. NaN with fewer
    than two documents. Strata are not looked at.
    """
    judged = outcomes.trials > 0
    documents = int(judged.sum())
    if documents < 2:
        return float("nan")
    residuals = outcomes.successes[judged] - mean_score(outcomes) * outcomes.trials[judged]
    variance = documents / (documents - 1) * float(residuals @ residuals)
    return float(np.sqrt(variance)) / float(outcomes.trials.sum())


def pooled(parts: Sequence[Outcomes], *, by_size: bool) -> Outcomes:
    """Outcomes of several document sets as one, whose score is the mean of theirs.

    Args:
        parts: one set's outcomes each.
        by_size: weigh each score by its set's documents; otherwise all count the same.
    """
    scales = []
    for part in parts:
        trials = float(part.trials.sum())
        scales.append((len(part.trials) if by_size else 1) / trials if trials else float("nan"))
    return Outcomes(
        successes=np.concatenate([part.successes * scale for part, scale in zip(parts, scales, strict=True)]),
        trials=np.concatenate([part.trials * scale for part, scale in zip(parts, scales, strict=True)]),
        strata=tuple(size for part in parts for size in part.sizes),
    )


def bootstrap_scores(
    outcomes: Sequence[Outcomes], *, resamples: int = RESAMPLES, seed: int = 0
) -> Float[np.ndarray, "scores resamples"]:
    """Scores on documents drawn with replacement, the same draw for all ``outcomes``; NaN where a draw has no trial.

    Pooled sets keep their sizes: documents are drawn within each.

    Raises:
        ValueError: the outcomes are not of the same documents.
    """
    documents = len(outcomes[0].trials)
    sizes = outcomes[0].sizes
    found = [(len(each.successes), len(each.trials), each.sizes) for each in outcomes]
    if any(each != (documents, documents, sizes) for each in found):
        raise ValueError("paired outcomes need the same documents")
    generator = np.random.default_rng(seed)
    successes = np.stack([each.successes for each in outcomes])
    trials = np.stack([each.trials for each in outcomes])
    scores = np.empty((len(outcomes), resamples))
    chunk = max(1, _CHUNK_ELEMENTS // documents)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = [generator.multinomial(n, np.full(n, 1 / n), size=size) for n in sizes]
        weights = np.concatenate(drawn, axis=1).T.astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            scores[:, start : start + size] = (successes @ weights) / (trials @ weights)
    return scores


def percentile_interval(
    value: float, draws: Float[np.ndarray, " resamples"], confidence: float = CONFIDENCE
) -> Interval:
    """``value`` with the central ``confidence`` of the bootstrap's draws; bounds are NaN when more of the draws than
    ``1 − confidence`` are."""
    defined = draws[~np.isnan(draws)]
    if len(defined) < confidence * len(draws):
        return Interval(value=value, low=float("nan"), high=float("nan"))
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Interval(value=value, low=float(low), high=float(high))


def retention(
    skills: Mapping[str, SkillOutcomes],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Retention:
    """Retention of each skill, its mean and its minimum, with paired bootstrap intervals.

    An interval is NaN where an expert is no better than its base in more than ``1 − confidence`` of the resamples: the
    ratio then has no meaning. Mean and minimum are NaN if any skill's retention is.

    Raises:
        ValueError: no skills, or a skill's outcomes are not of the same documents.
    """
    if not skills:
        raise ValueError("retention needs at least one skill")
    seeds: dict[str, int] = {}
    paired: dict[tuple[str, tuple[int, ...]], dict[str, list[Outcomes]]] = {}
    for name, skill in skills.items():
        seeds.setdefault(skill.documents, seed + len(seeds))
        same = paired.setdefault((skill.documents, skill.base.sizes), {})  # a group's metrics may cover fewer tasks
        same[name] = [skill.base, skill.expert, skill.merged]
    values: dict[str, float] = {}
    draws: dict[str, Float[np.ndarray, " resamples"]] = {}
    for (documents, _), triples in paired.items():
        outcomes = [each for triple in triples.values() for each in triple]
        scores = bootstrap_scores(outcomes, resamples=resamples, seed=seeds[documents])
        for (name, triple), drawn in zip(triples.items(), scores.reshape(len(triples), 3, -1), strict=True):
            values[name] = retained_fraction(*(np.array(mean_score(each)) for each in triple)).item()
            draws[name] = retained_fraction(*drawn)
    table, samples = np.array([values[name] for name in skills]), np.stack([draws[name] for name in skills])
    return Retention(
        skills={name: percentile_interval(values[name], draws[name], confidence) for name in skills},
        mean=percentile_interval(float(table.mean()), samples.mean(axis=0), confidence),
        minimum=percentile_interval(float(table.min()), samples.min(axis=0), confidence),
    )


def retained_fraction(
    base: Float[np.ndarray, "*resamples"],
    expert: Float[np.ndarray, "*resamples"],
    merged: Float[np.ndarray, "*merges"],
) -> Float[np.ndarray, "*merges"]:
    """(merged − base) / (expert − base), for one merge or, with a leading axis, several; NaN where the expert is no
    better than the base."""
    gap = expert - base
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(gap <= 0, np.nan, (merged - base) / gap)
