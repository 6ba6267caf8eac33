"""Recipes through stock mergekit, in this process, and through our engine, element by element."""

import pytest
import torch
import yaml
from checkpoints import CONFIG, LAYERS, family, llama_shapes, random_weights, write_checkpoint
from test_merging import make_plan, open_family, ulps

from wpmerge.checkpoint import open_checkpoint
from wpmerge.dtypes import Dtype
from wpmerge.errors import RecipeError
from wpmerge.exact_recipe import write_exact_recipe
from wpmerge.merging import merge, merge_recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base and two experts; weights wide enough that bfloat16 rounds everything."""
    return family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def made32(tmp_path_factory):
    """The same in float32: no two deltas of equal magnitude."""
    place, config = tmp_path_factory.mktemp("family32"), CONFIG | {"dtype": "float32"}
    return {
        name: write_checkpoint(place / name, random_weights(i, llama_shapes(), torch.float32), config=config)
        for i, name in enumerate(("base", "e0", "e1"))
    }


def with_mergekit(document, out):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(quiet=True, copy_tokenizer=False)
    run_merge(MergeConfiguration.model_validate(document), str(out), options)
    return open_checkpoint(out)


def both(tmp_path, document, **settings):
    """mergekit's checkpoint and ours."""
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(document))
    merge_recipe(tmp_path / "recipe.yml", tmp_path / "ours", **settings)
    theirs, ours = with_mergekit(document, tmp_path / "theirs"), open_checkpoint(tmp_path / "ours")
    assert list(theirs.tensors) == list(ours.tensors)
    return theirs, ours


def recipe(made, method="task_arithmetic", weights=(0.3, 0.7), **changes):
    models = [
        {"model": str(made[name]), "parameters": {"weight": weight}}
        for name, weight in zip(("e0", "e1"), weights, strict=True)
    ]
    return {"models": models, "merge_method": method, "base_model": str(made["base"])} | changes


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", None])
@pytest.mark.parametrize("parameters", [{}, {"lambda": 0.9, "normalize": True}])
def test_task_arithmetic_has_mergekits_own_bits(tmp_path, made, dtype, parameters):
    document = recipe(made, parameters=parameters) | ({"dtype": dtype} if dtype else {})
    theirs, ours = both(tmp_path, document, parity="mergekit")
    assert all(torch.equal(theirs.load(name), ours.load(name)) for name in ours.tensors)
    if dtype == "bfloat16":  # and they are worth asking for: float32 maths rounds otherwise
        merge_recipe(tmp_path / "recipe.yml", tmp_path / "plain")
        plain = open_checkpoint(tmp_path / "plain")
        share = sum(int((plain.load(n) != ours.load(n)).sum()) for n in ours.tensors)
        assert share > 0.05 * sum(info.numel for info in ours.tensors.values())


def test_parity_is_refused_where_there_is_none(tmp_path, made):
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe(made, "ties")))
    with pytest.raises(RecipeError, match="parity with mergekit is for task_arithmetic"):
        merge_recipe(tmp_path / "r.yml", tmp_path / "out", parity="mergekit")


@pytest.mark.parametrize("parameters", [{}, {"normalize": False, "lambda": 1.3}])
def test_ties_without_equal_magnitudes_is_mergekits(tmp_path, made32, parameters):
    document = recipe(made32, "ties", (0.6, 1.1), dtype="float32", parameters=parameters)
    for model, density in zip(document["models"], (0.3, [0.2, 0.9]), strict=True):
        model["parameters"]["density"] = density
    theirs, ours = both(tmp_path, document)
    assert all(torch.equal(theirs.load(name), ours.load(name)) for name in ours.tensors)


def test_ties_with_equal_magnitudes_differs_little(tmp_path, made):
    document = recipe(made, "ties", parameters={"density": 0.5}, dtype="float32", out_dtype="bfloat16")
    theirs, ours = both(tmp_path, document)
    differ = sum(int((theirs.load(n) != ours.load(n)).sum()) for n in ours.tensors)
    assert differ < 0.02 * sum(info.numel for info in ours.tensors.values())


