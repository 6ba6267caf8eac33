"""Units: a partition of the parameters, and hand-checked slices of every way that a tensor is shared."""

import pytest
import torch
from tiny import CONFIGS, ModelWeights, tiny_model

from wpmerge.arch import ARCHITECTURES, COARSE_KINDS, LAYER_KINDS, MODEL_KINDS, Layout, Slice, Unit, architecture_of
from wpmerge.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]


def layout_and_shapes(model_type: str, **changes: object) -> tuple[Layout, Shapes]:
    layout = ModelWeights.of(tiny_model(model_type, seed=0, **changes)).layout
    return layout, dict(layout.shapes)


def spans(layout: Layout, unit: Unit) -> set[tuple[str, int | None, int, int]]:
    """A unit's slices, names without the layer's prefix."""
    prefix = layout.layer_prefix(unit.layer)
    return {(s.tensor.removeprefix(prefix), s.axis, s.start, s.stop) for s in layout.slices(unit)}


def head(layer: int, index: int) -> Unit:
    return Unit(kind="head", layer=layer, index=index)


def mark(counts: dict[str, torch.Tensor], piece: Slice) -> None:
    target = counts[piece.tensor]
    if piece.axis is not None:
        assert 0 <= piece.start < piece.stop <= target.shape[piece.axis], piece
        target = target.narrow(piece.axis, piece.start, piece.stop - piece.start)
    target += 1


@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_every_element_is_in_exactly_one_finest_unit(model_type: str) -> None:
    model = tiny_model(model_type, seed=0)
    layout = ModelWeights.of(model).layout
    counts = {name: torch.zeros(p.shape, dtype=torch.int64) for name, p in model.named_parameters()}
    total = 0
    for kind in layout.counts:
        for unit in layout.units(kind):
            total += layout.parameters(unit)
            for piece in layout.slices(unit):
                mark(counts, piece)
    for name, count in counts.items():
        assert torch.equal(count, torch.ones_like(count)), name
    assert total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_coarse_units_are_unions_of_finest_ones(model_type: str) -> None:
    layout, shapes = layout_and_shapes(model_type)
    inner = {name for name in shapes if name.startswith(layout.layer_prefix(1))}

    def tensors(unit: Unit) -> set[str]:
        assert all(piece.axis is None for piece in layout.slices(unit))
        return {piece.tensor for piece in layout.slices(unit)}

    whole = tensors(Unit(kind="layer", layer=1, index=0))
    attention, mlp = (tensors(Unit(kind=kind, layer=1, index=0)) for kind in ("attention", "mlp"))
    assert whole == inner
    assert not attention & mlp
    # what is left beside the two modules is the layer's own norms (query and key norms lie inside attention)
    own = {f"{layout.layer_prefix(1)}{norm}." for norm in layout.arch.norms if "self_attn" not in norm}
    assert {name.rsplit(".", 1)[0] + "." for name in whole - attention - mlp} == own
    singles = [tensors(unit) for unit in layout.units("tensor") if unit.layer == 1]
    assert all(len(single) == 1 for single in singles)
    assert set().union(*singles) == inner
    assert len(singles) == len(inner)
    for kind in COARSE_KINDS:
        assert layout.shape(kind) == (3, len(inner) if kind == "tensor" else 1)


