import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from checkpoints import CONFIG, family, half_plan, llama_shapes, random_weights, tokenizer, write_checkpoint

import wpmerge.jobs
from wpmerge.checkpoint import open_checkpoint
from wpmerge.dtypes import Dtype
from wpmerge.errors import CheckpointError, OutputError, RecipeError, WpmergeError
from wpmerge.merging import check_inputs, merge, merge_recipe, merged_state_dict, merged_tensor, open_inputs
from wpmerge.plan import Coefficient, InputModel, Plan, input_model, load_plan

UP = "model.layers.0.mlp.up_proj.weight"


def open_family(made):
    base = open_checkpoint(made["base"])
    return {"base": base} | {name: open_checkpoint(path, base=base) for name, path in made.items() if name != "base"}


def make_plan(checkpoints, *, seed=0, vectors=False):
    """Random numbers per tensor and expert; vectors along rows and columns in the MLPs on request."""
    generator = torch.Generator().manual_seed(seed)
    coefficients = {}
    for expert in [name for name in checkpoints if name != "base"]:
        coefficients[expert] = {}
        for name, info in checkpoints["base"].tensors.items():
            axis = (1 if "down" in name else 0) if vectors and "mlp" in name else None
            size = () if axis is None else info.shape[axis]
            coefficients[expert][name] = Coefficient(values=torch.rand(size, generator=generator), axis=axis)
    return Plan(
        base=input_model(checkpoints["base"]),
        experts={name: input_model(checkpoints[name]) for name in coefficients},
        coefficients=coefficients,
        rule="scaled",
        granularity="unit" if vectors else "tensor",
    )


def reference(plan, checkpoints, name):
    """The definition in float64, rounded once."""
    base = checkpoints["base"].load(name).double()
    total = base.clone()
    for expert, coefficients in plan.coefficients.items():
        factor = coefficients[name].expand(tuple(base.shape)).double()
        total += factor * (checkpoints[expert].load(name).double() - base)
    return total.float().bfloat16()


def ulps(one, other):
    return (one.view(torch.int16).int() - other.view(torch.int16).int()).abs()


