"""The layer-by-layer engine against transformers' own models, and the properties that patching rests on."""

import pytest
import torch
from tiny import CONFIGS, ModelWeights, tiny_model

from wpmerge.arch import Layout, Unit
from wpmerge.engine import Engine, Entry
from wpmerge.errors import CheckpointError
from wpmerge.patching import exact
from wpmerge.readouts import LogProbReadout
from wpmerge.rows import Row, pack

WINDOW = 5
_DRAW = torch.Generator().manual_seed(1)
SEQUENCES = [[3, 4, 5, *torch.randint(3, 60, (n,), generator=_DRAW).tolist()] for n in (4, 9, 6, 12)]


@torch.no_grad()
def logits_by_layer(engine: Engine, weights: ModelWeights, row: Row) -> torch.Tensor:
    entry = engine.embed(weights.outer(), row)
    hidden = entry.hidden
    for index in range(weights.layout.layers):
        hidden = engine.layer(index, weights.layer(index), hidden, entry.calls[index])
    return engine.logits(weights.outer(), hidden)


def opened(model_type: str, dtype: torch.dtype = torch.float64, **changes: object) -> tuple[Engine, ModelWeights]:
    weights = ModelWeights.of(tiny_model(model_type, seed=0, dtype=dtype, **changes))
    return Engine(weights.layout, dtype=dtype), weights


def difference(model_type: str, **changes: object) -> float:
    """Largest difference to transformers' logits on single sequences, relative to the largest logit."""
    model = tiny_model(model_type, seed=0, dtype=torch.float64, **changes)
    weights = ModelWeights.of(model)
    engine = Engine(weights.layout, dtype=torch.float64)
    worst = 0.0
    for row in pack(SEQUENCES, tokens_per_row=22):
        found = logits_by_layer(engine, weights, row)
        for number, places in row.places.items():
            with torch.no_grad():
                truth = model(torch.tensor([SEQUENCES[number]])).logits[0]
            worst = max(worst, float((truth - found[0, places]).abs().max() / truth.abs().max()))
    return worst


@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_logits_are_transformers_own(model_type: str) -> None:
    assert max(map(len, SEQUENCES)) > WINDOW + 3, "a sequence outgrows the sliding window"
    assert difference(model_type) < 1e-12


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": False, "layer_types": None}),
        ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": 2.0}),
        ("phi3", {"partial_rotary_factor": 0.5}),
        ("olmo2", {"tie_word_embeddings": True, "attention_bias": True}),
    ],
)
def test_logits_with_less_common_settings(model_type: str, changes: dict[str, object]) -> None:
    assert difference(model_type, **changes) < 1e-12


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "gemma2", "gemma3_text", "phi3"])
def test_sliding_windows_matter(model_type: str) -> None:
    """So that the test above can fail: what lies beyond the window changes the logits of the windowed model only."""
    row = pack([SEQUENCES[3]])[0]
    found = []
    for window in (WINDOW, 60):
        engine, weights = opened(model_type, sliding_window=window)
        found.append(logits_by_layer(engine, weights, row))
    torch.testing.assert_close(found[0][:, :WINDOW], found[1][:, :WINDOW], rtol=1e-12, atol=1e-12)
    assert float((found[0] - found[1])[:, WINDOW:].abs().max()) > 1e-3


def entered(engine: Engine, weights: ModelWeights) -> tuple[Entry, torch.Tensor]:
    """A row at the entrance of layer 1."""
    with torch.no_grad():
        entry = engine.embed(weights.outer(), pack(SEQUENCES)[0])
        return entry, engine.layer(0, weights.layer(0), entry.hidden, entry.calls[0])


@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_taps_are_what_the_blocks_compute(model_type: str) -> None:
    engine, weights = opened(model_type)
    entry, hidden = entered(engine, weights)
    layer, call = weights.layer(1), entry.calls[1]
    with torch.no_grad():
        plain = engine.layer(1, layer, hidden, call)
        output, taps = engine.layer_with_taps(1, layer, hidden, call)
        assert torch.equal(output, plain)
        assert torch.equal(engine.attention(1, layer, taps.attention_call), taps.attention_out)
        assert torch.equal(engine.heads(1, layer, taps.attention_call), taps.z)
        assert torch.equal(engine.neurons(1, layer, taps.mlp_in), taps.n)
        arch = weights.layout.arch
        for written, inputs, projection, name in (
            (taps.attention_out, taps.z, engine.attention_projection(layer), arch.attention_out),
            (taps.mlp_out, taps.n, engine.mlp_projection(layer), arch.mlp_out),
        ):
            bias = layer.get(f"{name}.bias", torch.zeros(()))
            torch.testing.assert_close(inputs @ projection.T + bias, written, rtol=1e-12, atol=1e-12)
        # nothing of the taps stays behind
        assert torch.equal(engine.layer(1, layer, hidden, call), plain)


