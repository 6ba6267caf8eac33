import pytest
import torch
import yaml
from checkpoints import CONFIG, LAYERS, family, llama_shapes, random_weights, write_checkpoint

from wpmerge.checkpoint import open_checkpoint
from wpmerge.errors import RecipeError
from wpmerge.recipe_jobs import recipe_jobs
from wpmerge.yaml_recipe import read_yaml_recipe


@pytest.fixture
def checkpoints(tmp_path):
    return {str(path): open_checkpoint(path) for path in family(tmp_path).values()}


@pytest.fixture
def document(checkpoints):
    base, e0, e1 = checkpoints
    return {
        "models": [{"model": e0, "parameters": {"weight": 0.5}}, {"model": e1, "parameters": {"weight": 0.25}}],
        "merge_method": "task_arithmetic",
        "base_model": base,
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }


def resolve(tmp_path, document, checkpoints):
    """Tensor -> the weights that a recipe gives its models."""
    path = tmp_path / "recipe.yml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    made = recipe_jobs(read_yaml_recipe(path), checkpoints, dtype=None, where=path)
    return {job.output.name: [float(term.coefficient.values) for term in job.terms] for job in made.jobs}


def test_plain_weights(tmp_path, document, checkpoints):
    found = resolve(tmp_path, document, checkpoints)
    assert set(found) == set(next(iter(checkpoints.values())).tensors)
    assert set(map(tuple, found.values())) == {(0.5, 0.25)}


def test_lambda_normalize_and_global_parameters(tmp_path, document, checkpoints):
    document["models"][1].pop("parameters")
    document["parameters"] = {"weight": 1.5, "lambda": 3, "normalize": True, "int8_mask": True}
    assert set(map(tuple, resolve(tmp_path, document, checkpoints).values())) == {(0.75, 2.25)}
    document["parameters"] |= {"weight": -0.5, "normalize": True}  # weights that cancel are not normalised
    assert set(map(tuple, resolve(tmp_path, document, checkpoints).values())) == {(1.5, -1.5)}


def test_filters_take_the_first_hit_and_gradients_run_over_layers(tmp_path, document, checkpoints):
    document["models"][0]["parameters"]["weight"] = [
        {"filter": "mlp", "value": [0, 1]},
        {"filter": "layers.1.mlp", "value": 9},
        {"filter": "norm", "value": 3},
        {"value": [2.0, 4.0]},
    ]
    with pytest.raises(RecipeError, match="decides nothing") as caught:
        resolve(tmp_path, document, checkpoints)
    assert caught.value.got == "layers.1.mlp"
    del document["models"][0]["parameters"]["weight"][1]
    found = {name: weights[0] for name, weights in resolve(tmp_path, document, checkpoints).items()}
    assert LAYERS == 2
    assert (found["model.layers.0.mlp.up_proj.weight"], found["model.layers.1.mlp.up_proj.weight"]) == (0, 1)
    assert (found["model.norm.weight"], found["model.layers.1.input_layernorm.weight"]) == (3, 3)
    assert (found["model.layers.0.self_attn.q_proj.weight"], found["model.layers.1.self_attn.q_proj.weight"]) == (2, 4)
    assert (found["model.embed_tokens.weight"], found["lm_head.weight"]) == (2, 2)


def test_a_lone_layer_takes_a_gradients_last_value(tmp_path, document):
    path = write_checkpoint(
        tmp_path / "m", random_weights(0, llama_shapes(1)), config=CONFIG | {"num_hidden_layers": 1}
    )
    document |= {"base_model": str(path), "models": [{"model": "e", "parameters": {"weight": [2, 4]}}]}
    found = resolve(tmp_path, document, {str(path): open_checkpoint(path), "e": open_checkpoint(path)})
    assert (found["model.layers.0.mlp.up_proj.weight"], found["model.norm.weight"]) == ([4], [2])


def test_every_number_is_mergekits(tmp_path, document, checkpoints):
    """The same recipe through mergekit's own resolver, tensor by tensor."""
    from mergekit.config import evaluate_setting

    weight = [{"filter": "self_attn", "value": [0.1, "7e-1"]}, {"filter": "lm_head", "value": "1e-1"}, {"value": 0.3}]
    document["models"][0]["parameters"]["weight"] = weight
    from mergekit.config import MergeConfiguration

    setting = MergeConfiguration.model_validate(document).models[0].parameters["weight"]
    for name, (ours, _) in resolve(tmp_path, document, checkpoints).items():
        t = int(name.split(".")[2]) / (LAYERS - 1) if ".layers." in name else 0
        assert ours == torch.tensor(evaluate_setting(name, setting, t, validate=float)).item()


