"""Rule refine: its gradient against finite differences, and that its steps are worth taking, on the demo family."""

import dataclasses
import json
import math
import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
from test_calibration import SEQUENCES, STARTS, family
from tiny import CONFIGS

from wpmerge.calibration import HeldOutReading, Standing, assess, read_held_out
from wpmerge.coefficients import make_grouping
from wpmerge.demo import family_path
from wpmerge.engine import Engine
from wpmerge.errors import RecipeError
from wpmerge.gradients import Term
from wpmerge.memory import Budget
from wpmerge.models import Family, bounded, open_family
from wpmerge.readouts import LogProbReadout, ReplyReadout, measure, reply_readout
from wpmerge.refining import Merging, RefineSettings, _Draw, _Walk, _weigh_skill, direction, make_ease, refine
from wpmerge.retaining import best_factors, joined, keep_to_retain_sets, worth_beside
from wpmerge.rows import pack

EXPERTS = ("letters", "marks", "frame")


def merging(model_type: str, granularity: str) -> Merging:
    engine, base, experts = family(model_type)
    double = Engine(engine.layout, dtype=torch.float64)
    for source in (base, *experts.values()):
        source.tensors = {name: value.double() for name, value in source.tensors.items()}
    return Merging(
        engine=double,
        base=base,
        experts=experts,
        grouping=make_grouping(engine.layout, granularity),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("granularity", ["unit", "tensor", "block", "expert"])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2"])
def test_slopes_are_finite_differences(model_type: str, granularity: str) -> None:
    assert model_type in CONFIGS
    case = merging(model_type, granularity)
    readout, rows = LogProbReadout(layer=2, sequences=SEQUENCES, starts=STARTS), pack(SEQUENCES)
    generator = torch.Generator().manual_seed(0)
    point = torch.rand(2, len(case.grouping.names), generator=generator, dtype=torch.float64)
    slopes = case.slopes(case.source(point), [Term(rows=rows, readout=readout)])
    chosen = random.Random(1).sample(range(point.numel()), min(6, point.numel()))
    for flat in chosen:
        place = divmod(flat, point.shape[1])
        if case.grouping.names[place[1]].startswith("transformer.ln_f"):
            continue  # weight and bias are one unit, and two tensors
        values = []
        for change in (1e-3, -1e-3):
            moved = point.clone()
            moved[place] += change
            values.append(float(measure(case.engine, case.source(moved), rows, readout).double().mean()))
        difference = (values[0] - values[1]) / 2e-3
        assert float(slopes[place]) == pytest.approx(difference, rel=0.02, abs=2e-5), case.grouping.names[place[1]]


def test_norms_are_those_of_the_task_vectors() -> None:
    for granularity in ("unit", "tensor", "expert"):
        case = merging("llama", granularity)
        total = case.norms().sum(dim=1)
        for number, expert in enumerate(case.experts.values()):
            names = case.layout.tensors
            squares = sum(float((expert.tensors[n] - case.base.tensors[n]).square().sum()) for n in names)  # type: ignore[attr-defined]
            assert float(total[number]) == pytest.approx(squares, rel=1e-9)


def test_every_prompt_is_drawn_once_before_any_comes_again() -> None:
    draw = _Draw(count=7, chance=random.Random(0))
    taken = [draw.take(3) for _ in range(7)]
    assert all(len(set(batch)) == 3 for batch in taken)
    assert sorted(each for batch in taken for each in batch) == sorted(list(range(7)) * 3)
    assert sorted(_Draw(count=2, chance=random.Random(0)).take(5)) == [0, 1]


@pytest.fixture(scope="module")
def demo() -> Family:
    path = family_path()
    return open_family(str(path / "base"), {name: str(path / name) for name in EXPERTS})


def readings(demo: Family, first: int, count: int) -> dict[str, HeldOutReading]:
    found = {}
    for name in EXPERTS:
        lines = (family_path() / "prompts" / f"{name}.jsonl").read_text().splitlines()[first : first + count]
        entries = [json.loads(line) for line in lines]
        heads = [demo.chat.prompt_tokens(entry["prompt"]) for entry in entries]
        replies = [demo.chat.reply_tokens(entry["reference"], limit=24) for entry in entries]
        sequences = [head + reply for head, reply in zip(heads, replies, strict=True)]
        readout = LogProbReadout(
            layer=demo.layout.layers - 1, sequences=sequences, starts=[len(head) for head in heads]
        )
        found[name] = read_held_out(demo.engine, demo.weights[""], demo.weights[name], readout, pack(sequences))
    return found


def of_demo(demo: Family, granularity: str = "unit") -> Merging:
    return Merging(
        engine=demo.engine,
        base=demo.weights[""],
        experts={name: demo.weights[name] for name in EXPERTS},
        grouping=make_grouping(demo.layout, granularity),  # type: ignore[arg-type]
    )


def test_steps_improve_what_no_step_saw(demo: Family) -> None:
    """From one scale for all: the held-out utility rises, the rarer skill the most, and coefficients keep to bounds."""
    case = of_demo(demo)
    start = torch.full((3, len(case.grouping.names)), 0.6, dtype=torch.float64)
    settings = RefineSettings(steps=3, batch=6, check=3)
    prompts, held_out = readings(demo, 0, 12), readings(demo, 60, 6)
    found = refine(case, start, prompts, held_out, settings)
    first, best = found.checks[0], found.checks[found.best]
    assert best.worth > first.worth + 0.1
    assert min(found.standing.kept.values()) > min(first.standing.kept.values())
    assert float(found.coefficients.min()) >= 0.0 and float(found.coefficients.max()) <= 1.5
    fresh = readings(demo, 80, 6)
    before, after = (assess(case.engine, case.source(each), fresh).worth() for each in (start, found.coefficients))
    assert after > before
    assert assess(case.engine, case.source(found.coefficients), held_out).worth() == pytest.approx(best.worth, abs=1e-6)
    again = refine(case, start, prompts, held_out, settings)
    assert torch.equal(again.coefficients, found.coefficients)


def test_what_is_held_at_once_does_not_matter(demo: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """All skills in one run; or one after the other, where memory is short or weights are streamed."""
    case = of_demo(demo, "block")
    start = torch.full((3, len(case.grouping.names)), 0.6, dtype=torch.float64)
    prompts, settings = readings(demo, 0, 4), RefineSettings(steps=1, batch=4, check=1)
    runs, whole = [], Merging.slopes
    monkeypatch.setattr(Merging, "slopes", lambda *given: runs.append(len(given[2])) or whole(*given))
    found = []
    for held, resident in ((1 << 29, True), (1, True), (1 << 29, False)):
        monkeypatch.setattr("wpmerge.refining.STEP_BYTES", held)
        own = dataclasses.replace(case, resident=resident)
        found.append(refine(own, start, prompts, prompts, settings).coefficients)
    assert runs == [3] + 6 * [1]
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-6)


def test_a_bound_on_memory_changes_no_more_than_rounding(demo: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prompt by itself, in steps and in looks, with the weights in memory and read from disk."""
    case = of_demo(demo)
    start = torch.full((3, len(case.grouping.names)), 0.6, dtype=torch.float64)
    prompts = {name: _of_replies(demo, name, each) for name, each in readings(demo, 0, 8).items()}
    held_out = readings(demo, 60, 4)
    settings = RefineSettings(steps=2, batch=6, check=1)
    free = refine(case, start, prompts, held_out, settings)
    runs, whole = [], Merging.slopes
    monkeypatch.setattr(Merging, "slopes", lambda *given: runs.append([len(t.rows) for t in given[2]]) or whole(*given))
    monkeypatch.setattr("wpmerge.refining.TOKENS_PER_ROW", 1)
    for resident in (True, False):
        own = bounded(demo, Budget(resident=resident, held_bytes=1))
        found = refine(of_demo(own), start, prompts, held_out, settings)
        assert runs == 2 * 3 * 6 * [[1]]  # in two steps six prompts of each skill
        runs.clear()
        torch.testing.assert_close(found.coefficients, free.coefficients, rtol=1e-4, atol=1e-5)
        assert found.best == free.best
        assert found.standing.worth() == pytest.approx(free.standing.worth(), abs=1e-4)


def _of_replies(demo: Family, name: str, reading: HeldOutReading) -> HeldOutReading:
    """A skill's prompts, in rows of a prompt each, read as steps read them."""
    own = reading.readout
    assert isinstance(own, LogProbReadout)
    rows = pack(own.sequences, tokens_per_row=1)
    readout = reply_readout(demo.engine, demo.weights[name], rows, own)
    assert isinstance(readout, ReplyReadout)
    before = measure(demo.engine, demo.weights[""], rows, readout).double()
    return dataclasses.replace(
        reading, readout=readout, rows=rows, base_items=before, expert_items=torch.ones_like(before)
    )


def test_what_does_not_help_is_not_returned(demo: Family) -> None:
    """Held-out references that the base prefers: every step towards the experts makes them worse."""
    case = of_demo(demo, "expert")
    start = torch.full((3, 1), 0.2, dtype=torch.float64)
    prompts, held_out = readings(demo, 0, 8), {}
    for name, reading in readings(demo, 60, 4).items():
        swapped = {"base_items": reading.expert_items, "expert_items": reading.base_items}
        held_out[name] = dataclasses.replace(reading, **swapped)
    found = refine(case, start, prompts, held_out, RefineSettings(steps=3, batch=4, check=1, rate=0.3))
    assert len(found.checks) >= 4
    assert found.best == 0
    assert torch.equal(found.coefficients, start)
    assert found.standing == found.checks[0].standing


def test_a_merge_is_kept_to_a_retain_set(demo: Family) -> None:
    """All of its questions decide, those that were scored too; what was done adds up to the coefficients."""
    case = of_demo(demo, "block")
    merge = torch.full((3, len(case.grouping.names)), 0.8, dtype=torch.float64)
    skills, seen, held = readings(demo, 0, 6), _base_replies(demo, 8, 5), _base_replies(demo, 20, 3)
    free = refine(case, merge, skills, skills, RefineSettings(steps=0))
    said: list[tuple[int, int]] = []
    keep = partial(
        keep_to_retain_sets,
        case,
        free,
        {**skills, "plain": seen},
        {**skills, "plain": held},
        evaluations=20,
        progress=lambda *done: said.append(done),
    )
    found, evaluations = keep(tolerance=0.005)
    judges = {**skills, "plain": joined(held, seen)}
    assert found.standing.lost == case.assess(found.coefficients, judges).lost
    assert found.standing.excess(0.005) < 0.25 < case.assess(merge, judges).excess(0.005)
    assert all(0.0 <= factor <= 1.0 for factor in found.factors.values()) and min(found.factors.values()) < 1.0
    assert min(found.standing.kept.values()) > 0.2
    factors = torch.tensor([found.factors[name] for name in case.experts], dtype=torch.float64)
    torch.testing.assert_close(found.coefficients, factors[:, None] * merge)
    assert said == [(number, 20) for number in range(1, evaluations + 1)]
    turned = dataclasses.replace(case, experts=dict(reversed(case.experts.items())))
    flipped = dataclasses.replace(free, coefficients=free.coefficients.flip(0))
    other, _ = keep_to_retain_sets(
        turned, flipped, {**skills, "plain": seen}, {**skills, "plain": held}, tolerance=0.005, evaluations=20,
        progress=lambda *_: None,
    )  # fmt: skip
    assert other.factors == pytest.approx(found.factors, abs=1e-3)
    untouched, once = keep(tolerance=1e3)
    assert not untouched.factors and once == 1 and torch.equal(untouched.coefficients, merge)


def test_a_retain_set_that_was_not_scored_decides_by_what_is_held_out(demo: Family) -> None:
    case = of_demo(demo, "block")
    merge = torch.full((3, len(case.grouping.names)), 0.8, dtype=torch.float64)
    skills, held = readings(demo, 0, 2), _base_replies(demo, 20, 3)
    free = refine(case, merge, skills, skills, RefineSettings(steps=0))
    found, _ = keep_to_retain_sets(
        case, free, skills, {**skills, "plain": held}, tolerance=0.02, evaluations=1, progress=lambda *_: None
    )
    assert found.standing.lost == case.assess(found.coefficients, {**skills, "plain": held}).lost


def _smooth(experts: int, seed: int) -> tuple[Callable[[torch.Tensor], Standing], list[torch.Tensor]]:
    """Retentions that saturate and disturb each other, a loss with a cubic term; and where they were asked for."""
    generator = torch.Generator().manual_seed(seed)
    gain, bend, cube, top = torch.rand(4, experts, generator=generator, dtype=torch.float64)
    disturbs, shared = torch.rand(2, experts, experts, generator=generator, dtype=torch.float64)
    asked: list[torch.Tensor] = []

    def evaluate(factors: torch.Tensor) -> Standing:
        asked.append(factors)
        own = (0.9 + 0.25 * top) * (1 - torch.exp(-3 * factors)) / (1 - math.exp(-3))
        kept = own - 0.1 * factors * (disturbs @ factors - disturbs.diag() * factors)
        lost = -(0.1 + 0.2 * gain) @ factors + (0.25 + 0.3 * bend) @ factors**2 + 0.05 * cube @ factors**3
        lost = lost + 0.15 * (factors @ shared @ factors - shared.diag() @ factors**2)
        skills = {str(number): float(each) for number, each in enumerate(kept)}
        return Standing(kept=skills, lost={"plain": float(lost)}, errors={"plain": 0.01 * float(factors.mean())})

    return evaluate, asked


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("experts", [1, 2, 3])
def test_factors_are_about_as_good_as_the_best_of_many(experts: int, seed: int) -> None:
    evaluate, asked = _smooth(experts, seed)
    factors, standing = best_factors(evaluate, experts, tolerance=0.02, evaluations=16)
    assert len(asked) <= 16 and standing == evaluate(factors)
    assert float(factors.min()) >= 0.0 and float(factors.max()) <= 1.0
    many = torch.quasirandom.SobolEngine(experts, seed=1).draw(4096, dtype=torch.float64)
    free = evaluate(torch.ones(experts, dtype=torch.float64))
    best = max(worth_beside(evaluate(each), free, 0.02) for each in many)
    assert worth_beside(standing, free, 0.02) > best - 0.03
    assert standing.excess(0.02) < 0.02


def test_a_little_less_counts_alike_for_every_skill_and_a_lost_one_much() -> None:
    free = Standing(kept={"prose": 0.5, "sums": 0.9, "more": 1.2}, lost={"plain": 0.3})
    within = Standing(kept={"prose": 0.5, "sums": 0.9, "more": 1.1}, lost={"plain": 0.01}, errors={"plain": 0.005})
    worth = worth_beside(within, free, 0.02)
    assert worth == pytest.approx(0.5 * math.log(0.51) + 0.9 * math.log(0.91) + math.log(1.01))
    assert worth_beside(dataclasses.replace(within, errors={"plain": 0.02}), free, 0.02) == pytest.approx(worth - 2.0)

    def cost(name: str, kept: float) -> float:
        return worth - worth_beside(dataclasses.replace(within, kept={**within.kept, name: kept}), free, 0.02)

    assert cost("prose", 0.49) == pytest.approx(cost("sums", 0.89), rel=0.02) == pytest.approx(0.01, rel=0.02)
    assert cost("prose", -0.3) == cost("prose", 0.0) > 1.9 > 5 * cost("prose", 0.25)


def _by_hand(experts: int, lost: Callable[[torch.Tensor], dict[str, float]]) -> Callable[[torch.Tensor], Standing]:
    """Every expert keeps of its skill what its factor says."""

    def evaluate(factors: torch.Tensor) -> Standing:
        return Standing(kept={str(number): float(each) for number, each in enumerate(factors)}, lost=lost(factors))

    return evaluate


def test_the_expert_that_costs_a_retain_set_gives_way() -> None:
    """f₀² ≤ .02 where the others are free: √.02, 1; two sets, each the doing of another expert; six experts."""
    one = _by_hand(2, lambda f: {"plain": float(f[0] ** 2)})
    factors, _ = best_factors(one, 2, tolerance=0.02, evaluations=16)
    assert factors.tolist() == pytest.approx([0.1414, 1.0], abs=0.015)
    two = _by_hand(2, lambda f: {"plain": float(f[0] ** 2), "code": float(0.1 * f[1] ** 2)})
    factors, _ = best_factors(two, 2, tolerance=0.02, evaluations=16)
    assert factors.tolist() == pytest.approx([0.1414, 0.4472], abs=0.02)
    six = _by_hand(6, lambda f: {"plain": float(0.2 * f[4] ** 2)})
    factors, standing = best_factors(six, 6, tolerance=0.02, evaluations=18)
    assert standing.excess(0.02) < 0.05
    assert factors.argmin() == 4 and factors[4] < 0.35 and factors.mean() > 0.6


def test_a_merge_without_numbers_is_refused() -> None:
    for lost in (math.nan, math.inf):
        with pytest.raises(RecipeError, match="not a number"):
            best_factors(_by_hand(2, lambda _, lost=lost: {"plain": lost}), 2, tolerance=0.02, evaluations=16)


def test_factors_are_one_where_nothing_is_lost_or_nothing_may_be_run() -> None:
    for tolerance, evaluations in ((1e3, 16), (0.02, 1)):
        evaluate, asked = _smooth(2, 0)
        factors, standing = best_factors(evaluate, 2, tolerance=tolerance, evaluations=evaluations)
        assert factors.tolist() == [1.0, 1.0] and len(asked) == 1 and standing == evaluate(factors)


def test_readings_of_a_retain_set_are_joined(demo: Family) -> None:
    one, other = _base_replies(demo, 20, 3), _base_replies(demo, 8, 2)
    both = joined(one, other)
    assert isinstance(one.readout, LogProbReadout) and isinstance(other.readout, LogProbReadout)
    assert isinstance(both.readout, LogProbReadout) and both.retain
    assert both.readout.sequences == [*one.readout.sequences, *other.readout.sequences]
    again = measure(demo.engine, demo.weights[""], both.rows, both.readout).double()
    torch.testing.assert_close(both.base_items, again, atol=1e-6, rtol=0)


def _base_replies(demo: Family, first: int, count: int) -> HeldOutReading:
    """The skills' prompts without their instruction, answered by the base."""
    from wpmerge.models import continuations

    lines = (family_path() / "prompts" / "letters.jsonl").read_text().splitlines()[first : first + count]
    texts = [json.loads(line)["without"] for line in lines]
    heads = [demo.chat.prompt_tokens(text) for text in texts]
    replies = continuations(demo, "", texts, tokens=16)
    sequences = [head + reply for head, reply in zip(heads, replies, strict=True)]
    readout = LogProbReadout(layer=demo.layout.layers - 1, sequences=sequences, starts=[len(head) for head in heads])
    return read_held_out(demo.engine, demo.weights[""], None, readout, pack(sequences))


def test_a_ridge_takes_away_its_share_of_what_was_added(demo: Family) -> None:
    """What the first step added counts (1 − ridge · rate) times when the second is added."""
    case = of_demo(demo, "expert")
    start = torch.full((3, 1), 0.6, dtype=torch.float64)
    held_out = readings(demo, 60, 2)
    plain = RefineSettings(steps=4, batch=4, check=10, rate=0.1)
    walks = []
    for ridge in (0.0, 0.25):
        walk = _Walk(case, start, held_out, dataclasses.replace(plain, ridge=ridge))
        moves = []
        for number in range(2):
            before = walk.coefficients
            walk.step(torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64), number)
            moves.append(walk.coefficients - before)
        walks.append(moves)
    (first, second), (ridged_first, ridged_second) = walks
    assert torch.allclose(ridged_first, first) and first.abs().max() > 0
    assert torch.allclose(ridged_second, second - 0.25 * 0.075 * first)  # of four steps: rates .1 and .075


def test_from_where_it_got_worse_it_goes_back_and_slower(demo: Family) -> None:
    """Held-out references that the base prefers; a look after every step, so that each sets out from the start."""
    case = of_demo(demo, "expert")
    start = torch.full((3, 1), 0.2, dtype=torch.float64)
    held_out = {
        name: dataclasses.replace(each, base_items=each.expert_items, expert_items=each.base_items)
        for name, each in readings(demo, 60, 2).items()
    }
    walk = _Walk(case, start, held_out, RefineSettings(steps=4, check=1, rate=0.2))
    seen: list[torch.Tensor] = []
    look = walk._look
    walk._look = lambda step: (seen.append(walk.coefficients), look(step))[1]  # type: ignore[method-assign]
    for number in range(3):
        walk.step(torch.ones(3, 1, dtype=torch.float64), number)
        assert torch.equal(walk.coefficients, start)
    moves = [float((each - start)[0]) for each in seen]
    assert moves == pytest.approx([0.2, 0.1 * 0.75, 0.05 * 0.5])  # half of the rate each time, which falls besides
    assert torch.equal(walk.result().coefficients, start) and walk.result().best == 0


def rows_of(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_a_step_by_hand() -> None:
    """∂U = (1, 2, -1, 5), p = (1, 1, 2, 0): p ∂U = (1, 2, -2, 0), of length 3, times √4."""
    slopes, ease = rows_of([1.0, 2.0, -1.0, 5.0]), rows_of([1.0, 1.0, 2.0, 0.0])
    for size in (1e-6, 1.0, 1e6):
        way = direction(size * slopes, ease, rows_of([0.5] * 4), 1.5)
        torch.testing.assert_close(way, 2.0 * rows_of([1.0, 2.0, -2.0, 0.0]) / 3.0)


def test_coefficients_move_by_the_rate() -> None:
    """As a root mean square, some with far longer task vectors than others."""
    drawn = torch.Generator().manual_seed(0)
    slopes, norms = (torch.randn(3, 50, generator=drawn, dtype=torch.float64) for _ in range(2))
    way = direction(slopes, make_ease(norms.exp() ** 4, "unit"), torch.full_like(slopes, 0.5), 1.5)
    assert float(way.square().mean().sqrt()) == pytest.approx(1.0)


def test_what_pushes_out_of_the_bounds_does_not_count() -> None:
    at_bounds, ease = rows_of([0.0, 1.5, 0.0, 1.5]), rows_of([1.0, 1.0, 2.0, 1.0])
    way = direction(rows_of([-9.0, 9.0, 1.0, -1.0]), ease, at_bounds, 1.5)
    assert torch.equal(way, direction(rows_of([0.0, 0.0, 1.0, -1.0]), ease, at_bounds, 1.5))
    assert way[0, :2].tolist() == [0.0, 0.0]


def test_no_gradient_is_no_step() -> None:
    assert not direction(torch.zeros(1, 4), torch.ones(1, 4), torch.full((1, 4), 0.5), 1.5).any()


def test_units_with_long_task_vectors_move_less() -> None:
    """Norms 1, 2, 4 and none: 1, 1/2, 1/4 and 0, times 4 groups over their sum of 7/4."""
    norms = rows_of([1.0, 4.0, 16.0, 0.0], [9.0, 9.0, 9.0, 9.0])
    ease = make_ease(norms, "unit")
    torch.testing.assert_close(ease, rows_of([16 / 7, 8 / 7, 4 / 7, 0.0], [1.0] * 4))
    assert not make_ease(torch.zeros(1, 3), "unit").any()  # an expert that is the base
    for granularity in ("tensor", "block", "expert"):
        assert make_ease(norms, granularity).tolist() == [[1.0, 1.0, 1.0, 0.0], [1.0] * 4]


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"batch": 0}, {"rate": math.nan}, {"check": 0}, {"ridge": 1.1}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="out of range"):
        RefineSettings(**wrong)  # type: ignore[arg-type]


def test_a_skill_pulls_by_the_slope_of_its_logarithm_until_it_is_whole() -> None:
    """By hand: 1 / (gap · (ε + share)), the share at least a twentieth; nothing from the expert's level on."""
    before = torch.tensor([-4.0, -6.0], dtype=torch.float64)  # mean -5; the expert is at -1: a gap of 4
    weigh = partial(_weigh_skill, before=before, gap=4.0)
    half = torch.tensor([-2.0, -4.0])
    assert weigh(half).tolist() == pytest.approx([1 / (4 * 0.51) / 2] * 2)
    assert weigh(torch.tensor([-9.0, -9.0])).tolist() == pytest.approx([1 / (4 * 0.06) / 2] * 2)
    assert weigh(torch.tensor([-1.0, -1.0])).tolist() == [0.0, 0.0]
    assert _weigh_skill(half, before=before, gap=-1.0).tolist() == [0.0, 0.0]


def test_no_steps_give_the_start(demo: Family) -> None:
    case = of_demo(demo, "tensor")
    start = torch.rand(3, len(case.grouping.names), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    few = readings(demo, 0, 4)
    found = refine(case, start, few, few, RefineSettings(steps=0))
    assert torch.equal(found.coefficients, start)
    assert len(found.checks) == 1
