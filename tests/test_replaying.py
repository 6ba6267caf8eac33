"""A plan read backwards is what was laid out, for every architecture and granularity."""

from dataclasses import replace

import pytest
import torch
from reports import model
from test_fusing import GIVEN
from test_rules import decide, scored
from tiny import CONFIGS, ModelWeights, tiny_model

from wpmerge.arch import KINDS
from wpmerge.coefficients import make_grouping, tensor_coefficients
from wpmerge.explaining import explain_many
from wpmerge.plan import Plan, load_plan
from wpmerge.replaying import outcome_of_plan, unit_coefficients
from wpmerge.rules import FuseSettings
from wpmerge.scores import Scores

__all__ = ["scored"]  # the fixture


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_unit_has_its_coefficient(kind):
    layout = ModelWeights.of(tiny_model(kind, seed=0)).layout
    grouping = make_grouping(layout, "unit")
    values = torch.rand(len(grouping.names), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = Plan(
        base=model("base"),
        experts={"a": model("a")},
        coefficients={"a": tensor_coefficients(layout, grouping, values)},
        rule="refine",
        granularity="unit",
    )
    scores = Scores(
        base=model("base"),
        experts={"a": model("a")},
        model_type=kind,
        layers=layout.layers,
        counts={str(each): count for each, count in layout.counts.items()},
        labels={str(each): names for each in layout.counts if (names := layout.labels(each)) is not None},
        capabilities={},
        readouts={},
        arrays={},
        provenance={},
    )
    known = dict(zip(grouping.names, values.float().tolist(), strict=True))
    for each in KINDS:
        found = unit_coefficients(plan, scores, "a", each)
        if each not in layout.counts:
            assert found is None
            continue
        assert found is not None
        wanted = [known[str(unit)] for unit in layout.units(each)]
        assert found.flatten().tolist() == pytest.approx(wanted)
    assert unit_coefficients(plan, scores, "a", "attention") is None


def plan_of(scored, outcome, settings: FuseSettings) -> Plan:
    scores = scored[1]
    return Plan(
        base=scores.base,
        experts=dict(scores.experts),
        coefficients=outcome.coefficients,
        rule=settings.rule,
        granularity=settings.level,
        provenance={"settings": {"max_coefficient": settings.max_coefficient}, **outcome.record},
    )


@pytest.mark.parametrize(
    ("rule", "granularity"),
    [
        ("scaled", None),
        ("uniform", None),
        ("proportional", "unit"),
        ("select", "tensor"),
        ("refine", "unit"),
        ("refine", "tensor"),
        ("refine", "block"),
        ("refine", "expert"),
    ],
)
def test_the_sentence_of_a_plan_is_that_of_its_making(scored, rule, granularity, tmp_path):
    scales = {"a": 0.5, "b": 0.5} if rule == "uniform" else GIVEN
    outcome = decide(scored, rule=rule, granularity=granularity, scales=scales, steps=2, batch=4)
    settings = FuseSettings(rule=rule, granularity=granularity)
    plan_of(scored, outcome, settings).save(tmp_path)
    again = outcome_of_plan(load_plan(tmp_path), scored[1], scored[0].layout)
    assert again is not None
    torch.testing.assert_close(again.values, outcome.values, rtol=1e-6, atol=1e-6)
    names = ["head.1.2", "neuron.2.7", "embedding"]
    assert explain_many(again, scored[0].layout, names) == explain_many(outcome, scored[0].layout, names)


def test_the_factors_of_a_plan_are_those_of_its_making(scored):
    outcome = decide(scored, rule="refine", scales=GIVEN, steps=1, batch=2)
    held = replace(outcome, factors=dict.fromkeys(GIVEN, 0.5))
    again = outcome_of_plan(plan_of(scored, held, FuseSettings()), scored[1], scored[0].layout)
    assert again is not None and dict(again.factors) == held.factors
    assert explain_many(again, scored[0].layout, ["head.0.1"]) == explain_many(held, scored[0].layout, ["head.0.1"])


def test_what_a_plan_does_not_keep_is_left_out_of_its_sentence(scored):
    outcome = decide(scored, rule="joint", granularity="unit", scales=GIVEN)
    again = outcome_of_plan(plan_of(scored, outcome, FuseSettings(rule="joint")), scored[1], scored[0].layout)
    assert again is not None and again.joint is None
    found, made = (explain_many(each, scored[0].layout, ["head.0.1"])["head.0.1"] for each in (again, outcome))
    for text, whole in zip(found, made, strict=True):
        assert text.partition(": joint, ")[0] == whole.partition(": joint, ")[0]
        assert text.partition("; ")[2] == whole.partition("; ")[2]
        assert "moved" in text and "clipped" in text


def test_a_plan_that_no_rule_made_has_no_grounds(scored):
    outcome = decide(scored, rule="scaled", scales=GIVEN)
    plan = plan_of(scored, outcome, FuseSettings(rule="scaled"))
    odd = Plan(base=plan.base, experts=plan.experts, coefficients=plan.coefficients, rule="by hand", granularity="unit")
    assert outcome_of_plan(odd, scored[1], scored[0].layout) is None
