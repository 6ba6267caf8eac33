import json

import pytest
import safetensors.torch
import torch
import yaml
from checkpoints import family, tokenizer, write_checkpoint
from test_merging import make_plan, open_family

from wpmerge.checkpoint import open_checkpoint
from wpmerge.checksum import checksum
from wpmerge.dtypes import Dtype
from wpmerge.errors import RecipeError
from wpmerge.merging import merge, merge_recipe
from wpmerge.plan import Operator, Plan, load_plan
from wpmerge.verify import verify

UP = "model.layers.0.mlp.up_proj.weight"


def with_operator(plan, operator):
    names = ("base", "experts", "coefficients", "rule", "granularity")
    return Plan(**{name: getattr(plan, name) for name in names}, operator=operator)


@pytest.fixture
def merged(tmp_path):
    """A merge from a plan, TIES with vectors."""
    checkpoints = open_family(family(tmp_path / "models"))
    operator = Operator(method="ties", density=0.4, normalize=True)
    plan = with_operator(make_plan(checkpoints, vectors=True), operator)
    merge(plan, checkpoints, tmp_path / "out", threads=2, shard_bytes=3000)
    assert load_plan(tmp_path / "out").operator == operator
    return tmp_path / "out"


def flip(path, name=UP):
    """Change one bit of one weight."""
    for file in path.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(file)
        if name in tensors:
            tensors[name].view(torch.int16).view(-1)[5] ^= 1
            safetensors.torch.save_file(tensors, file)


def test_a_merge_verifies(merged):
    seen = []
    found = verify(merged, sample=None, progress=lambda done, total: seen.append((done, total)))
    assert found.passed
    assert len(found.checked) == found.tensors == seen[-1][0] == seen[-1][1] == 21
    assert verify(merged, sample=4).checked != verify(merged, sample=4, seed=1).checked
    record = json.loads((merged / "merge.json").read_text())
    assert record["tensors"][UP] == checksum(open_checkpoint(merged).load(UP))


def test_one_flipped_bit_is_found(merged):
    flip(merged)
    found = verify(merged, sample=None)
    assert not found.passed
    assert list(found.faults) == [UP]
    assert "flat index 5" in found.faults[UP]


def test_a_record_that_was_changed_is_refused(merged):
    text = (merged / "merge.json").read_text()
    (merged / "merge.json").write_text(text.replace('"ties"', '"dare"').replace("dot64:", "dot64:0"))
    with pytest.raises(RecipeError, match="not the one that the model card states"):
        verify(merged)
    (merged / "merge.json").unlink()
    with pytest.raises(RecipeError, match="no readable record"):
        verify(merged)


def test_inputs_may_move_but_not_change(merged, tmp_path):
    moved = (tmp_path / "models" / "e1").rename(tmp_path / "moved")
    assert verify(merged, models={"e1": moved}, sample=None).passed
    flip(moved, "model.norm.weight")
    with pytest.raises(RecipeError, match="e1 is not the checkpoint"):
        verify(merged, models={"e1": moved})


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_ties", "dare_linear", "linear"])
def test_recipes_verify_with_their_settings(tmp_path, method):
    made = family(tmp_path / "models")
    parameters = {"weight": 0.5} | ({"density": 0.3} if "dare" in method else {})
    document = {
        "models": [{"model": str(made[name]), "parameters": parameters} for name in ("e0", "e1")],
        "merge_method": method,
        "dtype": "bfloat16",
    } | ({} if method == "linear" else {"base_model": str(made["base"])})  # fmt: skip
    (tmp_path / "r.yml").write_text(yaml.safe_dump(document))
    settings = {"parity": "mergekit"} if method == "task_arithmetic" else {"seed": 5, "dtype": Dtype.F32}
    merge_recipe(tmp_path / "r.yml", tmp_path / "out", **settings)
    assert verify(tmp_path / "out", sample=None).passed
    merge_recipe(tmp_path / "r.yml", tmp_path / "again", threads=3, shard_bytes=2000, **settings)
    tensors = [json.loads((tmp_path / name / "merge.json").read_text())["tensors"] for name in ("out", "again")]
    assert tensors[0] == tensors[1]
    if "dare" in method:
        merge_recipe(tmp_path / "r.yml", tmp_path / "other", **(settings | {"seed": 6}))
        assert json.loads((tmp_path / "other" / "merge.json").read_text())["tensors"] != tensors[0]


@pytest.mark.parametrize("vocab", ["base", "largest"])
def test_a_vocabulary_that_grew_verifies(tmp_path, vocab):
    made = family(tmp_path / "models", experts=1)
    made["grown"] = grow(made["e0"], tmp_path / "models" / "grown", 40)
    document = {
        "models": [{"model": str(made[name]), "parameters": {"weight": 0.5}} for name in ("e0", "grown")],
        "merge_method": "task_arithmetic",
        "base_model": str(made["base"]),
    }
    (tmp_path / "r.yml").write_text(yaml.safe_dump(document))
    merge_recipe(tmp_path / "r.yml", tmp_path / "out", vocab=vocab)
    assert verify(tmp_path / "out", sample=None).passed


def grow(source, out, rows):
    """A checkpoint with more tokens."""
    model = open_checkpoint(source)
    tensors = {name: model.load(name) for name in model.tensors}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        extra = torch.full((rows - len(tensors[name]), tensors[name].shape[1]), 3.0, dtype=torch.bfloat16)
        tensors[name] = torch.cat([tensors[name], extra])
    write_checkpoint(out, tensors, config=dict(model.config) | {"vocab_size": rows})
    (out / "tokenizer.json").write_text(json.dumps(tokenizer({f"t{i}": i for i in range(rows)})))
    return out