def test_linear_and_filters(tmp_path, made):
    document = recipe(made, "linear", dtype="float32")
    document["models"][0]["parameters"]["weight"] = [{"filter": "mlp", "value": [0.1, 0.8]}, {"value": 2}]
    document.pop("base_model")
    theirs, ours = both(tmp_path, document)
    for name in ours.tensors:
        torch.testing.assert_close(ours.load(name), theirs.load(name), rtol=3e-7, atol=3e-7)


def sources(made, *ranges):
    return {"sources": [{"model": str(made[name]), "layer_range": list(span)} for name, span in ranges]}


def test_slices_of_layers_are_stacked(tmp_path, made):
    """A taller model: passthrough, with a scale on one slice."""
    slices = [sources(made, ("e0", (0, 2))), sources(made, ("e1", (1, 2))), sources(made, ("base", (0, 1)))]
    slices[1]["sources"][0]["parameters"] = {"scale": [{"filter": "o_proj", "value": 0.5}, {"value": 1.0}]}
    theirs, ours = both(tmp_path, {"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"})
    assert all(torch.equal(theirs.load(name), ours.load(name)) for name in ours.tensors)
    assert ours.config["num_hidden_layers"] == theirs.config["num_hidden_layers"] == 4
    e0, e1, base = (open_checkpoint(made[name]) for name in ("e0", "e1", "base"))
    up = "model.layers.{}.mlp.up_proj.weight".format
    assert torch.equal(ours.load(up(2)), e1.load(up(1)))
    assert torch.equal(ours.load(up(3)), base.load(up(0)))
    assert torch.equal(ours.load("model.embed_tokens.weight"), e0.load("model.embed_tokens.weight"))
    assert torch.equal(ours.load("lm_head.weight"), base.load("lm_head.weight"))


def test_slices_with_gradients_and_their_own_parameters(tmp_path, made32):
    assert LAYERS == 2
    slices = [
        sources(made32, ("base", (0, 2)), ("e0", (0, 2)), ("e1", (0, 2))),
        sources(made32, ("base", (1, 2)), ("e0", (0, 1)), ("e1", (1, 2))),
    ]
    slices[0]["sources"][1]["parameters"] = {"weight": [0.1, 0.9]}
    slices[1]["parameters"] = {"weight": 0.25}
    document = {
        "slices": slices, "merge_method": "ties", "base_model": str(made32["base"]), "dtype": "float32",
        "parameters": {"weight": 0.5, "density": 0.4},
    }  # fmt: skip
    theirs, ours = both(tmp_path, document)
    assert all(torch.equal(theirs.load(name), ours.load(name)) for name in ours.tensors)


@pytest.mark.parametrize("vectors", [False, True])
def test_an_exact_recipe_carries_vectors_through_mergekit(tmp_path, made, vectors):
    checkpoints = open_family(made)
    plan = make_plan(checkpoints, vectors=vectors)
    path = write_exact_recipe(plan, checkpoints, tmp_path / "exact")
    document = yaml.safe_load(path.read_text()) | {"out_dtype": "float32"}
    theirs = with_mergekit(document, tmp_path / "theirs")
    merge(plan, checkpoints, tmp_path / "ours", dtype=Dtype.F32)
    ours = open_checkpoint(tmp_path / "ours")
    scale = max(float(ours.load(name).abs().max()) for name in ours.tensors)
    worst = max(float((ours.load(name) - theirs.load(name)).abs().max()) for name in ours.tensors)
    assert worst <= 6e-8 * scale
    used = (tmp_path / "exact" / "model.safetensors").stat().st_blocks * 512
    touched = sum(i.numel * 4 for name, i in ours.tensors.items() if vectors and "mlp" in name)
    assert used <= touched + 2**16  # the rest are holes


def test_the_exact_recipe_rounds_to_the_merge(tmp_path, made):
    """In the base's own dtype the two merges agree but where the float32 sums straddle a rounding boundary."""
    checkpoints = open_family(made)
    plan = make_plan(checkpoints, vectors=True)
    path = write_exact_recipe(plan, checkpoints, tmp_path / "exact")
    merge_recipe(path, tmp_path / "again")
    merge(plan, checkpoints, tmp_path / "ours")
    ours, again = open_checkpoint(tmp_path / "ours"), open_checkpoint(tmp_path / "again")
    distances = [ulps(ours.load(name), again.load(name)) for name in ours.tensors]
    assert max(int(d.max()) for d in distances) <= 1
    assert sum(int(d.sum()) for d in distances) <= 3
