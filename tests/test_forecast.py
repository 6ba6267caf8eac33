"""Estimates grow as their costs do, and agree with whole runs that were measured."""

from dataclasses import replace
from typing import Any

import pytest
from test_recipes import LLAMA2, SMOLLM2

from wpmerge.capability import Capability, Prompt
from wpmerge.forecast import LINEAR, Workload, fusing_needs, judging_needs, longest, scoring_needs, workload
from wpmerge.run_recipe import Judging, MergeRule, Output, RunRecipe, Scoring
from wpmerge.sources import Source

EXPERTS = ("format", "math", "json")


def work(config: dict[str, Any] = SMOLLM2, *, length: int = 160, **more: Any) -> Workload:
    prompts = tuple(Prompt(prompt="x" * length) for _ in range(8))
    names = more.pop("experts", EXPERTS)
    recipe = RunRecipe(
        base="base",
        experts=dict.fromkeys(names, "x"),
        capabilities=dict.fromkeys(names, "math"),
        output=Output(directory="x"),
        **more,
    )
    source = Source(
        source="base",
        place="hub",
        path=None,
        nbytes=10,
        sized="config",
        config=config,
        adapter=False,
        complete=False,
    )
    found = workload(
        recipe,
        {"base": source, **dict.fromkeys(names, source)},
        {name: Capability(name=name, source="math", prompts=prompts) for name in names},
    )
    assert found is not None
    return found


def test_scoring_smollm2_is_about_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/log.md: three experts at the defaults took 866 s of CPU and 3.2 GB; low anchors made it quicker."""
    monkeypatch.setattr("wpmerge.forecast.resident_bytes", lambda: 450_000_000)  # the command's, not these tests'
    needs = scoring_needs(work())
    assert needs.seconds == pytest.approx(866, rel=1.5)
    assert needs.memory == pytest.approx(3.2e9, rel=0.5)


def test_scoring_grows_with_what_it_grows_with() -> None:
    base = work(LLAMA2)
    seconds = scoring_needs(base).seconds
    assert seconds is not None
    for changed in (
        replace(base, recipe=base.recipe.model_copy(update={"scoring": Scoring(prompts=64)})),
        replace(base, recipe=base.recipe.model_copy(update={"scoring": Scoring(top_k=64)})),
        replace(base, recipe=base.recipe.model_copy(update={"scoring": Scoring(estimator=["linear", "integrated"])})),
        work(LLAMA2, length=800),
    ):
        assert (scoring_needs(changed).seconds or 0) > seconds
    fewer = scoring_needs(work(LLAMA2, experts=("math",))).seconds
    assert fewer is not None and fewer < seconds / 3


def test_choosing_the_readout_costs_a_linear_run_of_each_candidate() -> None:
    one, auto = work(scoring=Scoring(readout=["reference"])), work(scoring=Scoring(readout=["auto"]))
    # 160 characters are 40 tokens; reference and divergence also read a reply of 96; three capabilities, 32 prompts
    more = LINEAR * 32 * 3 * (40 + 96 + 40 + 96 + 40) * one.billions
    assert (scoring_needs(auto).seconds or 0) - (scoring_needs(one).seconds or 0) == pytest.approx(more)
    kept = replace(auto, recipe=auto.recipe.model_copy(update={"retain": dict.fromkeys(EXPERTS, "math")}))
    assert (scoring_needs(one).seconds or 0) == pytest.approx(scoring_needs(kept).seconds)


def test_streaming_takes_less_memory_and_a_bound_is_believed() -> None:
    whole, streamed = work(LLAMA2), work(LLAMA2, stream=True)
    assert (scoring_needs(whole).memory or 0) > 200e9
    assert (scoring_needs(streamed).memory or 0) < 20e9
    assert scoring_needs(work(LLAMA2, scoring=Scoring(max_memory="9GB"))).memory == 9 * 10**9
    assert fusing_needs(work(LLAMA2, rule=MergeRule(max_memory="9GB"))).memory == 9 * 10**9
    assert 5 * (fusing_needs(streamed).memory or 0) < (fusing_needs(whole).memory or 0)


def test_fusing_depends_on_the_rule_and_the_dtype() -> None:
    seconds = [
        fusing_needs(work(LLAMA2, rule=rule)).seconds or 0
        for rule in (MergeRule(), MergeRule(name="scaled"), MergeRule(name="scaled", scale=0.5))
    ]
    assert seconds[0] > seconds[1] > seconds[2]
    free = work(LLAMA2)
    bound = replace(
        free,
        recipe=free.recipe.model_copy(update={"retain": {"plain": "math"}}),
        capabilities={**free.capabilities, "plain": free.capabilities[EXPERTS[0]]},
    )
    assert 1.2 * seconds[0] < (fusing_needs(bound).seconds or 0) < 2.2 * seconds[0]  # merges for factors
    assert fusing_needs(work(LLAMA2)).written == 10
    refined, scaled = (fusing_needs(work(LLAMA2, rule=MergeRule(name=name))).memory for name in ("refine", "scaled"))
    assert refined is not None and scaled is not None and refined > scaled  # it holds gradients
    wide = work(LLAMA2).recipe.model_copy(update={"output": Output(directory="x", dtype="float32")})
    assert fusing_needs(replace(work(LLAMA2), recipe=wide)).written == 4 * 13_015_864_320


def test_judging_is_estimated_where_documents_and_lengths_are_known() -> None:
    found = work()
    known = judging_needs(found, Judging(limit=89, max_gen_tokens=128))
    assert known.seconds == pytest.approx(665.1 / 3 * 5, rel=0.01)  # benchmarks/results/evaluation: three models
    assert judging_needs(found, Judging(limit=89)).seconds is None
    assert judging_needs(found, Judging(max_gen_tokens=128)).seconds is None


def test_a_base_without_a_configuration_gives_no_estimate() -> None:
    found = work()
    unknown = Source(
        source="b", place="hub", path=None, nbytes=None, sized=None, config=None, adapter=False, complete=False
    )
    assert workload(found.recipe, {"base": unknown}, {}) is None
    assert longest([]).memory is None and longest([]).seconds is None
