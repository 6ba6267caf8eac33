"""One entry for every rule: what each gives on a tiny scored family, and what all of them have in common."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from families import write_family, write_prompts
from test_fusing import GIVEN, SETTINGS

from wpmerge.calibration import Standing, assess, utility
from wpmerge.coefficients import RULES
from wpmerge.errors import CapabilityError, RecipeError
from wpmerge.fusing import open_scored_family, say_what_is_not_kept
from wpmerge.models import Family
from wpmerge.plan import Coefficient
from wpmerge.rules import FuseSettings, RuleOutcome, coefficients_for
from wpmerge.scores import Scores, load_scores, without_retain_sets
from wpmerge.scoring import score
from wpmerge.tuning import held_out_readings, scored_readings

NAMES = ("a", "b")


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Scores]:
    """Two experts and a retain set."""
    root = tmp_path_factory.mktemp("rules")
    models = write_family(root)
    files = {name: str(write_prompts(root / f"{name}.jsonl", seed=n)) for n, name in enumerate((*NAMES, "plain"))}
    score(
        base=str(models["base"]),
        experts={name: str(models[name]) for name in NAMES},
        capabilities={name: files[name] for name in NAMES},
        retain={"plain": files["plain"]},
        out=root / "scores",
        settings=SETTINGS,
    )
    scores = load_scores(root / "scores")
    return open_scored_family(scores, {}, device="cpu", resident=True, trust_remote_code=False), scores


def decide(scored: tuple[Family, Scores], **settings: Any) -> RuleOutcome:
    return coefficients_for(FuseSettings(**settings), *scored)


def permuted(scores: Scores, order: tuple[str, ...]) -> Scores:
    return dataclasses.replace(
        scores,
        experts={name: scores.experts[name] for name in order},
        capabilities={name: scores.capabilities[name] for name in (*order, "plain")},
    )


def same(one: Mapping[str, Coefficient], other: Mapping[str, Coefficient], tolerance: float) -> bool:
    return all(bool(((one[t].values - other[t].values).abs() <= tolerance).all()) for t in one)


@pytest.mark.parametrize("granularity", ["unit", "block", "tensor", "expert"])
@pytest.mark.parametrize("rule", RULES)
def test_every_parameter_of_every_expert_gets_a_coefficient_within_bounds(
    scored: tuple[Family, Scores], rule: str, granularity: str
) -> None:
    if (rule, granularity) == ("select", "expert"):
        pytest.skip("refused")
    scales = {"": 0.5} if rule == "uniform" else GIVEN
    found = decide(scored, rule=rule, granularity=granularity, scales=scales, steps=2, batch=4, max_coefficient=0.9)
    family = scored[0]
    assert set(found.coefficients) == set(NAMES)
    for tensors in found.coefficients.values():
        assert set(tensors) == set(family.base.tensors)
        for name, coefficient in tensors.items():
            assert bool(((coefficient.values >= 0) & (coefficient.values <= 0.9)).all()), name
            assert coefficient.expand(family.base.tensors[name].shape).ndim in (0, len(family.base.tensors[name].shape))


@pytest.mark.parametrize("rule", RULES)
def test_experts_in_another_order_get_the_same_coefficients(scored: tuple[Family, Scores], rule: str) -> None:
    settings = FuseSettings(rule=rule, scales={"": 0.5} if rule == "uniform" else GIVEN, steps=2, batch=6)  # type: ignore[arg-type]
    one = coefficients_for(settings, *scored)
    other = coefficients_for(settings, scored[0], permuted(scored[1], ("b", "a")))
    assert list(other.coefficients) == ["b", "a"]
    for name in NAMES:
        assert same(one.coefficients[name], other.coefficients[name], 1e-4), name


@pytest.mark.parametrize("rule", ["proportional", "select", "joint"])
def test_scores_of_zero_give_the_scaled_merge(scored: tuple[Family, Scores], rule: str) -> None:
    zero = dataclasses.replace(scored[1], arrays={k: torch.zeros_like(v) for k, v in scored[1].arrays.items()})
    found = coefficients_for(FuseSettings(rule=rule, scales=GIVEN), scored[0], zero)  # type: ignore[arg-type]
    scaled = coefficients_for(FuseSettings(rule="scaled", scales=GIVEN, granularity="unit"), scored[0], zero)
    for name in NAMES:
        assert same(found.coefficients[name], scaled.coefficients[name], 1e-6)


def test_an_expert_alone_is_merged_alone(scored: tuple[Family, Scores]) -> None:
    found = coefficients_for(FuseSettings(rule="proportional", scales={"": 0.7}), *scored, experts=["b"])
    assert list(found.coefficients) == ["b"]
    assert float(found.values.min()) == float(found.values.max()) == pytest.approx(0.7)
    searched = coefficients_for(FuseSettings(rule="scaled", evaluations=4), *scored, experts=["b"])
    assert searched.standing is not None and set(searched.standing.kept) == {"b"}


def test_given_numbers_run_nothing(scored: tuple[Family, Scores]) -> None:
    family, scores = scored

    def forbidden() -> Any:
        raise AssertionError("held-out prompts were read")

    for rule in ("scaled", "proportional", "select", "joint"):
        found = coefficients_for(
            FuseSettings(rule=rule, scales=GIVEN),  # type: ignore[arg-type]
            family,
            scores,
            held_out=forbidden,
            prompts=forbidden,
        )
        assert found.standing is None and found.evaluations == 0 and found.scales == GIVEN


def worth(scored: tuple[Family, Scores], outcome: RuleOutcome) -> Standing:
    family, scores = scored
    from wpmerge.calibration import merged_source

    weights = {name: family.weights[name] for name in NAMES}
    merged = merged_source(family.engine, family.weights[""], weights, outcome.coefficients)
    return assess(family.engine, merged, held_out_readings(family, scores, NAMES))


@pytest.mark.parametrize("rule", ["scaled", "proportional", "select", "joint"])
def test_calibrate_never_does_worse_than_the_defaults_and_says_what_it_chose(
    scored: tuple[Family, Scores], rule: str
) -> None:
    plain = decide(scored, rule=rule, evaluations=4)  # the common scales, where the search begins
    chosen = decide(scored, rule=rule, evaluations=30, calibrate=True)
    assert plain.standing is not None and chosen.standing is not None
    assert chosen.standing.worth() >= plain.standing.worth() - 1e-9
    assert chosen.evaluations <= 30
    assert worth(scored, chosen).worth() == pytest.approx(chosen.standing.worth(), abs=1e-4)
    own = {"proportional": {"power"}, "select": {"density", "floor"}, "joint": {"mu"}}.get(rule, set())
    assert own <= set(chosen.record)


def test_calibrate_with_given_scales_moves_only_the_rules_own_numbers(scored: tuple[Family, Scores]) -> None:
    found = decide(scored, rule="joint", scales=GIVEN, calibrate=True, evaluations=8)
    assert found.scales == GIVEN and found.evaluations > 1
    assert found.standing is not None
    grid = [decide(scored, rule="joint", scales=GIVEN, mu=mu) for mu in (0.1, 1.0, 10.0, 1e3)]
    assert found.standing.worth() >= max(worth(scored, each).worth() for each in grid) - 1e-4


@pytest.mark.parametrize("rule", ["proportional", "select", "joint"])
def test_calibrate_finds_out_scores_that_mislead(scored: tuple[Family, Scores], rule: str) -> None:
    """Each expert's best units said to be its worst: no worse than without scores, or than to trust them."""
    family, scores = scored[0], without_retain_sets(scored[1])
    wrong = dataclasses.replace(scores, arrays={key: -each for key, each in scores.arrays.items()})
    settings = FuseSettings(rule=rule, scales=GIVEN, calibrate=True, evaluations=12)  # type: ignore[arg-type]
    found = coefficients_for(settings, family, wrong)
    scaled = coefficients_for(FuseSettings(rule="scaled", scales=GIVEN), family, scores)
    trusted = coefficients_for(FuseSettings(rule=rule, scales=GIVEN), family, wrong)  # type: ignore[arg-type]
    reached, without, with_them = (utility(worth(scored, each).kept) for each in (found, scaled, trusted))
    assert reached >= without - 1e-2
    assert reached >= with_them - 1e-6


