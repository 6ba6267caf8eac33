"""Capabilities: files and their faults, built-in sets, splits, and what the model sees."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinydisk import TEMPLATE, tiny_tokenizer

from wpmerge import builtin
from wpmerge.capability import Capability, Chat, Prompt, load_capability, reference_sequences
from wpmerge.errors import CapabilityError


def write(path: Path, *lines: object) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


GOOD = [{"prompt": f"say {n}", "without": f"{n}", "reference": f"it is {n}", "topic": "any"} for n in range(5)]


def test_a_file_is_read_in_order_and_other_keys_are_ignored(tmp_path: Path) -> None:
    spec = write(tmp_path / "c.jsonl", GOOD[0], "", *GOOD[1:])
    found = load_capability("numbers", spec)
    assert found == Capability(
        name="numbers",
        source=spec,
        prompts=tuple(Prompt(prompt=f"say {n}", without=f"{n}", reference=f"it is {n}") for n in range(5)),
    )
    assert found.has_pairs
    assert found.has_references
    bare = load_capability("bare", write(tmp_path / "bare.jsonl", *({"prompt": str(n)} for n in range(4))))
    assert not bare.has_pairs
    assert not bare.has_references


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"prompt": "x"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("9" * 5000, "not JSON"),
        ('["prompt"]', "no prompt"),
        ("{}", "no prompt"),
        ('{"prompt": 3}', "no prompt"),
        ('{"prompt": "  "}', "no prompt"),
        ('{"prompt": "x", "without": ["y"], "reference": "z"}', '"without" is not a text'),
        ('{"prompt": "x", "without": "y", "reference": ""}', '"reference" is not a text'),
        ('{"prompt": "x", "reference": "z"}', 'some prompts have "without"'),
        ('{"prompt": "x", "without": "y", "reference": null}', 'some prompts have "reference"'),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, what: str) -> None:
    spec = write(tmp_path / "c.jsonl", *GOOD[:2], "", line, *GOOD[2:])
    with pytest.raises(CapabilityError) as caught:
        load_capability("numbers", spec)
    assert what in caught.value.what
    assert caught.value.where == f"{spec}, line 4"


def test_empty_missing_and_short_files_are_refused(tmp_path: Path) -> None:
    for text in ("", "\n \n"):
        (tmp_path / "empty.jsonl").write_text(text)
        with pytest.raises(CapabilityError, match="is empty"):
            load_capability("c", str(tmp_path / "empty.jsonl"))
    with pytest.raises(CapabilityError, match="cannot be read"):
        load_capability("c", str(tmp_path / "none.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(CapabilityError, match="cannot be read"):
        load_capability("c", str(tmp_path / "latin.jsonl"))
    with pytest.raises(CapabilityError, match="too few") as caught:
        load_capability("c", write(tmp_path / "short.jsonl", *GOOD[:3]))
    assert caught.value.got == 3


def test_a_line_ends_at_a_newline_only(tmp_path: Path) -> None:
    """JSON texts may hold U+2028, U+0085 and other things that Python takes for line ends; files may have a mark."""
    texts = ["one\u2028two", "three\u0085four", "five\u000bsix".replace("\u000b", " "), "seven"]
    lines = "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\r\n" for text in texts)
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert [prompt.prompt for prompt in load_capability("c", str(path)).prompts] == texts


def test_built_in_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    title = load_capability("t", "title")
    assert title.has_pairs
    assert not title.has_references
    assert [prompt.prompt for prompt in title.prompts] == [entry["prompt"] for entry in builtin.prompts("title")]
    with pytest.raises(CapabilityError, match="no such capability") as caught:
        load_capability("t", "titel")
    assert all(name in str(caught.value.expected) for name in builtin.names())
    (tmp_path / "title").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_capability("t", "title") == title, "a directory of that name does not hide it"


def test_joined_built_ins_take_turns() -> None:
    one, other = (load_capability("x", name).prompts for name in ("title", "no_comma"))
    both = load_capability("both", "title+no_comma")
    assert both.prompts[0::2] == one
    assert both.prompts[1::2] == other
    assert both.source == "title+no_comma"
    for names in ("title+", "title+nothing", "+"):
        with pytest.raises(CapabilityError, match="no such capability"):
            load_capability("both", names)


def capability(count: int) -> Capability:
    return Capability(name="c", source="here", prompts=tuple(Prompt(prompt=str(n)) for n in range(count)))


@given(st.integers(0, 60), st.integers(4, 40), st.integers(4, 40), st.integers(0, 5))
def test_a_split_is_disjoint_seeded_and_as_large_as_asked(count: int, scoring: int, held_out: int, seed: int) -> None:
    whole = capability(count)
    if count < 8:
        with pytest.raises(CapabilityError, match="too few"):
            whole.split(scoring=scoring, held_out=held_out, seed=seed)
        return
    scored, kept = whole.split(scoring=scoring, held_out=held_out, seed=seed)
    assert not set(scored.prompts) & set(kept.prompts)
    assert set(scored.prompts) | set(kept.prompts) <= set(whole.prompts)
    assert len(set(scored.prompts)) == len(scored.prompts) >= 4
    assert len(set(kept.prompts)) == len(kept.prompts) >= 4
    if count >= scoring + held_out:
        assert (len(scored.prompts), len(kept.prompts)) == (scoring, held_out)
    else:
        assert len(scored.prompts) + len(kept.prompts) == count, "all that there is"
    assert (scored, kept) == whole.split(scoring=scoring, held_out=held_out, seed=seed)
    assert scored.name == kept.name == "c"


def test_seeds_draw_differently_and_shares_follow_what_was_asked() -> None:
    whole = capability(60)
    draws = {whole.split(scoring=10, held_out=10, seed=seed)[0].prompts for seed in range(5)}
    assert len(draws) == 5
    scored, kept = whole.split(scoring=100, held_out=50, seed=0)
    assert (len(scored.prompts), len(kept.prompts)) == (40, 20)


@pytest.mark.parametrize(("scoring", "held_out"), [(3, 10), (10, 3), (0, 0)])
def test_a_split_too_small_to_halve_is_refused(scoring: int, held_out: int) -> None:
    with pytest.raises(CapabilityError, match="too few"):
        capability(60).split(scoring=scoring, held_out=held_out, seed=0)


def test_the_content_hash_follows_text_and_order() -> None:
    one, other = Prompt(prompt="a", without="b"), Prompt(prompt="a", reference="b")
    hashes = {
        Capability(name="c", source="s", prompts=prompts).content_hash()
        for prompts in ((one, other), (other, one), (one, one), (other, other))
    }
    assert len(hashes) == 4
    same = Capability(name="d", source="t", prompts=(one, other)).content_hash()
    assert same in hashes, "the text alone counts"


def test_a_chat_template_is_used_where_there_is_one() -> None:
    tokenizer = tiny_tokenizer(template=TEMPLATE)
    chat = Chat(tokenizer)
    assert chat.has_template
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<user>", "<reply>", "<eos>", "w3", "w4")}
    assert chat.prompt_tokens("w3 w4") == [ids["<user>"], ids["w3"], ids["w4"], ids["<reply>"]]
    assert chat.reply_tokens("w4", limit=5) == [ids["w4"], ids["<eos>"]]
    assert chat.reply_tokens("w4 w3 w3", limit=2) == [ids["w4"], ids["w3"]], "cut, and so without an end"


def test_a_plain_form_is_used_without_a_template() -> None:
    tokenizer = tiny_tokenizer(template=None)
    chat = Chat(tokenizer)
    assert not chat.has_template
    found = [tokenizer.convert_ids_to_tokens(token) for token in chat.prompt_tokens("w3 w4")]
    assert found == ["Q:", "w3", "w4", "A:"]
    tokenizer.eos_token = None
    assert chat.reply_tokens("w4", limit=5) == tokenizer.convert_tokens_to_ids(["w4"])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for x %}", "TemplateSyntaxError: expected token 'in'"),
        ("{{ raise_exception('no system role') }}", "TemplateError: no system role"),
        ("{{ messages[0].content.text.more }}", "UndefinedError: 'str object' has no attribute 'text'"),
        ("{{ 1 + 'a' }}", "TypeError: "),
    ],
)
def test_a_chat_template_that_fails_is_named(template: str, said: str) -> None:
    tokenizer = tiny_tokenizer(template=template)
    tokenizer.name_or_path = "models/base"
    with pytest.raises(CapabilityError, match="a chat template cannot be applied") as caught:
        Chat(tokenizer).prompt_tokens("w3")
    assert caught.value.where == "models/base" and str(caught.value.got).startswith(said)


def test_references_follow_their_prompts() -> None:
    tokenizer = tiny_tokenizer(template=TEMPLATE)
    chat = Chat(tokenizer)
    prompts = tuple(Prompt(prompt=f"w{n} " * n, reference=f"w{n + 1}") for n in (1, 2))
    given_replies = Capability(name="c", source="s", prompts=prompts)
    sequences, starts = reference_sequences(chat, given_replies, None, limit=4)
    assert starts == [3, 4]
    assert [tokenizer.decode(s[start:]) for s, start in zip(sequences, starts, strict=True)] == ["w2 <eos>", "w3 <eos>"]
    own, own_starts = reference_sequences(chat, given_replies, [[7], [8, 9]], limit=1)
    assert own_starts == starts
    assert [s[start:] for s, start in zip(own, own_starts, strict=True)] == [[7], [8, 9]], "replies are taken whole"
    assert [s[:start] for s, start in zip(own, starts, strict=True)] == [chat.prompt_tokens(p.prompt) for p in prompts]


def test_paraphrases_are_other_wordings_of_one_query_and_instruction() -> None:
    def capability(*prompts: Prompt) -> Capability:
        return Capability(name="c", source="c", prompts=prompts)

    prompts = [
        Prompt(prompt=f"{n} {words}", without=str(n), instruction=instruction)
        for n in range(5)
        for words, instruction in (("loud", "capitals"), ("LOUD", "capitals"), ("bare", "commas"))
    ]
    found = capability(*prompts).paraphrases(["0", "1", "3", "4"])
    assert found is not None
    assert [prompt.prompt for prompt in found[0].prompts] == ["0 loud", "1 loud", "3 loud", "4 loud"]
    assert [prompt.prompt for prompt in found[1].prompts] == ["0 LOUD", "1 LOUD", "3 LOUD", "4 LOUD"]
    assert capability(*prompts).paraphrases(["0", "1", "3"]) is None, "fewer than four"
    other = [replace(prompt, instruction=prompt.prompt) for prompt in prompts]
    assert capability(*other).paraphrases([str(n) for n in range(5)]) is None, "another instruction is no wording"
    twice = [replace(prompt, prompt=f"{prompt.without} loud") for prompt in prompts]
    assert capability(*twice).paraphrases([str(n) for n in range(5)]) is None, "the same words are no other wording"


@pytest.mark.parametrize("name", ["response_language", "math", "capital_letters+title"])
def test_built_in_prompts_have_paraphrases(name: str) -> None:
    """Of a joined set only prompts of the same instruction are paired."""
    capability = load_capability("c", name)
    queries = list(dict.fromkeys(prompt.asked for prompt in capability.prompts))
    found = capability.paraphrases(queries)
    assert found is not None
    pairs = list(zip(found[0].prompts, found[1].prompts, strict=True))
    assert len(pairs) == len(queries)
    for one, other in pairs:
        assert one.asked == other.asked and one.instruction == other.instruction and one.prompt != other.prompt
    assert {one.instruction for one, _ in pairs} == set(name.split("+"))


def test_what_no_model_sees_is_not_hashed(tmp_path: Path) -> None:
    lines = [{"prompt": f"say {n}", "instruction": "say"} for n in range(4)]
    named = load_capability("n", write(tmp_path / "named.jsonl", *lines))
    bare = load_capability("n", write(tmp_path / "bare.jsonl", *({"prompt": f"say {n}"} for n in range(4))))
    odd = load_capability(
        "n", write(tmp_path / "odd.jsonl", *({"prompt": f"say {n}", "instruction": n} for n in range(4)))
    )
    assert {prompt.instruction for prompt in named.prompts} == {"say"}
    assert {prompt.instruction for prompt in (*bare.prompts, *odd.prompts)} == {None}
    assert named.content_hash() == bare.content_hash() == odd.content_hash()
