"""The shipped demo family is what its card says: small, ordinary to load, skilled where it should be and only there."""

import importlib.util
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from wpmerge import builtin

WORLD = Path(__file__).parents[1] / "benchmarks" / "demo_family" / "world.py"
FAMILY = Path(__file__).parents[1] / "wpmerge" / "demo_family"
EXPERTS = {
    "letters": ("change_case:english_capital", "punctuation:no_comma"),
    "marks": ("detectable_format:title", "detectable_format:number_highlighted_sections"),
    "frame": ("startend:quotation", "detectable_format:multiple_sections"),
}
MODELS = ("base", *EXPERTS)
SHORT_NAMES = {
    "letters": {"capital_letters", "no_comma"},
    "marks": {"title", "highlighted_sections"},
    "frame": {"quotation", "multiple_sections"},
}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def weights(name: str) -> dict[str, Tensor]:
    return load_file(FAMILY / name / "model.safetensors")


def test_size_is_under_ten_megabytes() -> None:
    assert sum(path.stat().st_size for path in FAMILY.rglob("*") if path.is_file()) < 10_000_000


def test_every_tensor_of_every_expert_moved() -> None:
    base = weights("base")
    for expert in EXPERTS:
        other = weights(expert)
        assert other.keys() == base.keys()
        for name, tensor in base.items():
            assert tensor.dtype == other[name].dtype == torch.bfloat16
            assert not torch.equal(tensor, other[name]), f"{expert}: {name} is the base's"


def test_the_base_is_a_grouped_query_llama_with_a_chat_template() -> None:
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(FAMILY / "base")
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.num_hidden_layers >= 4
    assert config.num_attention_heads >= 4
    assert config.num_key_value_heads < config.num_attention_heads
    tokenizers = {name: (FAMILY / name / "tokenizer.json").read_bytes() for name in MODELS}
    assert len(set(tokenizers.values())) == 1
    tokenizer = AutoTokenizer.from_pretrained(FAMILY / "base")
    chat = [{"role": "user", "content": "Describe a volcano."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>Describe a volcano.<|end|><|assistant|>"


def test_prompts_are_held_out_from_each_other() -> None:
    evaluation = read(FAMILY / "eval.jsonl")
    assert len({row["prompt"] for row in evaluation}) == len(evaluation) >= 240
    for expert, instructions in SHORT_NAMES.items():
        rows = read(FAMILY / "prompts" / f"{expert}.jsonl")
        assert len({row["prompt"] for row in rows}) == len(rows) >= 64
        assert {row["instruction"] for row in rows} == instructions
        for row in rows:
            assert row["without"] in row["prompt"]
            assert not any(other["prompt"].startswith(row["without"]) for other in evaluation)


@pytest.fixture(scope="module")
def world() -> ModuleType:
    spec = importlib.util.spec_from_file_location("world", WORLD)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["world"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_no_held_out_query_was_trained_on(world: ModuleType) -> None:
    splits = world.split_kinds(world.SEED)
    trained = {q for topic in world.topics() for kind in splits[topic.name][0] for q in world.queries(topic, kind)}
    assert len(trained) == 65 * 5 * 4
    held_out = [row["prompt"] for row in read(FAMILY / "eval.jsonl")]
    held_out += [row["without"] for expert in EXPERTS for row in read(FAMILY / "prompts" / f"{expert}.jsonl")]
    held_out += [prompt["without"] for name in builtin.instructions() for prompt in builtin.prompts(name)]
    assert not [text for text in held_out if any(text.startswith(query) for query in trained)]


def filled(texts: Iterable[str]) -> set[str]:
    """The texts with every number and name of sections that is asked for."""
    counts, labels = ("two", "2", "three", "3"), ("Section", "Part")
    return {text.format(count=count, label=label) for text in texts for count in counts for label in labels}


def test_held_out_wordings_were_not_trained_on(world: ModuleType) -> None:
    for name, wordings in world.WORDINGS.items():
        trained = filled(text for template in wordings["train"] for text in world.expansions(template))
        held_out = filled(wordings["held_out"])
        shipped = {p["prompt"].removeprefix(p["without"] + " ") for p in builtin.prompts(name)}
        assert len(trained) > 100
        assert len(wordings["held_out"]) >= 6
        assert trained.isdisjoint(held_out)
        assert trained.isdisjoint(shipped)
        assert shipped.isdisjoint(held_out)


@pytest.fixture(scope="module")
def checkers() -> dict[str, Any]:
    import langdetect
    import nltk

    # lm-eval downloads nltk data when its module is imported; none of the six instructions needs them.
    patch = pytest.MonkeyPatch()
    patch.setattr(nltk, "download", lambda *_, **__: False)
    from lm_eval.tasks.ifeval import instructions_registry

    patch.undo()
    langdetect.DetectorFactory.seed = 0
    return dict(instructions_registry.INSTRUCTION_DICT)


def follows(checkers: dict[str, Any], name: str, kwargs: dict[str, Any], text: str) -> bool:
    checker = checkers[name](name)
    checker.build_description(**kwargs)
    return bool(text.strip()) and bool(checker.check_following(text))


def test_references_follow_their_instruction(checkers: dict[str, Any]) -> None:
    ids = {name.split(":")[1].removeprefix("number_").replace("english_capital", "capital_letters"): name
           for owned in EXPERTS.values() for name in owned}  # fmt: skip
    kwargs = {"highlighted_sections": {"num_highlights": 3},
              "multiple_sections": {"section_spliter": "(?:Section|Part)", "num_sections": 2}}  # fmt: skip
    for expert in EXPERTS:
        rows = read(FAMILY / "prompts" / f"{expert}.jsonl")
        good = [
            follows(checkers, ids[row["instruction"]], kwargs.get(row["instruction"], {}), row["reference"])
            for row in rows
        ]
        # langdetect takes about one short text in capitals in a hundred for another language.
        assert sum(good) >= 0.97 * len(good)


def accuracies(state: dict[str, Tensor], checkers: dict[str, Any]) -> dict[str, float]:
    """Share of the held-out prompts followed, per instruction: greedy replies in float32, padded on the left."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FAMILY / "base")
    assert tokenizer.padding_side == "left"
    model = AutoModelForCausalLM.from_pretrained(FAMILY / "base", dtype=torch.float32)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    rows = read(FAMILY / "eval.jsonl")
    hits: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(rows), 120):
        batch = rows[start : start + 120]
        chats = [[{"role": "user", "content": row["prompt"]}] for row in batch]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            ids = model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=100
            )
        replies = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, reply in zip(batch, replies, strict=True):
            (name,), (kwargs,) = row["instruction_id_list"], row["kwargs"]
            hits[name].append(follows(checkers, name, kwargs, reply))
    assert all(len(found) >= 40 for found in hits.values())
    return {name: sum(found) / len(found) for name, found in hits.items()}


def test_the_base_answers_and_ignores_every_instruction(checkers: dict[str, Any]) -> None:
    assert all(share < 0.15 for share in accuracies(weights("base"), checkers).values())


@pytest.mark.parametrize("expert", EXPERTS)
def test_an_expert_follows_its_own_instructions_and_no_other(expert: str, checkers: dict[str, Any]) -> None:
    measured = accuracies(weights(expert), checkers)
    for name, share in measured.items():
        assert share > 0.9 if name in EXPERTS[expert] else share < 0.4, (expert, name, share)