def test_refine_starts_from_the_scales_and_is_never_worse(scored: tuple[Family, Scores]) -> None:
    found = decide(scored, rule="refine", scales=GIVEN, steps=4, batch=6)
    assert found.refined is not None and found.standing is not None
    start = decide(scored, rule="scaled", scales=GIVEN)
    assert found.refined.checks[0].worth == pytest.approx(utility(worth(scored, start).kept), abs=1e-4)
    assert found.refined.checks[found.refined.best].worth >= found.refined.checks[0].worth
    assert worth(scored, found).kept == pytest.approx(dict(found.standing.kept), abs=1e-4)
    assert found.record["best_check"] == found.refined.best


def test_retain_sets_are_read_with_the_rest_and_may_be_missing(scored: tuple[Family, Scores]) -> None:
    family, scores = scored
    readings = held_out_readings(family, scores, NAMES)
    assert set(readings) == {"a", "b", "plain"} and readings["plain"].retain
    steps = scored_readings(family, scores, NAMES)
    assert set(steps) == set(readings)
    for name, reading in steps.items():
        assert reading.readout.items <= len(scores.capabilities[name].scored)
        assert reading.retain is (name == "plain")
    bare = without_retain_sets(scores)
    assert "plain" in scores.readouts and not any("plain" in each for each in (*bare.readouts, *bare.arrays))
    for rule in ("scaled", "joint", "refine"):
        found = coefficients_for(FuseSettings(rule=rule, evaluations=3, steps=1, batch=3), family, bare)  # type: ignore[arg-type]
        assert found.standing is not None and found.standing.lost == {}