def test_llama_slices_by_hand() -> None:
    layout, _ = layout_and_shapes("llama")
    assert spans(layout, head(1, 3)) == {
        ("self_attn.q_proj.weight", 0, 12, 16),
        ("self_attn.q_proj.bias", 0, 12, 16),
        ("self_attn.o_proj.weight", 1, 12, 16),
    }
    assert spans(layout, Unit(kind="kv_group", layer=1, index=1)) == {
        (f"self_attn.{name}_proj.{leaf}", 0, 4, 8) for name in "kv" for leaf in ("weight", "bias")
    }
    assert spans(layout, Unit(kind="neuron", layer=0, index=31)) == {
        ("mlp.gate_proj.weight", 0, 31, 32),
        ("mlp.gate_proj.bias", 0, 31, 32),
        ("mlp.up_proj.weight", 0, 31, 32),
        ("mlp.up_proj.bias", 0, 31, 32),
        ("mlp.down_proj.weight", 1, 31, 32),
    }
    assert [s.tensor for s in layout.slices(Unit(kind="output_bias", layer=2, index=1))] == [
        "model.layers.2.mlp.down_proj.bias"
    ]
    assert layout.labels("output_bias") == ["self_attn.o_proj", "mlp.down_proj"]
    assert layout.labels("norm") == ["input_layernorm", "post_attention_layernorm"]
    assert layout.labels("head") is None
    # 4 rows of 16 and their 4 biases, 4 columns of 16; a neuron has two rows, two biases, one column
    assert layout.parameters(head(0, 0)) == 4 * 16 + 4 + 16 * 4
    assert layout.parameters(Unit(kind="neuron", layer=0, index=0)) == 2 * 16 + 2 + 16
    assert layout.counts == {
        "head": 4,
        "neuron": 32,
        "kv_group": 2,
        "norm": 2,
        "output_bias": 2,
        "embedding": 1,
        "final_norm": 1,
    }
    assert layout.tied
    assert layout.head == layout.embedding == "model.embed_tokens.weight"


def test_phi3_stacks_query_key_value_and_gate_up_by_rows() -> None:
    layout, _ = layout_and_shapes("phi3")
    assert spans(layout, head(2, 1)) == {("self_attn.qkv_proj.weight", 0, 4, 8), ("self_attn.o_proj.weight", 1, 4, 8)}
    assert spans(layout, Unit(kind="kv_group", layer=0, index=1)) == {
        ("self_attn.qkv_proj.weight", 0, 16 + 4, 16 + 8),
        ("self_attn.qkv_proj.weight", 0, 16 + 8 + 4, 16 + 8 + 8),
    }
    assert spans(layout, Unit(kind="neuron", layer=0, index=5)) == {
        ("mlp.gate_up_proj.weight", 0, 5, 6),
        ("mlp.gate_up_proj.weight", 0, 32 + 5, 32 + 6),
        ("mlp.down_proj.weight", 1, 5, 6),
    }


def test_neox_interleaves_query_key_value_per_head() -> None:
    layout, _ = layout_and_shapes("gpt_neox")
    fused = "attention.query_key_value"
    assert spans(layout, head(0, 2)) == {
        (f"{fused}.weight", 0, 24, 28),
        (f"{fused}.bias", 0, 24, 28),
        ("attention.dense.weight", 1, 8, 12),
    }
    assert spans(layout, Unit(kind="kv_group", layer=0, index=2)) == {
        (f"{fused}.{leaf}", 0, start, start + 4) for leaf in ("weight", "bias") for start in (28, 32)
    }


def test_gpt2_stores_its_projections_transposed() -> None:
    layout, _ = layout_and_shapes("gpt2")
    assert spans(layout, head(1, 3)) == {
        ("attn.c_attn.weight", 1, 12, 16),
        ("attn.c_attn.bias", 0, 12, 16),
        ("attn.c_proj.weight", 0, 12, 16),
    }
    assert spans(layout, Unit(kind="kv_group", layer=1, index=3)) == {
        ("attn.c_attn.weight", 1, 28, 32),
        ("attn.c_attn.weight", 1, 44, 48),
        ("attn.c_attn.bias", 0, 28, 32),
        ("attn.c_attn.bias", 0, 44, 48),
    }
    assert spans(layout, Unit(kind="neuron", layer=1, index=7)) == {
        ("mlp.c_fc.weight", 1, 7, 8),
        ("mlp.c_fc.bias", 0, 7, 8),
        ("mlp.c_proj.weight", 0, 7, 8),
    }
    assert layout.labels("output_bias") == ["attn.c_proj", "mlp.c_proj"]
    assert spans(layout, Unit(kind="norm", layer=1, index=1)) == {
        ("ln_2.weight", None, 0, 1),
        ("ln_2.bias", None, 0, 1),
    }
    assert layout.counts["positions"] == 1