@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_forced_outputs_stand_for_what_the_blocks_write(model_type: str) -> None:
    engine, weights = opened(model_type)
    entry, hidden = entered(engine, weights)
    layer, call = weights.layer(1), entry.calls[1]
    with torch.no_grad():
        output, taps = engine.layer_with_taps(1, layer, hidden, call)
        both = engine.layer(1, layer, hidden, call, attention_out=taps.attention_out, mlp_out=taps.mlp_out)
        one = engine.layer(1, layer, hidden, call, attention_out=taps.attention_out)
        other = engine.layer(1, layer, hidden, call, mlp_out=taps.mlp_out)
        assert torch.equal(both, output)
        assert torch.equal(one, output)
        assert torch.equal(other, output)
        # blocks that write nothing leave the residual stream alone, post-norms or not
        nothing = torch.zeros_like(hidden)
        assert torch.equal(engine.layer(1, layer, hidden, call, attention_out=nothing, mlp_out=nothing), hidden)
        # and what attention writes reaches the MLP, unless the two run side by side
        moved = engine.layer(1, layer, hidden, call, attention_out=taps.attention_out + 1)
        assert float((moved - output).abs().max()) > 1e-3


def test_a_pre_norm_layer_adds_up_by_hand() -> None:
    engine, weights = opened("llama")
    entry, hidden = entered(engine, weights)
    written = [
        torch.randn(hidden.shape, generator=torch.Generator().manual_seed(n), dtype=hidden.dtype) for n in (0, 1)
    ]
    output = engine.layer(1, weights.layer(1), hidden, entry.calls[1], attention_out=written[0], mlp_out=written[1])
    torch.testing.assert_close(output, hidden + written[0] + written[1], rtol=1e-14, atol=1e-14)


def test_a_post_norm_stands_behind_a_forced_output() -> None:
    engine, weights = opened("olmo2")
    entry, hidden = entered(engine, weights)
    written, nothing = torch.full_like(hidden, 3.0), torch.zeros_like(hidden)
    layer = weights.layer(1)
    output = engine.layer(1, layer, hidden, entry.calls[1], attention_out=written, mlp_out=nothing)
    # every entry of 3 has the root mean square 3: normalised it is 1, times the norm's own weight
    expected = hidden + layer["post_attention_layernorm.weight"]
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_copies_in_one_batch_are_bit_exact(model_type: str) -> None:
    """A copy of the model that nothing was done to ends in the same bits wherever it stands in the batch."""
    engine, weights = opened(model_type, dtype=torch.float32)
    entry, hidden = entered(engine, weights)
    layer = weights.layer(1)
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    copies = torch.cat([hidden, hidden + noise, hidden, hidden])
    with torch.no_grad():
        output = engine.layer(1, layer, copies, entry.calls[1])
        output = engine.layer(2, weights.layer(2), output, entry.calls[2])
        logits = engine.logits(weights.outer(), output)
    assert torch.equal(output[0], output[2])
    assert torch.equal(output[0], output[3])
    assert torch.equal(logits[0], logits[2])
    assert not torch.equal(logits[0], logits[1])


def test_a_patch_that_changes_nothing_has_exactly_no_effect() -> None:
    """Units whose weights differ, but which write nothing: a dead gate's neuron, a head without output columns."""
    base, expert = (ModelWeights.of(tiny_model("mistral", seed=seed)) for seed in (0, 1))
    prefix = base.layout.layer_prefix(0)
    for weights in (base, expert):
        weights.tensors[f"{prefix}mlp.gate_proj.weight"][7] = 0
        weights.tensors[f"{prefix}self_attn.o_proj.weight"][:, 4:8] = 0
    engine = Engine(base.layout)
    readout = LogProbReadout(layer=2, sequences=SEQUENCES, starts=[4, 4, 4, 4])
    for kind, dead in (("neuron", 7), ("head", 1)):
        units = [Unit(kind=kind, layer=0, index=index) for index in range(base.layout.counts[kind])]
        effects = exact(engine, base, expert, pack(SEQUENCES, tokens_per_row=20), readout, units)
        assert torch.equal(effects[dead], torch.zeros_like(effects[dead])), kind
        assert float(effects.abs().amax(dim=1).median()) > 1e-4, "the others in its batch do have one"


@pytest.mark.parametrize("changed", ["missing", "extra", "shape"])
def test_weights_that_the_model_does_not_have_are_refused(changed: str) -> None:
    """Names that a rule covers, but that this config's model lacks, needs, or has in another size."""
    weights = ModelWeights.of(tiny_model("qwen2", seed=0))
    shapes = dict(weights.layout.shapes)
    if changed == "missing":
        name = "model.layers.1.self_attn.q_proj.bias"
        del shapes[name]
    elif changed == "extra":
        name = "model.layers.1.mlp.up_proj.bias"
        shapes[name] = (32,)
    else:
        name = "model.layers.1.mlp.up_proj.weight"
        shapes[name] = (32, 20)
    with pytest.raises(CheckpointError) as caught:
        Engine(Layout(weights.layout.config, shapes))
    assert caught.value.where == name


@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_matrices_as_stored_are_converted_where_they_are_used(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A streamed vocabulary stays in bfloat16: rows in use, and parts of the head, are converted. The same numbers."""
    monkeypatch.setattr("wpmerge.engine.HEAD_ROWS", 7)
    weights = ModelWeights.of(tiny_model(model_type, seed=0))
    engine, (row,) = Engine(weights.layout), pack([[3, 4, 5, 9, 17], [3, 4, 8]])
    stored = {name: value.bfloat16() if value.ndim > 1 else value for name, value in weights.outer().items()}
    whole = {name: value.float() for name, value in stored.items()}
    entries = [engine.embed(outer, row) for outer in (stored, whole)]
    assert torch.equal(entries[0].hidden, entries[1].hidden)
    assert entries[0].hidden.dtype == torch.float32
    logits = [engine.logits(outer, entries[0].hidden) for outer in (stored, whole)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)
