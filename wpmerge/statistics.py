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
    """

    successes: Float[np.ndarray, " documents"]
    trials: Float[np.ndarray, " documents"]


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
    than two documents.
    """
    judged = outcomes.trials > 0
    documents = int(judged.sum())
    if documents < 2:
        return float("nan")
    residuals = outcomes.successes[judged] - mean_score(outcomes) * outcomes.trials[judged]
    variance = documents / (documents - 1) * float(residuals @ residuals)
    return float(np.sqrt(variance)) / float(outcomes.trials.sum())


def bootstrap_scores(
    outcomes: Sequence[Outcomes], *, resamples: int = RESAMPLES, seed: int = 0
) -> Float[np.ndarray, "scores resamples"]:
    """Scores on documents drawn with replacement, the same draw for all ``outcomes``; NaN where a draw has no trial.

    Raises:
        ValueError: the outcomes are not of the same documents.
    """
    documents = len(outcomes[0].trials)
    if any(len(each.trials) != documents or len(each.successes) != documents for each in outcomes):
        raise ValueError("paired outcomes need the same documents")
    generator = np.random.default_rng(seed)
    successes = np.stack([each.successes for each in outcomes])
    trials = np.stack([each.trials for each in outcomes])
    scores = np.empty((len(outcomes), resamples))
    chunk = max(1, _CHUNK_ELEMENTS // documents)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        weights = generator.multinomial(documents, np.full(documents, 1 / documents), size=size).T.astype(float)
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


def paired_difference(
    model: Outcomes,
    reference: Outcomes,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Score of ``model`` minus score of ``reference`` on the same documents, with its paired bootstrap interval.

    Raises:
        ValueError: the outcomes are not of the same documents.
    """
    scores = bootstrap_scores([model, reference], resamples=resamples, seed=seed)
    return percentile_interval(mean_score(model) - mean_score(reference), scores[0] - scores[1], confidence)


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
    values, draws = [], []
    seeds = {name: seed + index for index, name in enumerate(dict.fromkeys(s.documents for s in skills.values()))}
    for skill in skills.values():
        triple = [skill.base, skill.expert, skill.merged]
        values.append(_recovered(*(np.array(mean_score(each)) for each in triple)).item())
        draws.append(_recovered(*bootstrap_scores(triple, resamples=resamples, seed=seeds[skill.documents])))
    table, samples = np.array(values), np.stack(draws)
    return Retention(
        skills={
            name: percentile_interval(values[index], samples[index], confidence) for index, name in enumerate(skills)
        },
        mean=percentile_interval(float(table.mean()), samples.mean(axis=0), confidence),
        minimum=percentile_interval(float(table.min()), samples.min(axis=0), confidence),
    )


def _recovered(
    base: Float[np.ndarray, "*resamples"],
    expert: Float[np.ndarray, "*resamples"],
    merged: Float[np.ndarray, "*resamples"],
) -> Float[np.ndarray, "*resamples"]:
    """Fraction of the gap; NaN where the expert is no better than the base."""
    gap = expert - base
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(gap <= 0, np.nan, (merged - base) / gap)