def test_units_come_layer_by_layer_and_name_themselves() -> None:
    layout, _ = layout_and_shapes("mistral")
    assert [str(unit) for unit in layout.units("kv_group")] == [
        f"kv_group.{layer}.{index}" for layer in range(3) for index in range(2)
    ]
    assert [str(unit) for unit in layout.units("lm_head")] == ["lm_head"]
    assert layout.shape("head") == (3, 4)
    assert layout.shape("embedding") == (1, 1)
    assert set(LAYER_KINDS) & set(layout.counts) == {"head", "neuron", "kv_group", "norm"}
    assert set(MODEL_KINDS) & set(layout.counts) == {"embedding", "final_norm", "lm_head"}
    assert not layout.tied
    assert layout.head == "lm_head.weight"
    outer = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert set(layout.outer_tensors()) == outer
    assert {name for layer in range(3) for name in layout.layer_tensors(layer)} == set(layout.shapes) - outer


def test_layer_one_is_not_layer_ten() -> None:
    layout, _ = layout_and_shapes("mistral", num_hidden_layers=11)
    assert len(layout.layer_tensors(1)) == len(layout.layer_tensors(10)) == 9
    assert all(name.startswith("model.layers.1.") for name in layout.layer_tensors(1))


def test_gpt2_checkpoints_without_prefix_and_with_buffers() -> None:
    layout, shapes = layout_and_shapes("gpt2")
    bare: Shapes = {name.removeprefix("transformer."): shape for name, shape in shapes.items()}
    bare |= {"h.0.attn.bias": (1, 1, 64, 64), "h.0.attn.masked_bias": (), "lm_head.weight": (61, 16)}
    found = Layout(layout.config, bare)
    assert found.tensors == layout.tensors
    assert found.stored["transformer.h.1.attn.c_attn.weight"] == "h.1.attn.c_attn.weight"
    assert set(found.stored.values()) == {name.removeprefix("transformer.") for name in shapes}


def test_pythia_stores_its_head_under_its_own_name() -> None:
    layout, shapes = layout_and_shapes("gpt_neox")
    stored = {("embed_out.weight" if name == "lm_head.weight" else name): shape for name, shape in shapes.items()}
    found = Layout(layout.config, stored)
    assert found.tensors == layout.tensors
    assert found.stored["lm_head.weight"] == "embed_out.weight"


def test_a_stored_copy_of_a_tied_head_is_no_unit() -> None:
    layout, shapes = layout_and_shapes("llama")
    found = Layout(layout.config, shapes | {"lm_head.weight": (61, 16)})
    assert found.tied
    assert found.tensors == layout.tensors


def test_unknown_architecture_is_refused_with_the_list() -> None:
    with pytest.raises(CheckpointError) as caught:
        architecture_of({"model_type": "mamba"})
    assert caught.value.got == "mamba"
    assert all(known in str(caught.value.expected) for known in ARCHITECTURES)
    assert len(ARCHITECTURES) == 10
    with pytest.raises(CheckpointError, match="bidirectional"):
        architecture_of({"model_type": "gemma3_text", "use_bidirectional_attention": True})


@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_any_missing_weight_is_refused_by_name(model_type: str) -> None:
    layout, shapes = layout_and_shapes(model_type)
    for name in (name for name in shapes if name.endswith(".weight") and ".1." not in name):
        with pytest.raises(CheckpointError, match="lacks a tensor") as caught:
            Layout(layout.config, {kept: shape for kept, shape in shapes.items() if kept != name})
        assert caught.value.where == name


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.mlp.up_proj.weight",  # a layer too many
        "model.layers.0.mlp.experts.weight",
        "model.layers.0.mlp.up_proj.scale",
        "model.embed_positions.weight",
        "visual.weight",
    ],
)
def test_an_extra_tensor_is_refused_by_name(name: str) -> None:
    layout, shapes = layout_and_shapes("mistral")
    with pytest.raises(CheckpointError, match="does not have") as caught:
        Layout(layout.config, shapes | {name: (16, 16)})
    assert caught.value.where == name


def test_sizes_that_contradict_the_config_are_refused() -> None:
    layout, shapes = layout_and_shapes("mistral")
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(CheckpointError, match="size that config") as caught:
        Layout(layout.config, shapes | {name: (16, 16)})
    assert caught.value.where == name
    assert caught.value.expected == "8 along axis 0"
    sizes = {key: value for key, value in layout.config.items() if key != "num_hidden_layers"}
    with pytest.raises(CheckpointError, match="lacks a size"):
        Layout(sizes, shapes)
