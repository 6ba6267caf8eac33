"""In memory, mergekit's methods give the tensors that its own run on a recipe gives, for every rival."""

import math

import pytest
import torch
from checkpoints import CONFIG, llama_shapes, random_weights, write_checkpoint

from wpmerge.bench_mergekit import MergekitInMemory, draw_seed, whole_state
from wpmerge.checkpoint import open_checkpoint
from wpmerge.models import layout_of
from wpmerge.plan import Coefficient
from wpmerge.strategies import RIVALS
from wpmerge.weights import CheckpointWeights, StateWeights

NAMES = ("a", "b", "c")
POINTS = {"density": 0.6, "lambda": 1.3, "select_topk": 0.4, "filter_wise": 1.0, "t": 0.3, "flatten": 1.0}
POINTS |= {"weight.a": 0.7, "weight.b": 1.1, "weight.c": 0.4}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base and three experts in float32, one of which leaves a tensor alone."""
    place, config = tmp_path_factory.mktemp("family"), CONFIG | {"dtype": "float32"}
    base = random_weights(0, llama_shapes(), torch.float32)
    paths = {"base": write_checkpoint(place / "base", base, config=config)}
    for number, name in enumerate(NAMES, start=1):
        moved = random_weights(number, llama_shapes(), torch.float32)
        tensors = {tensor: value + 0.1 * moved[tensor] for tensor, value in base.items()}
        if name == "b":
            tensors["model.layers.0.mlp.up_proj.weight"] = base["model.layers.0.mlp.up_proj.weight"].clone()
        paths[name] = write_checkpoint(place / name, tensors, config=config)
    return paths


@pytest.fixture
def merger(made):
    base = open_checkpoint(made["base"])
    layout = layout_of(base)
    cpu = torch.device("cpu")
    experts = {name: CheckpointWeights(layout, open_checkpoint(made[name]), device=cpu) for name in NAMES}
    return MergekitInMemory(layout, CheckpointWeights(layout, base, device=cpu), experts)


def run_mergekit(document, out):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    run_merge(MergeConfiguration.model_validate(document), str(out), MergeOptions(quiet=True, copy_tokenizer=False))
    return open_checkpoint(out)


def recipe(made, method, subset, numbers):
    models = []
    for name in subset:
        parameters = {"weight": numbers.weights[name]} if name in numbers.weights else {}
        if numbers.density is not None:
            parameters["density"] = numbers.density
        models.append({"model": str(made[name]), "parameters": parameters})
    per_model = {key: value for key, value in numbers.shared.items() if key in ("epsilon", "gamma")}
    for model in models:
        model["parameters"] |= per_model
    shared = {key: value for key, value in numbers.shared.items() if key not in per_model}
    document = {"models": models, "merge_method": method, "parameters": shared, "dtype": "float32"}
    return document if method in ("linear", "karcher") else document | {"base_model": str(made["base"])}


def drawing_as_we_do(monkeypatch, merger, seed):
    """mergekit draws from one global generator, tensor after tensor; give it our seed before each of its draws."""
    from mergekit.merge_methods import generalized_task_arithmetic as methods

    real = methods.sparsify

    def sparsify(delta, **settings):
        for expert, tensors in merger.deltas.items():
            for name, known in tensors.items():
                if known.shape == delta.shape and torch.equal(known, delta):
                    torch.manual_seed(draw_seed(seed, expert, name))
        return real(delta, **settings)

    monkeypatch.setattr(methods, "sparsify", sparsify)


@pytest.mark.parametrize("subset", [NAMES, ("a", "c")])
@pytest.mark.parametrize("name", list(RIVALS))
def test_in_memory_is_what_mergekit_makes_of_the_recipe(tmp_path, monkeypatch, made, merger, name, subset):
    rival = RIVALS[name]
    if rival.largest is not None and len(subset) > rival.largest:
        pytest.skip(f"{name} merges at most {rival.largest}")
    point = {key: POINTS[key] for key in rival.space(subset).start}
    numbers = rival.numbers(subset, point)
    first = merger.merge(rival.method, subset, numbers, seed=5)
    again = merger.merge(rival.method, subset, numbers, seed=5)  # from what was kept
    other = merger.merge(rival.method, subset, numbers, seed=6)
    drawing_as_we_do(monkeypatch, merger, 5)
    theirs = run_mergekit(recipe(made, rival.method, subset, numbers), tmp_path / "theirs")
    assert set(theirs.tensors) == set(first.tensors)
    for tensor in first.tensors:
        assert torch.equal(first.tensors[tensor], again.tensors[tensor]), tensor
        assert torch.equal(first.tensors[tensor], theirs.load(tensor)), tensor
    same = all(torch.equal(first.tensors[tensor], other.tensors[tensor]) for tensor in first.tensors)
    assert same != rival.drawn


def test_a_kept_mask_gives_what_was_sparsified_first(merger):
    """Another density in between throws the float copy away; the bits bring it back, another seed does not."""
    rival = RIVALS["della"]
    point = {key: POINTS[key] for key in rival.space(NAMES).start}

    def merged(density, seed=0):
        return merger.merge("della", NAMES, rival.numbers(NAMES, point | {"density": density}), seed=seed).tensors

    first = merged(0.6)
    merged(0.4)
    again, other = merged(0.6), merged(0.6, seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_draw_does_not_hang_on_what_else_is_merged(merger):
    rival = RIVALS["dare_linear"]
    point = {"density": 0.5, "weight.a": 1.0, "weight.b": 0.0, "weight.c": 0.0}
    alone = merger.merge("dare_linear", ("a", "b"), rival.numbers(("a", "b"), point), seed=2)
    more = merger.merge("dare_linear", ("c", "b", "a"), rival.numbers(("c", "b", "a"), point), seed=2)
    for name in alone.tensors:
        torch.testing.assert_close(alone.tensors[name], more.tensors[name], rtol=0, atol=0)


def test_coefficients_are_applied_to_task_vectors(merger):
    name = "model.layers.1.mlp.down_proj.weight"
    flat = {merger.layout.stored[tensor]: Coefficient(values=torch.tensor(0.0)) for tensor in merger.layout.tensors}
    vector = torch.linspace(0, 1, merger.base[name].shape[1])
    merged = merger.with_coefficients({"a": {**flat, name: Coefficient(values=vector, axis=1)}, "b": flat})
    expected = merger.base[name] + vector * (merger.experts["a"][name] - merger.base[name])
    assert torch.equal(merged.tensors[name], expected)
    others = [tensor for tensor in merged.tensors if tensor != name]
    assert all(torch.equal(merged.tensors[tensor], merger.base[tensor]) for tensor in others)


def test_state_weights_are_a_source(merger):
    source = StateWeights(layout=merger.layout, tensors=merger.base)
    assert whole_state(merger.layout, source).keys() == merger.base.keys()
    assert math.prod(source.layer(1)["mlp.up_proj.weight"].shape) == 24 * 16
