"""Sources of weights: from disk, mixed, patched."""

from pathlib import Path

import pytest
import torch
from checkpoints import CONFIG, llama_shapes, random_weights, write_checkpoint
from tiny import CONFIGS, ModelWeights, tiny_model

from wpmerge.arch import LAYER_KINDS, Layout, Slice, Unit
from wpmerge.checkpoint import open_checkpoint
from wpmerge.errors import CheckpointError
from wpmerge.models import layout_of
from wpmerge.weights import CheckpointWeights, MixedWeights, differs, swap, swap_kind

CPU = torch.device("cpu")


def from_disk(path: Path, tensors: dict[str, torch.Tensor], **options: bool) -> CheckpointWeights:
    write_checkpoint(path, tensors, shards=3)
    layout = Layout(CONFIG, {name: tuple(value.shape) for name, value in tensors.items()})
    return CheckpointWeights(layout, open_checkpoint(path), device=CPU, **options)


def test_layers_and_the_rest_come_from_disk_in_the_compute_dtype(tmp_path: Path) -> None:
    tensors = random_weights(0, llama_shapes())
    source = from_disk(tmp_path / "base", tensors)
    found = {f"model.layers.{i}.{name}": value for i in range(2) for name, value in source.layer(i).items()}
    found |= source.outer()
    assert found.keys() == tensors.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, tensors[name].float()), name


@pytest.mark.parametrize("resident", [True, False])
def test_resident_weights_are_read_once(tmp_path: Path, resident: bool) -> None:
    source = from_disk(tmp_path / "base", random_weights(0, llama_shapes()), resident=resident)
    name = "mlp.up_proj.weight"
    first, second = source.layer(0)[name], source.layer(0)[name]
    assert (first.data_ptr() == second.data_ptr()) is resident
    assert torch.equal(first, second)
    assert not torch.equal(first, source.layer(1)[name])


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_when_read(tmp_path: Path, bad: float) -> None:
    tensors = random_weights(0, llama_shapes())
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 2] = bad
    source = from_disk(tmp_path / "base", tensors)
    source.layer(0)
    with pytest.raises(CheckpointError, match="not finite") as caught:
        source.layer(1)
    assert name in str(caught.value.where)
    assert f"flat index {3 * 16 + 2}" in str(caught.value.got)


def test_swap_replaces_the_slices_and_nothing_else() -> None:
    into = {"a": torch.zeros(4, 3), "b": torch.zeros(2), "c": torch.zeros(5)}
    source = {name: torch.ones_like(value) for name, value in into.items()}
    pieces = [
        Slice(tensor="layer.a", axis=0, start=1, stop=2),
        Slice(tensor="layer.a", axis=1, start=2, stop=3),
        Slice(tensor="layer.b", axis=None, start=0, stop=1),
    ]
    patched = swap(pieces, into, source, prefix="layer.")
    assert patched["a"].tolist() == [[0, 0, 1], [1, 1, 1], [0, 0, 1], [0, 0, 1]]
    assert patched["b"].tolist() == [1, 1]
    assert patched["c"] is into["c"]
    assert all(torch.equal(value, torch.zeros_like(value)) for value in into.values())


@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_swapping_a_kind_is_swapping_its_units(model_type: str) -> None:
    base, expert = (ModelWeights.of(tiny_model(model_type, seed=seed)) for seed in (0, 1))
    layout, prefix = base.layout, base.layout.layer_prefix(1)
    everything = base.layer(1)
    for kind in (kind for kind in LAYER_KINDS if kind in layout.counts):
        together = swap_kind(layout, kind, 1, base.layer(1), expert.layer(1))
        pieces = [piece for unit in layout.units(kind) if unit.layer == 1 for piece in layout.slices(unit)]
        one_by_one = swap(pieces, base.layer(1), expert.layer(1), prefix=prefix)
        assert all(torch.equal(together[name], one_by_one[name]) for name in together), kind
        everything = swap_kind(layout, kind, 1, everything, expert.layer(1))
    assert all(torch.equal(everything[name], value) for name, value in expert.layer(1).items())


def test_differs_looks_at_the_slices_only() -> None:
    base = ModelWeights.of(tiny_model("llama", seed=0))
    layout, prefix = base.layout, base.layout.layer_prefix(0)
    other = {name: value.clone() for name, value in base.layer(0).items()}
    other["self_attn.q_proj.weight"][5, 0] += 1  # row 5 is head 1's
    for index in range(4):
        pieces = layout.slices(Unit(kind="head", layer=0, index=index))
        assert differs(pieces, base.layer(0), other, prefix=prefix) is (index == 1)
    whole = layout.slices(Unit(kind="norm", layer=0, index=0))
    assert not differs(whole, base.layer(0), other, prefix=prefix)


def test_mixed_weights_hand_over_canonical_names_and_tensors_in_order() -> None:
    base, expert = (ModelWeights.of(tiny_model("gpt2", seed=seed)) for seed in (0, 1))
    seen = []

    def mix(name: str, pair: tuple[torch.Tensor, ...]) -> torch.Tensor:
        seen.append(name)
        return pair[0] + 10 * pair[1]

    mixed = MixedWeights(layout=base.layout, sources=(base, expert), mix=mix)
    found = {base.layout.layer_prefix(2) + name: value for name, value in mixed.layer(2).items()} | mixed.outer()
    assert set(seen) == set(found)
    assert all(name in base.tensors for name in seen)
    for name, value in found.items():
        assert torch.equal(value, base.tensors[name] + 10 * expert.tensors[name])


def test_streamed_matrices_outside_the_layers_stay_as_they_are_stored(tmp_path: Path) -> None:
    model = tiny_model("gpt2", seed=0).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    layout = layout_of(checkpoint)
    streamed = CheckpointWeights(layout, checkpoint, device=torch.device("cpu"), resident=False)
    assert {value.dtype for value in streamed.outer().values() if value.ndim > 1} == {torch.bfloat16}
    assert {value.dtype for value in streamed.outer().values() if value.ndim == 1} == {torch.float32}
    assert {value.dtype for value in streamed.layer(1).values()} == {torch.float32}
    same = MixedWeights(layout=layout, sources=(streamed, streamed), mix=lambda _, pair: torch.lerp(*pair, 0.5))
    assert {value.dtype for value in same.outer().values()} == {torch.float32}
