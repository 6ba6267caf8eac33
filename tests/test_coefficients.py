"""Rules with numbers worked out by hand, their properties, and groups of every granularity on every architecture."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONFIGS, ModelWeights, tiny_model
from torch import Tensor

from wpmerge.arch import KINDS, Layout, Unit
from wpmerge.attribution import UnitArrays, empty_arrays
from wpmerge.coefficients import (
    MAX_COEFFICIENT,
    RULES,
    RuleSettings,
    apply_rule,
    group_scores,
    make_grouping,
    squared_norms,
    stack_scores,
    tensor_coefficients,
)
from wpmerge.errors import RecipeError

NAN = math.nan


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows if len(rows) > 1 else rows[0], dtype=torch.float64)


def apply(rule: str, scores: Tensor, *, scales: Tensor, sizes: Tensor | None = None, **numbers: float) -> Tensor:
    sizes = torch.ones(scores.shape[1], dtype=torch.float64) if sizes is None else sizes
    return apply_rule(RuleSettings(rule=rule, **numbers), scores, sizes, scales)


# --- the rules, by hand

SCORES = tensor([0.9, 0.1, -0.5, 0.0, NAN, 0.04], [0.1, 0.1, 0.3, -0.1, 0.2, 0.01])
SCALES = tensor([0.5, 0.8])


@pytest.mark.parametrize("rule", ["uniform", "scaled"])
def test_uniform_and_scaled_ignore_scores(rule: str) -> None:
    assert apply(rule, SCORES, scales=SCALES).tolist() == [[0.5] * 6, [0.8] * 6]


def test_proportional_by_hand() -> None:
    """p = 1: shares .9/.1, half each, all to the second, none positive, one scored alone, .04/.01."""
    found = apply("proportional", SCORES, scales=SCALES, power=1.0)
    first = [0.5 * 2 * 0.9, 0.5, 0.0, 0.5, 0.5, 0.5 * 2 * 0.8]
    second = [0.8 * 2 * 0.1, 0.8, 1.5, 0.8, 0.8, 0.8 * 2 * 0.2]  # 0.8 · 2 · 1 = 1.6 is cut at 1.5
    torch.testing.assert_close(found, tensor(first, second))


def test_proportional_takes_the_root_by_default() -> None:
    """√.9 : √.1 = 3 : 1 and √.04 : √.01 = 2 : 1."""
    found = apply("proportional", SCORES, scales=SCALES)
    torch.testing.assert_close(found[:, 0], tensor([0.5 * 2 * 0.75, 0.8 * 2 * 0.25]))
    torch.testing.assert_close(found[:, 5], tensor([0.5 * 2 * 2 / 3, 0.8 * 2 / 3]))


def test_proportional_of_power_zero_ignores_scores() -> None:
    assert apply("proportional", SCORES, scales=SCALES, power=0.0).tolist() == [[0.5] * 6, [0.8] * 6]


def test_select_by_hand() -> None:
    """R₊ per parameter: .02, .05, .03, none, 0; 100 parameters are scored, 40 may have the scale: units 1 and 2."""
    scores = tensor([[0.6, 0.5, 0.6, NAN, -3.0]])[0][None]
    sizes = tensor([30.0, 10.0, 20.0, 500.0, 40.0])
    found = apply("select", scores, sizes=sizes, scales=tensor([0.8]), density=0.4, floor=0.25)
    torch.testing.assert_close(found, tensor([[0.2, 0.8, 0.8, 0.8, 0.2]])[0][None])


def test_select_passes_over_what_does_not_fit() -> None:
    """The best group alone is larger than the 50 that may be chosen; the next two fit."""
    scores, sizes = torch.tensor([[0.9, 0.2, 0.1]], dtype=torch.float64), tensor([60.0, 30.0, 10.0])
    found = apply("select", scores, sizes=sizes, scales=tensor([1.0]), density=0.5, floor=0.0)
    assert found.tolist() == [[0.0, 1.0, 1.0]]


def test_select_chooses_nothing_that_recovers_nothing() -> None:
    scores = torch.tensor([[0.0, 0.3, -1.0, 0.0]], dtype=torch.float64)
    found = apply("select", scores, scales=tensor([1.0]), density=1.0, floor=0.5)
    assert found.tolist() == [[0.5, 1.0, 0.5, 0.5]]


@pytest.mark.parametrize(("density", "expected"), [(0.0, 0.24), (1.0, 0.8)])
def test_select_of_nothing_and_of_all(density: float, expected: float) -> None:
    found = apply("select", torch.ones(1, 5, dtype=torch.float64), scales=tensor([0.8]), density=density)
    torch.testing.assert_close(found, torch.full((1, 5), expected, dtype=torch.float64))


def test_select_ranks_each_expert_by_its_own_scores() -> None:
    scores = tensor([3.0, 2.0, 1.0, 0.1], [0.1, 1.0, 2.0, 3.0])
    found = apply("select", scores, scales=tensor([1.0, 0.6]), density=0.5, floor=0.0)
    torch.testing.assert_close(found, tensor([1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.6, 0.6]))


# --- properties

numbers = st.floats(-2.0, 2.0, allow_nan=False).map(lambda x: round(x, 3))
scored = st.one_of(numbers, st.just(NAN), st.just(0.0))


@st.composite
def problems(draw: st.DrawFn) -> tuple[RuleSettings, Tensor, Tensor, Tensor]:
    """Settings of any rule, scores with gaps, sizes, scales; few groups and many ties."""
    experts, groups = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    scores = draw(st.lists(st.lists(scored, min_size=groups, max_size=groups), min_size=experts, max_size=experts))
    sizes = draw(st.lists(st.integers(1, 1000), min_size=groups, max_size=groups))
    scales = draw(st.lists(st.floats(0.0, 1.5), min_size=experts, max_size=experts))
    rule = RuleSettings(
        rule=draw(st.sampled_from(RULES)),
        power=draw(st.floats(0.0, 4.0)),
        density=draw(st.floats(0.0, 1.0)),
        floor=draw(st.floats(0.0, 1.0)),
        max_coefficient=draw(st.floats(0.0, 2.0)),
    )
    double = torch.float64
    return (
        rule,
        torch.tensor(scores, dtype=double),
        torch.tensor(sizes, dtype=double),
        torch.tensor(scales, dtype=double),
    )


@given(problems())
def test_coefficients_are_finite_and_within_bounds(problem: tuple[RuleSettings, Tensor, Tensor, Tensor]) -> None:
    rule, scores, sizes, scales = problem
    found = apply_rule(rule, scores, sizes, scales)
    assert found.shape == scores.shape
    assert found.isfinite().all()
    assert found.min() >= 0.0
    assert found.max() <= rule.max_coefficient


@given(problems(), st.randoms(use_true_random=False))
def test_experts_in_another_order_have_the_same_coefficients(
    problem: tuple[RuleSettings, Tensor, Tensor, Tensor], random: object
) -> None:
    rule, scores, sizes, scales = problem
    order = list(range(len(scores)))
    random.shuffle(order)
    found = apply_rule(rule, scores[order], sizes, scales[order])
    torch.testing.assert_close(found, apply_rule(rule, scores, sizes, scales)[order])


@given(problems())
def test_a_unit_without_a_score_takes_the_experts_scale(problem: tuple[RuleSettings, Tensor, Tensor, Tensor]) -> None:
    rule, scores, sizes, scales = problem
    found = apply_rule(rule, scores, sizes, scales)
    flat = scales[:, None].expand_as(scores).clamp(0.0, rule.max_coefficient)
    assert torch.equal(found[scores.isnan()], flat[scores.isnan()])


@given(problems())
def test_scores_of_zero_give_the_scaled_merge(problem: tuple[RuleSettings, Tensor, Tensor, Tensor]) -> None:
    rule, scores, sizes, scales = problem
    found = apply_rule(rule, torch.zeros_like(scores), sizes, scales)
    scaled = apply_rule(dataclasses.replace(rule, rule="scaled"), scores, sizes, scales)
    torch.testing.assert_close(found, scaled)


@given(problems())
def test_proportional_of_one_expert_is_its_scale(problem: tuple[RuleSettings, Tensor, Tensor, Tensor]) -> None:
    rule, scores, sizes, scales = problem
    rule = dataclasses.replace(rule, rule="proportional", max_coefficient=1.5)
    found = apply_rule(rule, scores[:1], sizes, scales[:1])
    torch.testing.assert_close(found, scales[:1, None].expand_as(found))


@given(problems())
def test_proportional_shares_what_scaled_gives(problem: tuple[RuleSettings, Tensor, Tensor, Tensor]) -> None:
    """With equal scales and no bound, the coefficients of a fully scored unit add up to those of scaled."""
    rule, scores, sizes, _ = problem
    rule = dataclasses.replace(rule, rule="proportional", max_coefficient=10.0)
    found = apply_rule(rule, scores, sizes, torch.ones(len(scores), dtype=torch.float64))
    whole = ~scores.isnan().any(dim=0)
    torch.testing.assert_close(found.sum(dim=0)[whole], torch.full_like(found[0], len(scores))[whole])


@given(problems())
def test_select_never_gives_the_scale_to_more_than_its_share(
    problem: tuple[RuleSettings, Tensor, Tensor, Tensor],
) -> None:
    rule, scores, sizes, scales = problem
    rule = dataclasses.replace(rule, rule="select", floor=0.0, max_coefficient=1.0)
    found = apply_rule(rule, scores, sizes, torch.ones_like(scales))
    for row, chosen in zip(scores, found, strict=True):
        if (row > 0).any():
            known = ~row.isnan()
            assert sizes[known & (chosen == 1)].sum() <= rule.density * sizes[known].sum() + 0.5


@pytest.mark.parametrize(
    "wrong",
    [
        {"power": -0.1},
        {"power": 4.1},
        {"power": NAN},
        {"density": 1.01},
        {"density": -0.01},
        {"floor": 1.5},
        {"floor": -1.0},
        {"max_coefficient": -0.1},
        {"max_coefficient": math.inf},
        {"density": NAN},
        {"mu": 0.0},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float | str]) -> None:
    with pytest.raises(RecipeError, match="out of range"):
        RuleSettings(**wrong)
    assert RuleSettings().max_coefficient == MAX_COEFFICIENT


# --- groups and tensors


@pytest.fixture(scope="module", params=CONFIGS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return ModelWeights.of(tiny_model(request.param, seed=0)).layout


def random_arrays(layout: Layout, seed: int = 0) -> UnitArrays:
    generator = torch.Generator().manual_seed(seed)
    return {
        kind: torch.randn(array.shape, generator=generator, dtype=torch.float64)
        for kind, array in empty_arrays(layout).items()
    }


@pytest.mark.parametrize("granularity", ["unit", "block", "tensor", "expert"])
def test_groups_partition_the_parameters_and_the_scores(layout: Layout, granularity: str) -> None:
    grouping = make_grouping(layout, granularity)
    arrays = random_arrays(layout)
    assert len(set(grouping.names)) == len(grouping.names) == len(grouping.sizes)
    parameters = sum(math.prod(shape) for shape in layout.shapes.values())
    assert int(grouping.sizes.sum()) == parameters
    found = group_scores(layout, grouping, arrays)
    assert found.shape == grouping.sizes.shape
    torch.testing.assert_close(found.sum(), sum(array.sum() for array in arrays.values()))


def test_blocks_are_attention_mlp_norms_and_the_rest(layout: Layout) -> None:
    grouping = make_grouping(layout, "block")
    inside = {
        layout.layer_prefix(index) + name
        for index in range(layout.layers)
        for name in (
            layout.arch.attention,
            layout.arch.mlp,
            *(norm for norm in layout.arch.norms if "." not in norm),  # query and key norms are attention's
        )
    }
    outside = {name.rpartition(".")[0] for name in layout.outer_tensors()}
    assert set(grouping.names) == inside | outside
    assert make_grouping(layout, "expert").names == ("all",)
    assert make_grouping(layout, "tensor").names == tuple(layout.tensors)


def test_a_block_has_its_units_scores_by_hand() -> None:
    """Biases apart, attention is heads and kv groups, and an MLP is its neurons: sums over them."""
    layout = ModelWeights.of(tiny_model("mistral", seed=0)).layout
    arrays = random_arrays(layout)
    grouping = make_grouping(layout, "block")
    found = dict(zip(grouping.names, group_scores(layout, grouping, arrays).tolist(), strict=True))
    for index in range(3):
        prefix = layout.layer_prefix(index)
        attention = arrays["head"][index].sum() + arrays["kv_group"][index].sum()
        assert found[f"{prefix}self_attn"] == pytest.approx(float(attention))
        assert found[f"{prefix}mlp"] == pytest.approx(float(arrays["neuron"][index].sum()))
        assert found[f"{prefix}input_layernorm"] == pytest.approx(float(arrays["norm"][index, 0]))
    tensors = make_grouping(layout, "tensor")
    found = dict(zip(tensors.names, group_scores(layout, tensors, arrays).tolist(), strict=True))
    prefix = layout.layer_prefix(1)  # a head: 4 rows of W_Q, 4 columns of W_O; a neuron: a row of two, a column of one
    assert found[f"{prefix}self_attn.q_proj.weight"] == pytest.approx(float(arrays["head"][1].sum()) / 2)
    assert found[f"{prefix}mlp.down_proj.weight"] == pytest.approx(float(arrays["neuron"][1].sum()) / 3)


def test_groups_without_scored_units_have_none() -> None:
    layout = ModelWeights.of(tiny_model("mistral", seed=0)).layout
    arrays = random_arrays(layout)
    arrays["neuron"][1:] = NAN  # above an anchor's layer
    arrays["neuron"][0, 3] = NAN
    arrays["final_norm"][:] = NAN
    grouping = make_grouping(layout, "block")
    found = dict(zip(grouping.names, group_scores(layout, grouping, arrays).tolist(), strict=True))
    unscored = {"model.layers.1.mlp", "model.layers.2.mlp", "model.norm"}
    assert {name for name, value in found.items() if math.isnan(value)} == unscored
    assert found["model.layers.0.mlp"] == pytest.approx(float(arrays["neuron"][0].nansum()))
    units = group_scores(layout, make_grouping(layout, "unit"), arrays)
    assert int(units.isnan().sum()) == 2 * 32 + 1 + 1


def test_every_entry_of_every_tensor_has_its_units_coefficient(layout: Layout) -> None:
    """The other way round: each unit's slices, cut out of the expanded coefficients, hold its λ and nothing else."""
    grouping = make_grouping(layout, "unit")
    values = torch.rand(len(grouping.names), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = tensor_coefficients(layout, grouping, values)
    assert set(found) == set(layout.stored.values())
    expanded = {
        name: found[layout.stored[name]].expand(shape).expand(shape).clone() for name, shape in layout.shapes.items()
    }
    by_name = dict(zip(grouping.names, values.tolist(), strict=True))
    for kind in KINDS:
        for unit in layout.units(kind) if kind in layout.counts else ():
            for piece in layout.slices(unit):
                part = expanded[piece.tensor]
                if piece.axis is not None:
                    part = part.narrow(piece.axis, piece.start, piece.stop - piece.start)
                assert torch.equal(part, torch.full_like(part, by_name[str(unit)])), unit
                part.fill_(NAN)  # and no entry is another unit's
    assert all(tensor.isnan().all() for tensor in expanded.values())


@pytest.mark.parametrize("granularity", ["unit", "block", "tensor", "expert"])
def test_squared_norms_are_those_of_the_slices(layout: Layout, granularity: str) -> None:
    model_type = layout.config["model_type"]
    base, expert = (ModelWeights.of(tiny_model(str(model_type), seed=seed)) for seed in (0, 1))
    grouping = make_grouping(layout, granularity)  # type: ignore[arg-type]
    found = squared_norms(layout, grouping, base, expert)
    if granularity != "unit":
        expected = torch.zeros(len(grouping.names), dtype=torch.float64)
        for tensor, group in grouping.of_tensor.items():
            expected[group] += (expert.tensors[tensor].double() - base.tensors[tensor].double()).square().sum()
    else:
        values = []
        for unit in (u for kind in KINDS if kind in layout.counts for u in layout.units(kind)):
            total = 0.0
            for piece in layout.slices(unit):
                delta = expert.tensors[piece.tensor].double() - base.tensors[piece.tensor].double()
                if piece.axis is not None:
                    delta = delta.narrow(piece.axis, piece.start, piece.stop - piece.start)
                total += float(delta.square().sum())
            values.append(total)
        expected = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("model_type", ["phi3", "gpt_neox", "gpt2"])
def test_fused_tensors_by_hand(model_type: str) -> None:
    """16 wide, heads of 4: [q; k; v] with 4 and 2 and 2 heads (Phi-3), with 4 each (GPT-2), q k v by head (NeoX)."""
    layout = ModelWeights.of(tiny_model(model_type, seed=0)).layout
    grouping = make_grouping(layout, "unit")
    heads, groups = [1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]
    arrays = {kind: torch.zeros(layout.shape(kind), dtype=torch.float64) for kind in layout.counts}
    arrays["head"][1] = torch.tensor(heads)
    arrays["kv_group"][1] = torch.tensor(groups[: layout.counts["kv_group"]])
    found = tensor_coefficients(layout, grouping, group_scores(layout, grouping, arrays))
    name, axis, order = {
        "phi3": ("model.layers.1.self_attn.qkv_proj.weight", 0, heads + groups[:2] * 2),
        "gpt2": ("transformer.h.1.attn.c_attn.weight", 1, heads + groups * 2),
        "gpt_neox": (
            "gpt_neox.layers.1.attention.query_key_value.weight",
            0,
            [number for pair in zip(heads, groups, groups, strict=True) for number in pair],
        ),
    }[model_type]
    assert found[name].axis == axis
    assert found[name].values.tolist() == [number for number in order for _ in range(4)]


@pytest.mark.parametrize("granularity", ["block", "tensor", "expert"])
def test_coarse_coefficients_are_scalars_shared_by_a_group(layout: Layout, granularity: str) -> None:
    grouping = make_grouping(layout, granularity)
    values = torch.arange(len(grouping.names), dtype=torch.float64) / 7
    found = tensor_coefficients(layout, grouping, values)
    assert set(found) == set(layout.stored.values())
    for name, coefficient in found.items():
        assert coefficient.axis is None
        canonical = next(key for key, stored in layout.stored.items() if stored == name)
        assert coefficient.values == values[grouping.of_tensor[canonical]].float()


def test_stacked_scores_keep_the_order_of_the_experts(layout: Layout) -> None:
    grouping = make_grouping(layout, "tensor")
    arrays = [random_arrays(layout, seed) for seed in (1, 2)]
    stacked = stack_scores(layout, grouping, arrays)
    for row, each in zip(stacked, arrays, strict=True):
        assert torch.equal(row, group_scores(layout, grouping, each))


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_scores_of_units_survive_the_way_through_groups_and_tensors(seed: int) -> None:
    layout = _LAYOUT
    arrays = random_arrays(layout, seed)
    grouping = make_grouping(layout, "unit")
    found = tensor_coefficients(layout, grouping, group_scores(layout, grouping, arrays))
    unit = Unit(kind="neuron", layer=2, index=seed % 32)
    for piece in layout.slices(unit):
        value = found[layout.stored[piece.tensor]].values[piece.start]
        assert value == arrays["neuron"][2, unit.index].float()


_LAYOUT = ModelWeights.of(tiny_model("olmo2", seed=0)).layout
