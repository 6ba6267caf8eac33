import json
import os

import pytest
import safetensors.torch
import torch
from checkpoints import CONFIG, VOCAB, family, llama_shapes, random_weights, tokenizer, write_checkpoint

from wpmerge.checkpoint import check_same_family, open_checkpoint
from wpmerge.errors import CheckpointError


@pytest.fixture
def weights():
    return random_weights(0, llama_shapes())


@pytest.mark.parametrize("shards", [1, 3])
def test_opens_single_and_sharded(tmp_path, weights, shards):
    opened = open_checkpoint(write_checkpoint(tmp_path / "m", weights, shards=shards))
    assert list(opened.tensors) == sorted(weights)
    assert opened.config["model_type"] == "llama"
    for name, tensor in weights.items():
        assert torch.equal(opened.load(name), tensor)
        assert torch.equal(opened.load_elements(name, 3, 11), tensor.reshape(-1)[3:11])


def test_opens_legacy_pickles_sharded_too(tmp_path, weights):
    path = write_checkpoint(tmp_path / "m", weights)
    (path / "model.safetensors").unlink()
    names = list(weights)
    files = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in files.items():
        torch.save({name: weights[name] for name in part}, path / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    opened = open_checkpoint(path)
    assert all(torch.equal(opened.load(name), tensor) for name, tensor in weights.items())


def test_out_of_range_and_unknown_reads_are_errors(tmp_path, weights):
    opened = open_checkpoint(write_checkpoint(tmp_path / "m", weights))
    with pytest.raises(IndexError):
        opened.load_elements("model.norm.weight", 0, 17)
    with pytest.raises(CheckpointError, match=r"no tensor x\.y"):
        opened.load("x.y")


def test_hash_is_of_the_weights_not_of_their_files(tmp_path, weights):
    one = open_checkpoint(write_checkpoint(tmp_path / "one", weights))
    two = open_checkpoint(write_checkpoint(tmp_path / "two", weights, shards=4))
    assert one.content_hash() == two.content_hash()
    assert one.content_hash(full=True) == two.content_hash(full=True)
    assert one.content_hash().startswith("sampled-sha256:")
    changed = weights | {"lm_head.weight": weights["lm_head.weight"] * 1.01}
    three = open_checkpoint(write_checkpoint(tmp_path / "three", changed))
    assert three.content_hash() != one.content_hash()


def test_full_hash_sees_what_samples_miss(tmp_path):
    values = torch.zeros(100_000)
    other = values.clone()
    other[30_000] = 1
    one, two = (open_checkpoint(write_checkpoint(tmp_path / str(i), {"x": v})) for i, v in enumerate([values, other]))
    assert one.content_hash() == two.content_hash()  # documented: samples only
    assert one.content_hash(full=True) != two.content_hash(full=True)


def test_a_tied_head_is_one_tensor_stored_or_not(tmp_path):
    config = CONFIG | {"tie_word_embeddings": True}
    weights = random_weights(0, llama_shapes(tied=True))
    without = open_checkpoint(write_checkpoint(tmp_path / "without", weights, config=config))
    both = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    stored = open_checkpoint(write_checkpoint(tmp_path / "stored", both, config=config))
    assert "lm_head.weight" not in stored.tensors
    assert stored.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert stored.content_hash() == without.content_hash()
    check_same_family(without, stored, name="e")


def test_a_tied_head_that_differs_is_refused(tmp_path, weights):
    path = write_checkpoint(tmp_path / "m", weights, config=CONFIG | {"tie_word_embeddings": True})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        open_checkpoint(path)


def test_buffers_are_left_out(tmp_path, weights):
    extra = weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    assert set(open_checkpoint(write_checkpoint(tmp_path / "m", extra)).tensors) == set(weights)


def edit(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def point(name, target):
    return lambda index: index["weight_map"].update({name: target})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (point("lm_head.weight", "../other.safetensors"), "points outside"),
        (point("lm_head.weight", "/etc/passwd"), "points outside"),
        (point("lm_head.weight", ".."), "points outside"),
        (point("lm_head.weight", "model-00009-of-00009.safetensors"), "shard is missing"),
        (point("not.there", "model-00001-of-00002.safetensors"), "holds not.there, which it does not"),
        (lambda index: index["weight_map"].pop("lm_head.weight"), "which the index leaves out"),
        (lambda index: index.update(weight_map=[1]), "no weight_map"),
        (lambda index: index.update(weight_map={"x": 3}), "no weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, weights, change, complaint):
    path = write_checkpoint(tmp_path / "m", weights, shards=2)
    edit(path / "model.safetensors.index.json", change)
    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(path)


def test_a_tensor_in_two_shards_is_refused(tmp_path, weights):
    path = write_checkpoint(tmp_path / "m", weights, shards=2)
    second = path / "model-00002-of-00002.safetensors"
    held = safetensors.torch.load_file(second)
    first = safetensors.torch.load_file(path / "model-00001-of-00002.safetensors")
    safetensors.torch.save_file(held | {next(iter(first)): torch.ones(1)}, second)
    with pytest.raises(CheckpointError, match="lies in two shards"):
        open_checkpoint(path)


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, weights, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = write_checkpoint(tmp_path / "m", weights)
    for source in (tmp_path / "nowhere", path / "config.json"):
        with pytest.raises(CheckpointError, match="no such checkpoint directory"):
            open_checkpoint(source)
    (path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(path)
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(path)
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="without an index"):
        open_checkpoint(path)
    (path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(path)


def test_two_sets_of_weights_are_refused(tmp_path, weights):
    path = write_checkpoint(tmp_path / "m", weights)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(CheckpointError, match="stale"):
        open_checkpoint(path)


def test_remote_code_and_quantised_weights_are_refused(tmp_path, weights):
    remote = CONFIG | {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}
    path = write_checkpoint(tmp_path / "remote", weights, config=remote)
    with pytest.raises(CheckpointError, match="run code of its own"):
        open_checkpoint(path)
    assert open_checkpoint(path, trust_remote_code=True).config["auto_map"]
    path = write_checkpoint(tmp_path / "tokenizer", weights)
    edit(path / "tokenizer_config.json", lambda config: config.update(auto_map={"AutoTokenizer": "x"}))
    with pytest.raises(CheckpointError, match=r"run code of its own"):
        open_checkpoint(path)
    quantised = CONFIG | {"quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(CheckpointError, match="quantised") as caught:
        open_checkpoint(write_checkpoint(tmp_path / "q", weights, config=quantised))
    assert caught.value.got == "gptq"


def test_a_hub_id_is_read_from_the_hubs_own_cache_offline(tmp_path, weights):
    """The cache as huggingface_hub lays it out, blobs behind links; read in a fresh process that may not go online."""
    import subprocess
    import sys

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--owner--name"
    source = write_checkpoint(tmp_path / "m", weights)
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in source.iterdir():
        file.rename(repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    code = (
        "from wpmerge.checkpoint import open_checkpoint\n"
        "from wpmerge.errors import CheckpointError\n"
        "print(len(open_checkpoint('owner/name').tensors))\n"
        "try:\n    open_checkpoint('owner/absent')\n"
        "except CheckpointError as error:\n    print(error)"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{len(weights)}\n")
    assert "where: owner/absent" in done.stdout
    assert "HF_HUB_OFFLINE" in done.stdout


def with_change(path, name, *, tensors=None, config=None):
    """The family's second expert with one thing changed."""
    weights = random_weights(5, llama_shapes()) | (tensors or {})
    weights = {key: value for key, value in weights.items() if value is not None}
    return open_checkpoint(write_checkpoint(path / name, weights, config=CONFIG | (config or {})))


@pytest.mark.parametrize(
    ("tensors", "config", "complaint"),
    [
        ({}, {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "model_type is mistral"),
        ({}, {"num_attention_heads": 2}, "num_attention_heads is 2, the base has 4"),
        ({"model.norm.weight": None}, {}, r"tensor model\.norm\.weight is missing"),
        ({"lm_head.weight": None}, {}, r"tensor lm_head\.weight is missing"),
        ({"model.extra.weight": torch.ones(2)}, {}, r"tensor model\.extra\.weight is not in the base"),
        ({"model.norm.weight": torch.ones(8)}, {}, r"tensor model\.norm\.weight has shape \(8,\)"),
        ({}, {"vocab_size": 99}, "vocabulary has 99 entries"),
        ({"lm_head.weight": None}, {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ],
)
def test_an_expert_of_another_family_is_refused(tmp_path, tensors, config, complaint):
    base = open_checkpoint(family(tmp_path, experts=0)["base"])
    expert = with_change(tmp_path, "other", tensors=tensors, config=config)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        check_same_family(base, expert, name="other")
    assert caught.value.where == expert.path


def test_differences_are_counted(tmp_path):
    base = open_checkpoint(family(tmp_path, experts=0)["base"])
    expert = with_change(tmp_path, "o", tensors={"model.norm.weight": None, "lm_head.weight": None})
    with pytest.raises(CheckpointError, match="2 differences in all"):
        check_same_family(base, expert, name="o")


def test_another_tokenizer_is_refused_but_another_way_of_writing_it_is_not(tmp_path):
    made = family(tmp_path, experts=1)
    base, file = open_checkpoint(made["base"]), made["e0"] / "tokenizer.json"
    file.write_text(json.dumps(tokenizer(), indent=4))
    check_same_family(base, open_checkpoint(made["e0"]), name="e0")
    swapped = {f"t{i}": i for i in range(VOCAB)} | {"t3": 4, "t4": 3}
    file.write_text(json.dumps(tokenizer(swapped)))
    with pytest.raises(CheckpointError, match="token 't3' has id 4, in the base 3"):
        check_same_family(base, open_checkpoint(made["e0"]), name="e0")
    merged = tokenizer()
    merged["model"]["merges"] = [["t1", "t2"]]
    file.write_text(json.dumps(merged))
    with pytest.raises(CheckpointError, match="the merges differ"):
        check_same_family(base, open_checkpoint(made["e0"]), name="e0")
    file.unlink()
    check_same_family(base, open_checkpoint(made["e0"]), name="e0")


def test_other_position_settings_are_warned_of(tmp_path, caplog):
    base = open_checkpoint(family(tmp_path, experts=0)["base"])
    check_same_family(base, with_change(tmp_path, "o", config={"rope_theta": 1e6}), name="o")
    assert "rope_theta" in caplog.text
