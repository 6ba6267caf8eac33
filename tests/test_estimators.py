"""One interface for every estimator and kind: coarse units, rows in groups, pieces, and a CUDA device."""

import pytest
import torch
from test_patching import SEQUENCES, make_readouts
from tiny import CONFIGS, ModelWeights, tiny_model

from wpmerge.arch import COARSE_KINDS, KINDS, Unit
from wpmerge.engine import Engine
from wpmerge.estimators import ESTIMATORS, EstimatorName, EstimatorSettings, completeness, estimate
from wpmerge.memory import held_per_token
from wpmerge.patching import exact
from wpmerge.rows import pack, row_groups

ALL = (*KINDS, *COARSE_KINDS)
COARSE_OF = {"attention": ("self_attn", "attn", "attention"), "mlp": ("mlp",), "layer": ("",)}


class Memory:
    """Keeps pieces, and raises when so many were put."""

    def __init__(self, limit: int | None = None) -> None:
        self.kept: dict[str, dict[str, torch.Tensor]] = {}
        self.limit, self.prefix, self.puts = limit, "", 0

    def below(self, name: str) -> "Memory":
        view = Memory.__new__(Memory)
        view.__dict__ = self.__dict__ | {"prefix": f"{self.prefix}{name}-", "root": getattr(self, "root", self)}
        return view

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        return self.kept.get(self.prefix + key)

    def put(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        root = getattr(self, "root", self)
        root.puts += 1
        if root.limit is not None and root.puts > root.limit:
            raise KeyboardInterrupt
        self.kept[self.prefix + key] = {name: value.clone() for name, value in tensors.items()}


def setting(model_type: str, dtype: torch.dtype = torch.float64) -> tuple[Engine, ModelWeights, ModelWeights]:
    base, expert = (ModelWeights.of(tiny_model(model_type, seed=seed, dtype=dtype)) for seed in (0, 1))
    return Engine(base.layout, dtype=dtype), base, expert


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_every_estimator_scores_every_kind(model_type: str, name: EstimatorName) -> None:
    engine, base, expert = setting(model_type)
    layout = engine.layout
    for reading, readout in make_readouts(layout, torch.float64).items():
        (arrays,) = estimate(name, engine, base, [expert], pack(SEQUENCES), readout, EstimatorSettings(kinds=ALL))
        assert set(arrays) == {kind for kind in ALL if kind in layout.counts or kind in COARSE_KINDS}
        for kind, array in arrays.items():
            assert tuple(array.shape) == layout.shape(kind)
            unseen = array.isnan()
            if kind in ("final_norm", "lm_head"):
                assert unseen.all() == (reading == "anchor"), kind
            elif len(array) == layout.layers:
                assert unseen.all(dim=1).tolist() == [index > readout.layer for index in range(layout.layers)], kind
                assert not unseen[: readout.layer + 1].any(), kind


def test_exact_arrays_are_exact_patching() -> None:
    engine, base, expert = setting("olmo2")
    readout, rows = make_readouts(engine.layout, torch.float64)["reference"], pack(SEQUENCES)
    (arrays,) = estimate("exact", engine, base, [expert], rows, readout, EstimatorSettings(kinds=("head", "tensor")))
    for unit in (Unit(kind="head", layer=1, index=2), Unit(kind="tensor", layer=2, index=3)):
        (found,) = exact(engine, base, expert, rows, readout, [unit])
        assert float(arrays[unit.kind][unit.layer, unit.index]) == pytest.approx(float(found.mean()), rel=1e-9)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2"])
def test_coarse_shares_are_sums_of_fine_ones(model_type: str) -> None:
    engine, base, expert = setting(model_type)
    layout, readout = engine.layout, make_readouts(engine.layout, torch.float64)["reference"]
    (arrays,) = estimate(
        "integrated", engine, base, [expert], pack(SEQUENCES), readout, EstimatorSettings(kinds=ALL, points=2)
    )
    fine = sum(arrays[k].sum(dim=1) for k in ("head", "neuron", "kv_group", "norm", "output_bias") if k in arrays)
    torch.testing.assert_close(arrays["layer"][:, 0], fine)
    torch.testing.assert_close(arrays["tensor"].sum(dim=1), fine)
    total = completeness({kind: array for kind, array in arrays.items() if kind in KINDS})
    outside = sum(float(arrays[kind].sum()) for kind in layout.counts if layout.shape(kind)[0] == 1)
    assert total == pytest.approx(float(fine.sum()) + outside)
    norms = arrays["norm"].sum(dim=1) if model_type == "llama" else None
    if norms is not None:  # every other tensor of a layer is in one of the two blocks
        torch.testing.assert_close(arrays["attention"][:, 0] + arrays["mlp"][:, 0] + norms, fine)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_groups_of_rows_add_up(name: EstimatorName) -> None:
    engine, base, expert = setting("gemma2")
    readout, rows = make_readouts(engine.layout, torch.float64)["reference"], pack(SEQUENCES, tokens_per_row=1)
    assert len(list(row_groups(rows, 1))) == len(rows) > 2
    small = EstimatorSettings(kinds=("head", "norm", "embedding"), held_bytes=held_per_token(engine.layout, 2))
    steps: list[tuple[int, int]] = []
    (parts,) = estimate(
        name, engine, base, [expert], rows, readout, small, progress=lambda done, of: steps.append((done, of))
    )
    (whole,) = estimate(
        name, engine, base, [expert], rows, readout, EstimatorSettings(kinds=("head", "norm", "embedding"))
    )
    for kind, array in whole.items():
        torch.testing.assert_close(parts[kind], array, rtol=1e-6, atol=1e-9)
    assert all(0 <= done <= of for done, of in steps)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_stopped_estimate_goes_on_to_the_same_bits(name: EstimatorName) -> None:
    engine, base, expert = setting("qwen2", torch.float32)
    readout, rows = make_readouts(engine.layout, torch.float32)["reference"], pack(SEQUENCES)
    options = EstimatorSettings(kinds=("head", "neuron", "norm", "embedding", "final_norm", "lm_head"), points=3)
    whole = estimate(name, engine, base, [expert, base], rows, readout, options)
    complete = Memory()
    estimate(name, engine, base, [expert, base], rows, readout, options, keeper=complete)
    assert complete.puts >= 1
    for limit in range(complete.puts):
        memory = Memory(limit)
        with pytest.raises(KeyboardInterrupt):
            estimate(name, engine, base, [expert, base], rows, readout, options, keeper=memory)
        memory.limit = None
        again = estimate(name, engine, base, [expert, base], rows, readout, options, keeper=memory)
        for one, other in zip(whole, again, strict=True):
            for kind, array in one.items():
                assert torch.equal(other[kind].nan_to_num(9), array.nan_to_num(9)), (limit, kind)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_cuda_device_gives_the_same_scores(name: EstimatorName) -> None:
    engine, base, expert = setting("llama", torch.float32)
    device = torch.device("cuda")

    def moved(weights: ModelWeights) -> ModelWeights:
        return ModelWeights(weights.layout, {key: value.to(device) for key, value in weights.tensors.items()})

    there = Engine(engine.layout, device=device)
    rows, options = pack(SEQUENCES), EstimatorSettings(kinds=ALL)
    for readout in make_readouts(engine.layout, torch.float32).values():
        (here,) = estimate(name, engine, base, [expert], rows, readout, options)
        (found,) = estimate(name, there, moved(base), [moved(expert)], rows, readout, options)
        for kind, array in here.items():
            scale = float(array.abs().nan_to_num().max())
            torch.testing.assert_close(found[kind], array, rtol=0, atol=1e-3 * scale, equal_nan=True)
