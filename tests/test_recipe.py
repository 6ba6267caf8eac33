import pytest
import torch
import yaml
from checkpoints import family
from hypothesis import given
from hypothesis import strategies as st

from wpmerge.checkpoint import open_checkpoint
from wpmerge.errors import RecipeError
from wpmerge.plan import Coefficient, Plan, input_model
from wpmerge.recipe import check_with_mergekit, least_squares, main_dtype, recipe_text, resolve_filters, weight_setting


@pytest.fixture
def checkpoints(tmp_path):
    made = {name: open_checkpoint(path) for name, path in family(tmp_path).items()}
    return made


def make_plan(checkpoints, coefficients, granularity="tensor"):
    return Plan(
        base=input_model(checkpoints["base"]),
        experts={name: input_model(checkpoints[name]) for name in coefficients},
        coefficients=coefficients,
        rule="scaled",
        granularity=granularity,
    )


def scalars(checkpoints, seed, value=None):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Coefficient(values=torch.rand((), generator=generator) if value is None else torch.tensor(value))
        for name in checkpoints["base"].tensors
    }


def test_a_uniform_plan_is_a_short_recipe(checkpoints):
    plan = make_plan(checkpoints, {"e0": scalars(checkpoints, 0, 0.5), "e1": scalars(checkpoints, 0, 0.25)}, "expert")
    text = recipe_text(plan, checkpoints)
    assert "reproduces the merge exactly" in text
    assert yaml.safe_load(text) == {
        "models": [
            {"model": str(checkpoints["e0"].path), "parameters": {"weight": [{"value": 0.5}]}},
            {"model": str(checkpoints["e1"].path), "parameters": {"weight": [{"value": 0.25}]}},
        ],
        "merge_method": "task_arithmetic",
        "base_model": str(checkpoints["base"].path),
        "parameters": {"normalize": False},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }


def test_every_number_survives_yaml_bit_for_bit(checkpoints):
    plan = make_plan(checkpoints, {"e0": scalars(checkpoints, 1)})
    setting = yaml.safe_load(recipe_text(plan, checkpoints))["models"][0]["parameters"]["weight"]
    assert list(setting[-1]) == ["value"]
    for name, coefficient in plan.coefficients["e0"].items():
        assert torch.tensor(resolve_filters(setting, name)) == coefficient.values


def test_mergekit_reads_what_was_meant(checkpoints):
    plan = make_plan(checkpoints, {"e0": scalars(checkpoints, 1), "e1": scalars(checkpoints, 2)})
    text = recipe_text(plan, checkpoints)
    check_with_mergekit(text, plan, checkpoints["base"])
    document = yaml.safe_load(text)
    document["models"][0]["parameters"]["weight"].insert(0, {"filter": "self_attn", "value": 9.0})
    with pytest.raises(RecipeError, match="mergekit would read another number"):
        check_with_mergekit(yaml.safe_dump(document), plan, checkpoints["base"])
    document = yaml.safe_load(text) | {"paramters": {}}
    with pytest.raises(RecipeError, match="would ignore part of the recipe"):
        check_with_mergekit(yaml.safe_dump(document), plan, checkpoints["base"])
    document = yaml.safe_load(text)
    del document["models"]
    with pytest.raises(RecipeError, match="mergekit refuses"):
        check_with_mergekit(yaml.safe_dump(document), plan, checkpoints["base"])


NAMES = ["lm_head", "a.lm_head", "a.lm_head.b", "model.layers.1.x", "model.layers.11.x", "layers.1.x", "x", "norm"]


@given(st.dictionaries(st.sampled_from(NAMES), st.sampled_from([0.0, 0.5, 1.0]), min_size=1))
def test_names_inside_names_keep_their_own_numbers(numbers):
    setting = weight_setting(numbers)
    assert {name: resolve_filters(setting, name) for name in numbers} == numbers
    assert "filter" not in setting[-1]


def test_the_rest_takes_the_most_frequent_number():
    assert weight_setting({"a": 1.0, "b": 2.0, "c": 2.0}) == [{"filter": "a", "value": 1.0}, {"value": 2.0}]
    # "ba" has the common number, but "a" is part of its name: it needs a filter of its own, first
    assert weight_setting({"a": 1.0, "ba": 2.0, "c": 2.0})[0] == {"filter": "ba", "value": 2.0}


@pytest.mark.parametrize("axis", [0, 1])
def test_vectors_become_their_least_squares_number(checkpoints, axis):
    name = "model.layers.0.mlp.up_proj.weight"
    base, expert = (checkpoints[key].load(name).double() for key in ("base", "e0"))
    values = torch.rand(base.shape[axis])
    coefficient = Coefficient(values=values, axis=axis)
    delta = expert - base
    scaled = delta * values.double().view(-1, 1) if axis == 0 else delta * values.double()
    found = least_squares(coefficient, checkpoints, "e0", name)
    assert found == pytest.approx(float((scaled * delta).sum() / (delta * delta).sum()), rel=1e-9)
    error = lambda number: float(((scaled - number * delta) ** 2).sum())  # noqa: E731
    assert error(found) < min(error(found * 1.01), error(found * 0.99))
    plan = make_plan(checkpoints, {"e0": scalars(checkpoints, 0, 0.5) | {name: coefficient}}, "unit")
    text = recipe_text(plan, checkpoints)
    assert f"1 of {len(checkpoints['base'].tensors)} are such fits" in text
    assert all(line.startswith("#") for line in text.splitlines()[:3])
    setting = yaml.safe_load(text)["models"][0]["parameters"]["weight"]
    assert resolve_filters(setting, name) == found


def test_a_constant_vector_is_exact_and_an_unchanged_tensor_takes_the_mean(checkpoints, tmp_path):
    name = "model.norm.weight"
    constant = Coefficient(values=torch.full((16,), 0.3), axis=0)
    plan = make_plan(checkpoints, {"e0": scalars(checkpoints, 0, 0.5) | {name: constant}}, "unit")
    assert "exactly" in recipe_text(plan, checkpoints)
    same = {"base": checkpoints["base"], "e0": checkpoints["base"]}
    assert least_squares(Coefficient(values=torch.arange(16.0), axis=0), same, "e0", name) == 7.5


def test_a_stored_tied_head_gets_its_embeddings_number(tmp_path):
    import safetensors.torch

    made = family(tmp_path, tied=True)
    file = made["e0"] / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file)
    checkpoints = {name: open_checkpoint(path) for name, path in made.items()}
    embedding = {"model.embed_tokens.weight": Coefficient(values=torch.tensor(0.75))}
    plan = make_plan(checkpoints, {"e0": scalars(checkpoints, 0, 0.5) | embedding})
    setting = yaml.safe_load(recipe_text(plan, checkpoints))["models"][0]["parameters"]["weight"]
    assert resolve_filters(setting, "lm_head.weight") == 0.75
    assert resolve_filters(setting, "model.norm.weight") == 0.5
    check_with_mergekit(recipe_text(plan, checkpoints), plan, checkpoints["base"])


def test_main_dtype_counts_elements(checkpoints):
    assert main_dtype(checkpoints["base"]) == "bfloat16"