def test_linear(tmp_path, document, checkpoints):
    document |= {"merge_method": "linear"}
    del document["base_model"]
    found = resolve(tmp_path, document, checkpoints)
    assert set(map(tuple, found.values())) == {(torch.tensor(2 / 3).item(), torch.tensor(1 / 3).item())}
    document["parameters"] = {"normalize": False}
    assert set(map(tuple, resolve(tmp_path, document, checkpoints).values())) == {(0.5, 0.25)}
    document["parameters"] = {"normalize": True}
    document["models"][0]["parameters"]["weight"] = -0.25
    with pytest.raises(RecipeError, match="sum to zero"):
        resolve(tmp_path, document, checkpoints)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"merge_method": "slerp"}, "merge_method slerp is not supported"),
        ({"base_model": None}, "needs a base_model"),
        ({"base_modell": "x"}, "base_modell: Extra inputs"),
        ({"slices": []}, "slices: List should have at least 1"),
        ({"modules": {}}, "modules in a recipe are not supported"),
        ({"chat_template": "auto"}, "chat_template in a recipe are not supported"),
        ({"tokenizer_source": "union"}, "tokenizer_source union"),
        ({"dtype": "int8"}, "dtype int8"),
        ({"out_dtype": "float8"}, "out_dtype float8"),
        ({"models": []}, "models"),
        ({"models": [{"model": "x", "weight": 1}]}, "weight: Extra inputs"),
        ({"models": [{"model": "x"}, {"model": "x"}]}, "lists a model twice"),
        ({"parameters": {"lamda": 1}}, "no parameter lamda"),
        ({"models": [{"model": "x", "parameters": {"lambda": 1}}]}, "no parameter lambda here"),
        ({"models": [{"model": "x", "parameters": {"weight": [{"filtre": "a", "value": 1}]}}]}, "malformed"),
        ({"parameters": {"weight": [[1, 2], [3]]}}, "malformed"),
    ],
)
def test_unknown_and_unsupported_is_named(tmp_path, document, change, complaint):
    (tmp_path / "r.yml").write_text(yaml.safe_dump(document | change))
    with pytest.raises(RecipeError, match=complaint):
        read_yaml_recipe(tmp_path / "r.yml")


@pytest.mark.parametrize("text", ["", "a", "- 1", "{", "a: 1\na: 2", "\x00", "!!python/object/apply:os.getcwd []"])
def test_what_is_no_recipe_is_refused(tmp_path, text):
    (tmp_path / "r.yml").write_text(text)
    with pytest.raises(RecipeError):
        read_yaml_recipe(tmp_path / "r.yml")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_yaml_recipe(tmp_path / "absent.yml")


@pytest.mark.parametrize(
    ("weight", "complaint"),
    [
        (float("nan"), "no finite number"),
        ("heavy", "no finite number"),
        (True, "no finite number"),
        ([], "no finite number"),
        ([{"filter": "mlp", "value": 1.0}], "no finite number"),
        ([{"filter": "mpl", "value": 1.0}, {"value": 1}], "decides nothing"),
        ([float("inf"), 1], "no finite number"),
    ],
)
def test_a_number_that_is_none_is_refused(tmp_path, document, checkpoints, weight, complaint):
    document["models"][0]["parameters"]["weight"] = weight
    with pytest.raises(RecipeError, match=complaint):
        resolve(tmp_path, document, checkpoints)


def test_the_bases_own_weight_is_refused_and_the_base_itself_is_not(tmp_path, document, checkpoints):
    document["models"].append({"model": document["base_model"]})
    assert all(len(weights) == 2 for weights in resolve(tmp_path, document, checkpoints).values())
    document["models"][-1]["parameters"] = {"weight": 1}
    with pytest.raises(RecipeError, match="no effect"):
        resolve(tmp_path, document, checkpoints)


def test_what_is_read_otherwise_is_said(tmp_path, document, checkpoints, caplog):
    document |= {"dtype": "bfloat16", "parameters": {"int8_mask": True}}
    resolve(tmp_path, document, checkpoints)
    assert "int8_mask is ignored" in caplog.text
    assert "computed in float32" in caplog.text