def test_scales_are_searched_within_what_a_retain_set_may_lose(scored: tuple[Family, Scores]) -> None:
    family, scores = scored
    settings = FuseSettings(rule="scaled", evaluations=16)
    free = worth(scored, coefficients_for(settings, family, without_retain_sets(scores)))
    kept = decide(scored, rule="scaled", evaluations=16).standing
    assert kept is not None
    assert kept.lost["plain"] < free.lost["plain"]
    assert utility(free.kept) >= utility(kept.kept)


def test_a_tight_tolerance_keeps_joint_from_what_a_retain_set_loses(scored: tuple[Family, Scores]) -> None:
    """At the scales the first-order loss is above the tolerance; joint's prediction keeps to it."""
    family, scores = scored
    losing = {key: -each if "/plain/" in key else each for key, each in scores.arrays.items()}

    def joint(tolerance: float) -> RuleOutcome:
        settings = FuseSettings(rule="joint", scales=GIVEN, tolerance=tolerance)
        return coefficients_for(settings, family, dataclasses.replace(scores, arrays=losing))

    loose = joint(1e3)
    assert loose.joint is not None
    limit = 0.5 * float(loose.joint.lost[0])
    tight = joint(limit)
    assert tight.joint is not None
    assert float(tight.joint.lost[0]) <= limit * (1 + 1e-3)
    assert tight.joint.residual < 1e-4 and loose.joint.residual < 1e-4
    assert float(loose.joint.lost[0]) > limit, "without a price the set loses more"
    assert float(tight.joint.prices[0]) > 0
    assert not torch.allclose(tight.values, loose.values)


