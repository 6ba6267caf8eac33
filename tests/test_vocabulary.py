import json

import pytest
import torch
from checkpoints import VOCAB, family, half_plan, tokenizer
from test_verify import grow

from wpmerge.checkpoint import check_same_family, open_checkpoint
from wpmerge.errors import CheckpointError
from wpmerge.merging import merge
from wpmerge.vocabulary import match_vocabulary

EMBED, HEAD, ROWS = "model.embed_tokens.weight", "lm_head.weight", VOCAB + 3


@pytest.fixture
def made(tmp_path):
    """A base, an expert with its vocabulary, and one with three more tokens."""
    made = family(tmp_path / "models")
    made["e1"] = grow(made["e1"], tmp_path / "models" / "grown", ROWS)
    return {name: open_checkpoint(path) for name, path in made.items()}


def run(made, out, vocab):
    merge(half_plan(made), made, out, vocab=vocab, shard_bytes=2000)
    return open_checkpoint(out)


def expected(made, name):
    base = made["base"].load(name).float()
    experts = [made[expert].load(name)[:VOCAB].float() for expert in ("e0", "e1")]
    return (base + 0.5 * (experts[0] - base) + 0.5 * (experts[1] - base)).bfloat16()


def test_without_a_choice_a_larger_vocabulary_is_refused(made, tmp_path):
    with pytest.raises(CheckpointError, match="vocabulary has 40"):
        run(made, tmp_path / "out", None)


def test_the_bases_rows(made, tmp_path, caplog):
    merged = run(made, tmp_path / "out", "base")
    for name in (EMBED, HEAD):
        torch.testing.assert_close(merged.load(name), expected(made, name), rtol=1e-2, atol=1e-6)
        assert merged.load(name).shape[0] == VOCAB
    assert merged.config["vocab_size"] == VOCAB
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (made["base"].path / "tokenizer.json").read_text()
    assert "e1: rows 37 to 39 of embedding and head are left out" in caplog.text
    assert f"37 rows and the tokenizer of {made['base'].source}" in caplog.text


def test_the_largests_rows(made, tmp_path, caplog):
    merged = run(made, tmp_path / "out", "largest")
    for name in (EMBED, HEAD):
        assert merged.load(name).shape[0] == ROWS
        torch.testing.assert_close(merged.load(name)[:VOCAB], expected(made, name), rtol=1e-2, atol=1e-6)
        assert (merged.load(name)[VOCAB:] == 3.0).all()  # the only model that has them gives them whole
    assert merged.config["vocab_size"] == ROWS
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (made["e1"].path / "tokenizer.json").read_text()
    assert "base: rows 37 to 39 of embedding and head are those of" in caplog.text
    assert "e0: rows 37 to 39" in caplog.text
    assert f"40 rows and the tokenizer of {made['e1'].source}" in caplog.text


@pytest.mark.parametrize("vocab", ["base", "largest"])
def test_tokens_with_other_ids_are_refused(made, vocab):
    tokens = {f"t{i}": i for i in range(ROWS)} | {"t3": 4, "t4": 3}
    (made["e1"].path / "tokenizer.json").write_text(json.dumps(tokenizer(tokens)))
    with pytest.raises(CheckpointError, match="does not extend") as caught:
        match_vocabulary(made, "base", vocab)
    assert "token 't3' has id 4" in caught.value.got


def test_a_smaller_expert_is_no_base(made):
    models = {"base": made["e1"], "small": made["base"]}
    with pytest.raises(CheckpointError, match="smaller vocabulary"):
        match_vocabulary(models, "base", "base")
    views = match_vocabulary(models, "base", "largest")
    check_same_family(views["base"], views["small"], name="small")
    assert torch.equal(views["small"].load(EMBED)[VOCAB:], made["e1"].load(EMBED)[VOCAB:])
    assert torch.equal(views["small"].load_elements(EMBED, 590, 600), views["small"].load(EMBED).view(-1)[590:600])


def test_the_rows_of_a_nested_configuration(made):
    """Models of text and images state the vocabulary in a part of their own."""
    for model in made.values():
        model.config = {"text_config": {"vocab_size": model.config["vocab_size"], "hidden_size": 16}}
    views = match_vocabulary(made, "base", "largest")
    assert [view.config["text_config"] for view in views.values()] == [{"vocab_size": ROWS, "hidden_size": 16}] * 3


def test_equal_vocabularies_stay_what_they_are(made):
    same = {"base": made["base"], "e0": made["e0"]}
    assert match_vocabulary(same, "base", "base") == match_vocabulary(same, "base", None) == same