def contents(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.mark.parametrize("vectors", [False, True])
def test_a_merge_is_its_definition(tmp_path, vectors):
    checkpoints = open_family(family(tmp_path, shards=2))
    plan = make_plan(checkpoints, vectors=vectors)
    summary = merge(plan, checkpoints, tmp_path / "out")
    merged = open_checkpoint(tmp_path / "out")
    assert list(merged.tensors) == list(checkpoints["base"].tensors)
    assert summary.nbytes == sum(info.nbytes for info in merged.tensors.values())
    in_memory = merged_state_dict(plan, checkpoints)
    differ = 0
    for name, info in merged.tensors.items():
        assert info.dtype is Dtype.BF16
        distance = ulps(merged.load(name), reference(plan, checkpoints, name))
        assert distance.max() <= 1
        differ += int((distance > 0).sum())
        assert torch.equal(in_memory[name], merged.load(name))
    assert differ <= 3
    assert torch.equal(merged_tensor(plan, checkpoints, UP), merged.load(UP))


def test_coefficients_of_zero_and_one_give_base_and_expert_back(tmp_path):
    checkpoints = open_family(family(tmp_path, experts=1))
    for value, name in ((0.0, "base"), (1.0, "e0")):
        numbers = {key: Coefficient(values=torch.tensor(value)) for key in checkpoints["base"].tensors}
        plan = Plan(
            base=input_model(checkpoints["base"]),
            experts={"e0": input_model(checkpoints["e0"])},
            coefficients={"e0": numbers},
            rule="uniform",
            granularity="expert",
        )
        merge(plan, checkpoints, tmp_path / f"out{value}")
        assert open_checkpoint(tmp_path / f"out{value}").content_hash(full=True) == checkpoints[name].content_hash(
            full=True
        )


def test_the_directory_is_a_model_with_its_papers(tmp_path):
    made = family(tmp_path)
    (made["base"] / "chat_template.jinja").write_text("{{ messages }}")
    (made["base"] / "README.md").write_text("---\nlicense: mit\n---\n")
    (made["base"] / "secret.txt").write_text("x")
    checkpoints = open_family(made)
    plan = make_plan(checkpoints)
    merge(plan, checkpoints, tmp_path / "out")
    found = contents(tmp_path / "out")
    assert set(found) == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "merge.json", "model.safetensors",
        "plan.json",
        "plan.safetensors", "recipe.yml", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert found[name] == (made["base"] / name).read_bytes()
    assert json.loads(found["config.json"]) == CONFIG
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in (tmp_path / "out").iterdir())
    assert load_plan(tmp_path / "out").rule == "scaled"
    card = found["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
    assert found["recipe.yml"].decode() in card


def test_shards_have_an_index_and_the_same_tensors(tmp_path):
    checkpoints = open_family(family(tmp_path))
    plan = make_plan(checkpoints)
    merge(plan, checkpoints, tmp_path / "one")
    summary = merge(plan, checkpoints, tmp_path / "many", shard_bytes=2000, threads=2)
    assert summary.shards > 3
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    assert one.content_hash(full=True) == many.content_hash(full=True)


def test_dtype_is_converted_and_said(tmp_path):
    checkpoints = open_family(family(tmp_path))
    plan = make_plan(checkpoints)
    merge(plan, checkpoints, tmp_path / "out", dtype=Dtype.F32)
    merged = open_checkpoint(tmp_path / "out")
    assert {info.dtype for info in merged.tensors.values()} == {Dtype.F32}
    assert merged.config["dtype"] == "float32"


def test_transformers_loads_and_generates(tmp_path):
    from transformers import AutoModelForCausalLM

    checkpoints = open_family(family(tmp_path, tied=True))
    merge(make_plan(checkpoints), checkpoints, tmp_path / "out", shard_bytes=4000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.state_dict()[UP], open_checkpoint(tmp_path / "out").load(UP))
    assert model.generate(torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False).shape[1] > 2


def test_an_adapter_merges_like_its_merged_checkpoint(tmp_path):
    made = family(tmp_path, experts=1)
    generator = torch.Generator().manual_seed(0)
    factors = {
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.randn(2, 16, generator=generator),
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": torch.randn(24, 2, generator=generator),
    }
    made["lora"] = tmp_path / "lora"
    made["lora"].mkdir()
    safetensors.torch.save_file(factors, made["lora"] / "adapter_model.safetensors")
    (made["lora"] / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    checkpoints = open_family(made)
    plan = make_plan(checkpoints)
    merge(plan, checkpoints, tmp_path / "out")
    merged = open_checkpoint(tmp_path / "out")
    assert ulps(merged.load(UP), reference(plan, checkpoints, UP)).max() <= 1
    assert merged.tensors[UP].dtype is Dtype.BF16
    recipe = (tmp_path / "out" / "recipe.yml").read_text()
    assert "exactly" not in recipe
    assert "differ by that rounding" in recipe
    models = yaml.safe_load(recipe)["models"]
    assert models[1]["model"] == f"{made['base']}+{made['lora']}"
    merge_recipe(tmp_path / "out" / "recipe.yml", tmp_path / "again")
    assert open_checkpoint(tmp_path / "again").content_hash(full=True) == merged.content_hash(full=True)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """A random Llama and two experts as transformers saves them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    place, made = tmp_path_factory.mktemp("llamas"), {}
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 12, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=256, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name in ("base", "e0", "e1"):
        if name != "base":
            for parameter in model.parameters():
                parameter.data += 0.01 * torch.randn_like(parameter)
        made[name] = place / name
        model.to(torch.bfloat16).save_pretrained(made[name])
        model.float()
    return made


def test_mergekit_makes_the_same_tensors_from_the_recipe(llamas, tmp_path):
    """Stock mergekit on the recipe of a merge at granularity tensor, in a process of its own, offline."""
    checkpoints = open_family(llamas)
    plan = make_plan(checkpoints)
    merge(plan, checkpoints, tmp_path / "ours")
    program = Path(sys.executable).with_name("mergekit-yaml")
    command = [str(program), str(tmp_path / "ours" / "recipe.yml"), str(tmp_path / "theirs")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    merge_recipe(tmp_path / "ours" / "recipe.yml", tmp_path / "read")
    ours, theirs, read = (open_checkpoint(tmp_path / name) for name in ("ours", "theirs", "read"))
    assert list(ours.tensors) == list(theirs.tensors)
    differ = 0
    for name in ours.tensors:
        distance = ulps(ours.load(name), theirs.load(name))
        assert distance.max() <= 1, name
        differ += int((distance > 0).sum())
        assert torch.equal(ours.load(name), read.load(name))
    assert differ == 0  # the same float32 operations in the same order: no element differs at all


def test_inputs_may_live_elsewhere_but_must_be_the_same(tmp_path):
    made = family(tmp_path)
    plan = make_plan(open_family(made))
    moved = made["e1"].rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        open_inputs(plan)
    checkpoints = open_inputs(plan, {"e1": moved})
    check_inputs(plan, checkpoints)
    with pytest.raises(RecipeError, match="no such model"):
        open_inputs(plan, {"e9": moved})
    with pytest.raises(RecipeError, match="e0 is not the checkpoint"):
        check_inputs(plan, open_inputs(plan, {"e1": moved, "e0": moved}))


def attempt(tmp_path, made, **changes):
    """Try to merge a family into ``out`` with what a user would see, and return the error."""
    checkpoints = open_family(made)
    merge(half_plan(checkpoints), checkpoints, changes.pop("out", tmp_path / "out"), **changes)


def replace(made, name, *, tensors=None, config=None):
    weights = random_weights(5, llama_shapes()) | (tensors or {})
    shutil.rmtree(made[name])
    kept = {key: value for key, value in weights.items() if value is not None}
    write_checkpoint(made[name], kept, config=CONFIG | (config or {}))


def truncate(made):
    file = made["e1"] / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def other_tokens(made):
    (made["e1"] / "tokenizer.json").write_text(json.dumps(tokenizer({"a": 0, "b": 1})))


def put(value, name=UP, model="e1"):
    def change(made):
        tensors = safetensors.torch.load_file(made[model] / "model.safetensors")
        tensors[name].view(-1)[3] = value
        safetensors.torch.save_file(tensors, made[model] / "model.safetensors")

    return change


FAULTS = {
    "architecture": (lambda m: replace(m, "e1", config={"model_type": "mistral"}), "model_type is mistral"),
    "missing tensor": (lambda m: replace(m, "e1", tensors={"lm_head.weight": None}), r"lm_head\.weight is missing"),
    "extra tensor": (lambda m: replace(m, "e1", tensors={"z.weight": torch.ones(1)}), r"z\.weight is not in the base"),
    "shape": (lambda m: replace(m, "e1", tensors={UP: torch.ones(3, 3)}), r"up_proj\.weight has shape \(3, 3\)"),
    "vocabulary": (lambda m: replace(m, "e1", config={"vocab_size": 99}), "vocabulary has 99"),
    "tokenizer": (other_tokens, "token 'a' has id 0"),
    "truncated": (truncate, "the file ends before tensor"),
    "nan in an expert": (put(float("nan")), r"up_proj\.weight in .*e1/model\.safetensors"),
    "inf in an expert": (put(float("inf")), "not finite"),
    "nan in the base": (put(float("nan"), model="base"), r"up_proj\.weight in .*base/model\.safetensors"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_refused_and_nothing_is_left(tmp_path, fault):
    made = family(tmp_path)
    change, complaint = FAULTS[fault]
    change(made)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=complaint):
        attempt(tmp_path, made)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_output_that_exists_is_kept_or_swapped_whole(tmp_path):
    made = family(tmp_path)
    attempt(tmp_path, made, shard_bytes=2000)
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        attempt(tmp_path, made)
    assert contents(tmp_path / "out") == before
    put(float("nan"))(made)
    with pytest.raises(CheckpointError, match="not finite"):
        attempt(tmp_path, made, overwrite=True)
    assert contents(tmp_path / "out") == before
    put(0.0)(made)
    attempt(tmp_path, made, overwrite=True)
    assert "model.safetensors.index.json" in before
    assert not list((tmp_path / "out").glob("model-*"))
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("out", ["e1", ".", "e1/merged", "base"])
def test_an_output_over_an_input_is_always_refused(tmp_path, out):
    made = family(tmp_path / "models")
    before = contents(made["e1"])
    with pytest.raises(OutputError, match="an input"):
        attempt(tmp_path, made, out=tmp_path / "models" / out, overwrite=True)
    assert contents(made["e1"]) == before


def test_too_little_disk_is_found_before_any_work(tmp_path):
    made = family(tmp_path / "models")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        calls = []
        with pytest.raises(OutputError, match="not enough disk space"):
            attempt(tmp_path, made, out=disk / "out", progress=lambda *done: calls.append(done))
        assert not calls
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


KILLED = """
import os, signal, sys
from pathlib import Path
import wpmerge.streaming, wpmerge.jobs
from wpmerge.merging import merge_recipe
wpmerge.jobs.BLOCK_ELEMENTS = 64
left = [int(sys.argv[3])]
write = wpmerge.streaming._write_piece
def dying(*arguments, **settings):
    if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return write(*arguments, **settings)
wpmerge.streaming._write_piece = dying
# One thread: a shard is then finished before the next begins, so that what a kill leaves is known.
merge_recipe(Path(sys.argv[1]), Path(sys.argv[2]), shard_bytes=3000, threads=1)
"""


def test_a_killed_merge_is_absent_and_a_rerun_completes_it(tmp_path, monkeypatch):
    made = family(tmp_path / "models")
    attempt(tmp_path, made, out=tmp_path / "whole", shard_bytes=3000)
    recipe = tmp_path / "recipe.yml"
    recipe.write_bytes((tmp_path / "whole" / "recipe.yml").read_bytes())
    merge_recipe(recipe, tmp_path / "expected", shard_bytes=3000)
    out = tmp_path / "out"
    for moment, kept in [(0, 0), (1, 0), (13, 2), (26, 3)]:  # 27 pieces are written; 6, 12, 19 and 26 end a shard
        command = [sys.executable, "-c", KILLED, str(recipe), str(out), str(moment)]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
        assert done.returncode == -signal.SIGKILL
        assert not out.exists()
        finished = {file: file.stat().st_mtime_ns for file in (tmp_path / ".out.wpmerge" / "out").glob("*.safetensors")}
        assert len(finished) == kept
        merge_recipe(recipe, out, shard_bytes=3000)
        for file, time in finished.items():
            assert (out / file.name).stat().st_mtime_ns == time, "made again"
        ours, expected = contents(out), contents(tmp_path / "expected")
        assert set(ours) == set(expected)
        assert all(ours[name] == expected[name] for name in ours if name != "README.md")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "models", "out", "recipe.yml", "whole"]
        shutil.rmtree(out)


def test_recipes_are_merged_without_mergekit(tmp_path):
    made = family(tmp_path)
    recipe = {
        "models": [{"model": str(made[name]), "parameters": {"weight": [0.2, 0.8]}} for name in ("e0", "e1")],
        "merge_method": "linear",
        "dtype": "float32",
        "out_dtype": "float16",
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    code = (
        "import sys; from pathlib import Path; from wpmerge.merging import merge_recipe\n"
        "merge_recipe(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "assert not {'mergekit', 'transformers', 'peft'} & set(sys.modules), 'heavy imports'"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "recipe.yml"), str(tmp_path / "out")]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    merged, e0, e1 = (open_checkpoint(path) for path in (tmp_path / "out", made["e0"], made["e1"]))
    for name in merged.tensors:
        expected = ((e0.load(name).double() + e1.load(name).double()) / 2).half()
        torch.testing.assert_close(merged.load(name), expected, rtol=1e-3, atol=1e-3)
    assert merged.config["dtype"] == "float16"
    assert "by `linear`" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda r, m: r["models"][0].update(model=str(m["base"].parent / "absent")), "no such checkpoint"),
        (lambda r, m: r["models"][0]["parameters"].update(weight=float("nan")), "no finite number"),
        (lambda r, m: r.update(merge_method="slerp"), "slerp is not supported"),
        (lambda r, m: truncate(m), "the file ends before"),
        (lambda r, m: put(float("nan"))(m), "not finite"),
        (lambda r, m: other_tokens(m), "token 'a' has id 0"),
    ],
)
def test_a_bad_recipe_leaves_nothing(tmp_path, change, complaint):
    made = family(tmp_path)
    recipe = {
        "models": [{"model": str(made[name]), "parameters": {"weight": 0.5}} for name in ("e0", "e1")],
        "merge_method": "task_arithmetic",
        "base_model": str(made["base"]),
    }
    change(recipe, made)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(WpmergeError, match=complaint):
        merge_recipe(tmp_path / "recipe.yml", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_plan_for_another_model_is_refused(tmp_path):
    made = family(tmp_path)
    checkpoints = open_family(made)
    plan = make_plan(checkpoints)
    short = {name: dict(list(tensors.items())[1:]) for name, tensors in plan.coefficients.items()}
    wrong = Plan(base=plan.base, experts=plan.experts, coefficients=short, rule="x", granularity="tensor")
    with pytest.raises(RecipeError, match="no coefficient for"):
        merge(wrong, checkpoints, tmp_path / "out")
    stale = InputModel(source=plan.base.source, content_hash="sampled-sha256:0")
    wrong = Plan(base=stale, experts=plan.experts, coefficients=plan.coefficients, rule="x", granularity="tensor")
    with pytest.raises(RecipeError, match="base is not the checkpoint"):
        merge(wrong, checkpoints, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_memory_does_not_grow_with_the_model(tmp_path):
    """The same merge of models of 32 and of 128 MB per checkpoint: the peak stays where it was."""
    code = (
        "import resource, sys; from pathlib import Path; import torch\n"
        "from wpmerge.merging import merge_recipe\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "merge_recipe(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    grown = []
    for millions in (16, 64):
        made = {}
        for name in ("base", "e0", "e1"):
            tensors = {"model.big.weight": torch.ones(millions * 1000, 1000, dtype=torch.bfloat16)}
            made[name] = write_checkpoint(tmp_path / f"{name}{millions}", tensors)
        recipe = {
            "models": [{"model": str(made[name]), "parameters": {"weight": 0.5}} for name in ("e0", "e1")],
            "merge_method": "task_arithmetic",
            "base_model": str(made["base"]),
        }
        (tmp_path / f"{millions}.yml").write_text(yaml.safe_dump(recipe))
        command = [sys.executable, "-c", code, str(tmp_path / f"{millions}.yml"), str(tmp_path / f"out{millions}")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        grown.append(int(done.stdout) / 1024)
    assert max(grown) < 40, grown  # MiB on top of the interpreter and torch; one tensor alone has 128


def test_progress_counts_bytes_of_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(wpmerge.jobs, "BLOCK_ELEMENTS", 64)
    made, seen = family(tmp_path), []
    attempt(tmp_path, made, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(i.nbytes for i in open_checkpoint(made["base"]).tensors.values())
    assert len(seen) > len(llama_shapes())