def test_a_retain_set_that_loses_too_much_is_named(
    scored: tuple[Family, Scores], caplog: pytest.LogCaptureFixture
) -> None:
    found = decide(scored, rule="scaled", evaluations=3)
    assert found.standing is not None
    limit = found.standing.most["plain"]
    assert limit > found.standing.lost["plain"]
    assert limit > 0
    assert dataclasses.replace(found, tolerance=0.9 * limit).beyond == {"plain": limit}
    assert dataclasses.replace(found, tolerance=1.1 * limit).beyond == {}
    unread = decide(scored, rule="scaled", scales=GIVEN)
    assert unread.beyond == {}
    for outcome, said in (
        (found, ""),
        (dataclasses.replace(found, tolerance=0.9 * limit), f"the merge loses up to {limit:.3g} nats"),
        (unread, "the retain set plain was not read"),
    ):
        caplog.clear()
        say_what_is_not_kept(scored[1], dataclasses.replace(outcome, tolerance=2 * limit) if not said else outcome)
        assert said in caplog.text and bool(said) is bool(caplog.text)


def test_joint_needs_cross_effects(scored: tuple[Family, Scores]) -> None:
    family, scores = scored
    own = {key: value for key, value in scores.arrays.items() if key.split("/")[1] == key.split("/")[2]}
    with pytest.raises(RecipeError, match="does to every capability") as caught:
        coefficients_for(FuseSettings(rule="joint", scales=GIVEN), family, dataclasses.replace(scores, arrays=own))
    assert "effects of b on a" in str(caught.value) and "--cross" in str(caught.value)


def only_kinds(scores: Scores, *kinds: str) -> Scores:
    return dataclasses.replace(
        scores, arrays={key: array for key, array in scores.arrays.items() if key.rpartition("/")[2] in kinds}
    )


@pytest.mark.parametrize("rule", ["proportional", "select", "joint"])
def test_a_rule_of_scores_needs_scores(scored: tuple[Family, Scores], rule: str) -> None:
    family, scores = scored
    with pytest.raises(RecipeError, match="nothing that this rule could weigh"):
        coefficients_for(FuseSettings(rule=rule, scales=GIVEN), family, only_kinds(scores, "layer"))  # type: ignore[arg-type]


def test_groups_without_a_score_are_counted_and_take_the_scale(scored: tuple[Family, Scores]) -> None:
    family, scores = scored
    found = coefficients_for(FuseSettings(rule="proportional", scales=GIVEN), family, only_kinds(scores, "head"))
    heads = family.layout.shape("head")[0] * family.layout.shape("head")[1]
    assert found.unscored == found.record["groups without a score"] == len(found.grouping.names) - heads
    unscored = found.own.isnan().any(dim=0)
    for number, name in enumerate(found.scales):
        assert bool((found.values[number, unscored] == GIVEN[name]).all())
    assert coefficients_for(FuseSettings(rule="scaled", scales=GIVEN), family, scores).unscored == 0


def test_an_expert_that_is_no_better_on_other_prompts_is_refused(scored: tuple[Family, Scores]) -> None:
    family, scores = scored
    record = scores.capabilities["a"]
    held = scores.capabilities["plain"].held_out  # the base's own replies
    changed = dataclasses.replace(
        scores, capabilities={**scores.capabilities, "a": record.model_copy(update={"held_out": held})}
    )
    with pytest.raises(CapabilityError, match="the expert a is no better than the base"):
        coefficients_for(FuseSettings(evaluations=1), family, changed)


def test_a_tolerance_of_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="tolerance is out of range"):
        FuseSettings(tolerance=0.0)


def test_prompts_of_the_callers_own_are_used(scored: tuple[Family, Scores], tmp_path: Path) -> None:
    """As the benchmark does: nothing else is looked at."""
    family, scores = scored
    bare = dataclasses.replace(
        scores,
        capabilities={
            name: record.model_copy(
                update={"held_out": record.held_out.model_copy(update={"sequences": ()}), "scored": ()}
            )
            for name, record in scores.capabilities.items()
        },
    )
    readings = held_out_readings(family, scores, NAMES)
    found = coefficients_for(
        FuseSettings(rule="refine", steps=2, batch=3, evaluations=2),
        family,
        bare,
        held_out=lambda: readings,
        prompts=lambda: readings,
    )
    assert found.refined is not None and set(found.refined.standing.kept) == set(NAMES)
