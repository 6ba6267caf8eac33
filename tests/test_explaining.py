"""The numbers behind one coefficient: those in the sentence are those of the outcome and the scores."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from test_fusing import GIVEN
from test_rules import decide, scored

from wpmerge.errors import RecipeError
from wpmerge.explaining import check_names, explain
from wpmerge.models import Family
from wpmerge.rules import RuleOutcome
from wpmerge.scores import Scores

__all__ = ["scored"]  # the fixture

NUMBER = r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"


def sentences(scored: tuple[Family, Scores], name: str, **settings: Any) -> tuple[RuleOutcome, dict[str, str]]:
    outcome = decide(scored, **settings)
    found = explain(outcome, scored[0].layout, name)
    assert all("\n" not in text for text in found)
    return outcome, dict(zip(outcome.scales, found, strict=True))


def group(outcome: RuleOutcome, name: str) -> int:
    return outcome.grouping.names.index(name)


@pytest.mark.parametrize("rule", ["scaled", "proportional", "select", "joint", "refine"])
@pytest.mark.parametrize("unit", ["head.1.2", "neuron.2.7", "embedding"])
def test_every_number_is_there(scored: tuple[Family, Scores], rule: str, unit: str) -> None:
    outcome, found = sentences(scored, unit, rule=rule, granularity="unit", scales=GIVEN, steps=2, batch=4)
    place = group(outcome, unit)
    scores = scored[1]
    kind, layer, index = (*unit.split("."), "0", "0")[:3]
    for number, (name, text) in enumerate(found.items()):
        other = "b" if name == "a" else "a"
        stated = re.match(rf"{name} gets ({NUMBER}) at {re.escape(unit)} \(([\d,]+) parameters\): {rule}, ", text)
        assert stated and float(stated[1]) == pytest.approx(float(outcome.values[number, place]), rel=1e-3, abs=1e-9)
        own = float(scores.array(name, name, kind)[int(layer), int(index)])  # type: ignore[arg-type]
        cross = float(scores.array(other, name, kind)[int(layer), int(index)])  # type: ignore[arg-type]
        kept = float(scores.array("plain", name, kind)[int(layer), int(index)])  # type: ignore[arg-type]
        assert f"{name} {own:.3g}" in text.split("recovery of each expert's own capability: ")[1]
        assert f"of the others' from {name}: {other} {cross:.3g}" in text
        assert f"nats per token on retain sets from {name}: plain {kept:.3g}" in text
        assert f"{GIVEN[name]:.4g}" in text


def test_proportional_shows_its_sum(scored: tuple[Family, Scores]) -> None:
    outcome, found = sentences(scored, "head.0.1", rule="proportional", scales=GIVEN)
    place = group(outcome, "head.0.1")
    strength = outcome.own[:, place].clamp_min(0) ** 0.5
    for number, (name, text) in enumerate(found.items()):
        if float(strength.sum()) == 0:
            assert "no expert's score here is positive" in text
            continue
        value = GIVEN[name] * 2 * float(strength[number] / strength.sum())
        assert f"= {value:.4g} with p = 0.5" in text
        assert ("clipped to 1.5" in text) is (value > 1.5)


def test_clipping_is_said(scored: tuple[Family, Scores]) -> None:
    said = set()
    for rule in ("scaled", "proportional", "refine"):
        outcome, found = sentences(
            scored, "head.0.1", rule=rule, granularity="unit", scales=GIVEN, steps=3, batch=6, max_coefficient=0.8
        )
        for number, text in enumerate(found.values()):
            value = float(outcome.values[number, group(outcome, "head.0.1")])
            if "clipped to 0.8" in text:
                said.add("clipped")
                assert value == pytest.approx(0.8)
            elif "not clipped" in text:
                said.add("not clipped")
                assert 0 <= value <= 0.8
    assert said == {"clipped", "not clipped"}


def test_refine_adds_up(scored: tuple[Family, Scores]) -> None:
    outcome, found = sentences(scored, "neuron.1.3", rule="refine", scales=GIVEN, steps=4, batch=6)
    assert max(outcome.factors.values()) > 0
    for number, (expert, text) in enumerate(found.items()):
        if outcome.factors.get(expert) == 0:
            assert "times 0 for the retain sets" in text and not outcome.values[number].any()
            continue
        parts = re.search(rf"from ({NUMBER}) by ({NUMBER}) = ({NUMBER})", text)
        assert parts
        start, added, total = map(float, parts.groups())
        assert start == GIVEN[expert] and start + added == pytest.approx(total, abs=0.01)
        held = re.search(rf", then times ({NUMBER}) for the retain sets", text)
        assert (held is None) is (expert not in outcome.factors)
        factor = float(held[1]) if held else 1.0
        assert float(outcome.values[number, group(outcome, "neuron.1.3")]) == pytest.approx(factor * total, abs=2e-3)


def test_refine_tells_of_factors_and_bounds(scored: tuple[Family, Scores]) -> None:
    outcome = decide(scored, rule="refine", scales=GIVEN, steps=0)
    first, second = GIVEN
    values, place = outcome.values.clone(), group(outcome, "neuron.1.3")
    values[:, place] = torch.tensor([0.75, 0.0])
    held = dataclasses.replace(outcome, values=values, factors={first: 0.5, second: 0.0})
    one, other = explain(held, scored[0].layout, "neuron.1.3")
    assert f"from {GIVEN[first]:.4g} by {1.5 - GIVEN[first]:+.3g} = 1.5, clipped to 1.5, then times 0.5 for the" in one
    assert f"from {GIVEN[second]:.4g}, then times 0 for the retain sets;" in other


def test_coarser_groups_are_found_by_their_units(scored: tuple[Family, Scores]) -> None:
    outcome = decide(scored, rule="joint", granularity="tensor", scales=GIVEN)
    found = explain(outcome, scored[0].layout, "head.1.2")
    tensors = [f"model.layers.1.self_attn.{name}.weight" for name in ("o_proj", "q_proj")]
    assert len(found) == 4 and all(f" at {tensors[i // 2]} " in text for i, text in enumerate(found))
    assert explain(outcome, scored[0].layout, tensors[1]) == found[2:]
    whole = decide(scored, rule="scaled", scales=GIVEN)
    assert len(explain(whole, scored[0].layout, "neuron.0.0")) == 2


def test_what_does_not_exist_is_refused_before_anything_runs(scored: tuple[Family, Scores]) -> None:
    layout = scored[0].layout
    check_names(["head.0.1", "embedding"], layout, "unit")
    check_names([], layout, "unit")
    for name in ("head.9.9", "lion", "model.layers.0.mlp"):
        with pytest.raises(RecipeError, match="no such unit to explain") as caught:
            check_names([name], layout, "unit")
        assert name in str(caught.value) and "head.0.0" in str(caught.value)
    check_names(["model.layers.0.mlp"], layout, "block")
