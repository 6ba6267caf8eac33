"""Anchors: planted directions, the choice of layer on curves made by hand, and honest refusals."""

import dataclasses

import pytest
import torch
from tiny import CONFIGS, ModelWeights, tiny_model

from wpmerge.anchor import HALVES, Anchor, Behaviour, anchor_readout, fit_anchor, token_states
from wpmerge.engine import Engine
from wpmerge.errors import AnchorError
from wpmerge.readouts import AnchorReadout, measure
from wpmerge.rows import pack

ITEMS, LAYERS, WIDTH = 16, 10, 32


def noise(seed: int, items: int = ITEMS, layers: int = LAYERS) -> torch.Tensor:
    return torch.randn(items, layers, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(noise(seed, 1, 1)[0, 0], dim=0)


def planted(strengths: list[float], direction: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    """Noise, and along ``direction`` one strength per layer."""
    return noise(seed, layers=len(strengths)) + torch.tensor(strengths, dtype=torch.float64)[:, None] * direction


def behaviour(expert: torch.Tensor, base: torch.Tensor) -> Behaviour:
    """An output that follows the models' mean difference at each layer, by its size."""
    moves = expert - base
    return Behaviour(slopes=moves.mean(dim=0).expand_as(moves), moves=moves, gap=float(len(moves)))


def fit(expert: torch.Tensor, base: torch.Tensor, **options: object) -> Anchor:
    return fit_anchor(
        expert, base, **{"behaviour": behaviour(expert, base), "kind": "contrast", "name": "c", **options}
    )


@pytest.mark.parametrize("kind", ["contrast", "pair"])
def test_a_planted_direction_is_found_where_it_forms(kind: str) -> None:
    direction = unit(7)
    strengths = [0.0] * 4 + [30.0] * 6
    base = noise(1)
    # a pair anchor is the difference between the models: what both share is nothing to it
    shared = 50 * unit(8) if kind == "pair" else torch.zeros(WIDTH, dtype=torch.float64)
    anchor = fit(planted(strengths, direction) + shared, base + shared, kind=kind)
    assert anchor.layer == 4
    assert anchor.reliable
    assert anchor.kind == kind
    assert float(anchor.direction.norm()) == pytest.approx(1, abs=1e-6)
    assert float(anchor.direction.double() @ direction) > 0.99
    point = anchor.curve[4]
    assert point.cosine > 0.95
    assert point.gap == pytest.approx(30, abs=1.5)
    # 16 items whose projections scatter by the noise of both models, √2
    assert point.t == pytest.approx(30 / (2**0.5 / 4), rel=0.5)
    assert [p.layer for p in anchor.curve] == list(range(LAYERS))
    assert all(abs(p.t) < 3 for p in anchor.curve[:4])


def by_hand() -> tuple[torch.Tensor, torch.Tensor]:
    """Four items in two dimensions, one layer."""
    expert = torch.tensor([[3.0, 1.0], [4.0, -1.0], [5.0, -1.0], [4.0, 1.0]], dtype=torch.float64)[:, None]
    base = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)[:, None]
    return expert, base


def test_the_numbers_of_a_contrast_anchor_by_hand() -> None:
    expert, base = by_hand()
    anchor = fit(expert, base, layer=0)
    # both halves' directions, and that of all items, are (4, 0): unit (1, 0); the changes along it are 2, 4 | 4, 2
    assert anchor.direction.tolist() == [1.0, 0.0]
    (point,) = anchor.curve
    assert (point.cosine, point.gap) == (pytest.approx(1), pytest.approx(3))
    deviation = (4 / 3) ** 0.5
    assert point.t == pytest.approx(3 / (deviation / 2))
    # the mean change is (3, 0), and its projections are 3 at every item: (2 + 4 + 4 + 2) · 3 over the gap of 4
    assert point.carried == pytest.approx(9)


def test_a_pair_anchor_takes_its_direction_from_the_difference() -> None:
    expert, base = by_hand()
    anchor = fit(expert, base, kind="pair", layer=0)
    # halves' mean differences: items 0, 2: (3, 0); items 1, 3: (3, 0)
    assert anchor.direction.tolist() == [1.0, 0.0]
    turned = fit(expert + 5, base + 5, kind="pair", layer=0)
    assert torch.equal(turned.direction, anchor.direction)
    assert fit(expert + 5, base + 5, layer=0).direction.tolist() != [1.0, 0.0]


@pytest.mark.parametrize("kind", ["contrast", "pair"])
def test_the_gap_is_cross_fitted(kind: str) -> None:
    """Pure noise. In sample a pair anchor's gap is positive by construction; read with the other half's direction
    the statistic is centred on 0. Its tails are wider than Student's, since the two halves' gaps share ⟨m₀, m₁⟩."""
    found = []
    for seed in range(40):
        expert, base = noise(2 * seed, layers=5), noise(2 * seed + 1, layers=5)
        anchor = fit(expert, base, kind=kind, accept=True)
        found += [point.t for point in anchor.curve]
    t = torch.tensor(found)
    assert abs(float(t.mean())) < 0.35
    assert float((t.abs() > 3).float().mean()) < 0.15
    assert float((t.abs() > 6).float().mean()) < 0.02


def test_pure_noise_is_refused_with_its_numbers_and_accepted_on_demand() -> None:
    expert, base = noise(0), noise(1)
    with pytest.raises(AnchorError, match="no layer gives a reliable anchor") as caught:
        fit(expert, base, kind="pair", name="haiku")
    assert caught.value.where == "haiku"
    accepted = fit(expert, base, kind="pair", accept=True)
    assert not accepted.reliable
    best = max(accepted.curve[:9], key=lambda point: point.t)
    assert accepted.layer == best.layer
    assert f"layer {best.layer}" in str(caught.value.got)
    assert f"t {best.t:.1f}" in str(caught.value.got)
    assert f"cosine {best.cosine:.2f}" in str(caught.value.got)
    assert "t at least 5.0" in str(caught.value.expected)
    assert "--accept-anchor" in str(caught.value.mend)


def test_the_chosen_layer_carries_half_of_what_the_best_layer_carries() -> None:
    """Stable and separating from layer 2 on; what the output sees of the direction grows at layer 5."""
    direction = unit(7)
    expert, base = planted([0.0, 0.0] + [40.0] * 8, direction), noise(1)
    strengths = torch.tensor([0.0, 0.0, 0.4, 0.4, 0.4, 0.6, 1.0, 1.0, 1.0, 9.0], dtype=torch.float64)
    slopes = (strengths[:, None] * direction).expand(ITEMS, LAYERS, WIDTH)
    seen = Behaviour(slopes=slopes, moves=expert - base, gap=40.0 * ITEMS)
    anchor = fit(expert, base, behaviour=seen)
    assert anchor.layer == 5, "the last layer, which carries most, is too late to count"
    assert [point.carried for point in anchor.curve] == pytest.approx(strengths.tolist(), rel=0.05, abs=0.02)
    assert all(point.t > 5 and point.cosine > 0.9 for point in anchor.curve[2:])
    against = Behaviour(slopes=-slopes, moves=expert - base, gap=40.0 * ITEMS)
    with pytest.raises(AnchorError, match="no layer gives a reliable anchor"):
        fit(expert, base, behaviour=against)


@pytest.mark.parametrize(("share", "passes"), [(0.02, True), (0.005, False)])
def test_a_direction_that_carries_next_to_nothing_is_no_anchor(share: float, passes: bool) -> None:
    """Stable and separating at every layer, and one layer carries as much as another: a mark on the prompt."""
    direction = unit(7)
    expert, base = planted([40.0] * 10, direction), noise(1)
    slopes = (share * direction).expand(ITEMS, LAYERS, WIDTH)
    anchor = fit(expert, base, behaviour=Behaviour(slopes=slopes, moves=expert - base, gap=40.0 * ITEMS), accept=True)
    assert anchor.reliable == passes


def test_halves_that_disagree_do_not_make_an_anchor() -> None:
    """Every half's own direction is strong, and they share enough for a large t, but not for a cosine of 0.9."""
    one, other = unit(7), unit(8)
    other = torch.nn.functional.normalize(other - (other @ one) * one, dim=0)
    expert = planted([0.0] * 10, one)
    for half, sign in ((slice(0, None, 2), 1), (slice(1, None, 2), -1)):
        expert[half] += 40 * one + sign * 30 * other
    with pytest.raises(AnchorError) as caught:
        fit(expert, noise(1))
    # (40² − 30²) / (40² + 30²) = 0.28
    cosine = float(str(caught.value.got).split("cosine ")[1].split(",")[0])
    assert cosine == pytest.approx(0.28, abs=0.1)


def test_the_last_tenth_of_the_depth_is_never_chosen() -> None:
    direction = unit(7)
    late = planted([0.0] * 9 + [30.0], direction)
    with pytest.raises(AnchorError):
        fit(late, noise(1))
    assert fit(late, noise(1), accept=True).layer < 9
    assert fit(planted([0.0] * 8 + [30.0, 30.0], direction), noise(1)).layer == 8
    assert fit(late, noise(1), layer=9).layer == 9, "unless the user says so"


def test_a_layer_on_demand_keeps_the_curve() -> None:
    expert, base = planted([0.0] * 4 + [30.0] * 6, unit(7)), noise(1)
    free, forced = fit(expert, base), fit(expert, base, layer=7)
    assert forced.layer == 7
    assert forced.curve == free.curve
    assert torch.equal(forced.direction, torch.nn.functional.normalize(expert[:, 7].mean(dim=0), dim=0).float())


@pytest.mark.parametrize("layer", [-1, 10, 99])
def test_a_layer_that_does_not_exist_is_refused(layer: int) -> None:
    with pytest.raises(AnchorError) as caught:
        fit(noise(0), noise(1), layer=layer)
    assert caught.value.got == layer
    assert "0 to 9" in str(caught.value.expected)


def test_models_that_are_the_same_have_no_anchor() -> None:
    same = noise(0)
    for kind in ("contrast", "pair"):
        with pytest.raises(AnchorError):
            fit(same, same, kind=kind)


def test_an_anchor_reads_pairs_in_turn_and_prompts_alone() -> None:
    point = fit(planted([0.0] * 4 + [30.0] * 6, unit(7)), noise(1))
    contrast = anchor_readout(point, 3)
    assert (list(contrast.item), list(contrast.sign)) == ([0, 0, 1, 1, 2, 2], [1, -1, 1, -1, 1, -1])
    assert (contrast.layer, contrast.items, contrast.reads_output) == (4, 3, False)
    pair = anchor_readout(fit(planted([0.0] * 4 + [30.0] * 6, unit(7)), noise(1), kind="pair"), 3)
    assert (list(pair.item), list(pair.sign)) == ([0, 1, 2], [1, 1, 1])


@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_last_token_states_are_transformers_own(model_type: str) -> None:
    model = tiny_model(model_type, seed=0, dtype=torch.float64)
    weights = ModelWeights.of(model)
    engine = Engine(weights.layout, dtype=torch.float64)
    sequences = [[3, 4, 5, 9, 17], [3, 4, 5, 40, 8, 21, 33, 7], [3, 4, 5, 50]]
    found = token_states(engine, weights, pack(sequences, tokens_per_row=9), 3)
    assert found.shape == (3, 3, 16)
    for number, sequence in enumerate(sequences):
        with torch.no_grad():
            states = model(torch.tensor([sequence]), output_hidden_states=True).hidden_states
        # the last of transformers' states has gone through the final norm already
        for layer in range(2):
            torch.testing.assert_close(found[number, layer], states[layer + 1][0, -1], rtol=1e-11, atol=1e-11)


def test_states_and_readout_of_a_span_are_means_over_its_tokens() -> None:
    weights = ModelWeights.of(tiny_model("llama", seed=0, dtype=torch.float64))
    engine = Engine(weights.layout, dtype=torch.float64)
    sequences, starts = [[3, 4, 5, 9, 17], [3, 4, 40, 8]], [3, 2]
    rows = pack(sequences)
    ends = [[[3, 4, 5, 9], [3, 4, 5, 9, 17]], [[3, 4, 40], [3, 4, 40, 8]]]
    alone = [token_states(engine, weights, pack(each), len(each)).mean(dim=0) for each in ends]
    found = token_states(engine, weights, rows, 2, starts=starts)
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-10, atol=1e-12)
    direction = torch.nn.functional.normalize(torch.arange(16.0, dtype=torch.float64), dim=0)
    readout = AnchorReadout(layer=1, direction=direction, item=[0, 0], sign=[1.0, -1.0], items=1, starts=starts)
    expected = (found[0, 1] - found[1, 1]) @ direction
    torch.testing.assert_close(measure(engine, weights, rows, readout)[0], expected, rtol=1e-10, atol=1e-12)


def test_halves_have_directions_of_their_own() -> None:
    expert, base = planted([0.0] * 4 + [30.0] * 6, unit(7)), noise(1)
    anchor = fit(expert, base)
    for number, half in enumerate(HALVES):
        own = torch.nn.functional.normalize(expert[half].mean(dim=0), dim=-1).float()
        assert torch.equal(anchor.halves[number], own)
    assert torch.equal(anchor.direction, anchor.directions[anchor.layer])


@pytest.mark.parametrize("gap", [0.0, -1.0, float("nan")])
def test_without_a_behavioural_gap_nothing_is_carried(gap: float) -> None:
    expert, base = planted([0.0] * 4 + [30.0] * 6, unit(7)), noise(1)
    none = dataclasses.replace(behaviour(expert, base), gap=gap)
    with pytest.raises(AnchorError, match="no layer gives a reliable anchor"):
        fit(expert, base, behaviour=none)
    assert not fit(expert, base, behaviour=none, accept=True).reliable
