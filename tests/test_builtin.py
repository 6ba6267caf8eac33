"""The built-in capabilities: enough of them, varied, fit for their checkers, and none of IFEval's own prompts."""

import json
import re
from collections import Counter
from importlib.resources import files
from itertools import pairwise
from math import gcd
from pathlib import Path
from typing import Any

import pytest

from wpmerge import builtin
from wpmerge.capability import load_capability
from wpmerge.errors import CapabilityError
from wpmerge.ifeval import check_response, ifeval_checkers
from wpmerge.judges import gives_answer

IFEVAL = Path(__file__).parents[2] / "shared" / "data" / "ifeval.jsonl"
SETS = ("code", "json_output", "knowledge", "math")
IDS = {
    "bullet_list": "detectable_format:number_bullet_lists",
    "capital_letters": "change_case:english_capital",
    "capital_words": "change_case:capital_word_frequency",
    "constrained_response": "detectable_format:constrained_response",
    "end_phrase": "startend:end_checker",
    "first_word": "length_constraints:nth_paragraph_first_word",
    "forbidden_words": "keywords:forbidden_words",
    "highlighted_sections": "detectable_format:number_highlighted_sections",
    "json_format": "detectable_format:json_format",
    "keyword_frequency": "keywords:frequency",
    "keywords": "keywords:existence",
    "letter_frequency": "keywords:letter_frequency",
    "lowercase_letters": "change_case:english_lowercase",
    "multiple_sections": "detectable_format:multiple_sections",
    "no_comma": "punctuation:no_comma",
    "number_paragraphs": "length_constraints:number_paragraphs",
    "number_sentences": "length_constraints:number_sentences",
    "number_words": "length_constraints:number_words",
    "placeholders": "detectable_content:number_placeholders",
    "postscript": "detectable_content:postscript",
    "quotation": "startend:quotation",
    "repeat_prompt": "combination:repeat_prompt",
    "response_language": "language:response_language",
    "title": "detectable_format:title",
    "two_responses": "combination:two_responses",
}
EVERY = sorted((*IDS, *SETS))
PROMPTS = {name: builtin.prompts(name) for name in EVERY}

PLAIN = "It is a thing which helps us every day, and there is much to know about it. We see it often."
LANGUAGES = {
    "de": "Das ist ein nützliches Ding, das viele Menschen jeden Tag brauchen.",
    "fr": "C'est une chose utile dont beaucoup de gens ont besoin chaque jour.",
    "es": "Es una cosa útil que muchas personas necesitan todos los días.",
    "it": "È una cosa utile di cui molte persone hanno bisogno ogni giorno.",
    "ru": "Это полезная вещь, которая нужна многим людям каждый день.",
    "hi": "यह एक उपयोगी चीज़ है जिसकी बहुत से लोगों को हर दिन ज़रूरत होती है।",
}


def good_reply(name: str, kw: dict[str, Any]) -> str:
    """A reply that follows the instruction with its arguments."""
    replies = {
        "bullet_list": lambda: "Here it is:\n" + "\n".join(["* one point"] * kw["num_bullets"]),
        "capital_letters": PLAIN.upper,
        "capital_words": lambda: "This is " + " ".join(["VERY"] * kw["capital_frequency"]) + " good.",
        "constrained_response": lambda: "My answer is maybe.",
        "end_phrase": lambda: f"{PLAIN} {kw['end_phrase']}",
        "first_word": lambda: "\n\n".join(
            f"{kw['first_word'].capitalize()}, so it goes." if n == kw["nth_paragraph"] else "Something else."
            for n in range(1, kw["num_paragraphs"] + 1)
        ),
        "forbidden_words": lambda: "A good thing to know.",
        "highlighted_sections": lambda: "It is *big*, *round* and *blue*.",
        "json_format": lambda: '{"answer": "a thing"}',
        "keyword_frequency": lambda: " and ".join([kw["keyword"]] * kw["frequency"]),
        "keywords": lambda: "It was " + ", ".join(kw["keywords"]).upper(),
        "letter_frequency": lambda: f"Letters: {kw['letter'] * kw['let_frequency']}",
        "lowercase_letters": PLAIN.lower,
        "multiple_sections": lambda: "Section 1\nIt is.\nSection 2\nIt was.\nSection 3\nIt will be.",
        "no_comma": lambda: "No such mark is here.",
        "number_paragraphs": lambda: "\n***\n".join(["A few words."] * kw["num_paragraphs"]),
        "number_sentences": lambda: " ".join(["The sun is up today."] * kw["num_sentences"]),
        "number_words": lambda: " ".join(["word"] * (kw["num_words"] - 1)),
        "placeholders": lambda: "Dear " + " ".join(["[name]"] * kw["num_placeholders"]),
        "postscript": lambda: f"That is it.\n{kw['postscript_marker']} One thing more.",
        "quotation": lambda: '"It is a thing."',
        "repeat_prompt": lambda: f"{kw['prompt_to_repeat']}\n\n{PLAIN}",
        "response_language": lambda: LANGUAGES[kw["language"]],
        "title": lambda: "<<A Thing>>\nIt is one.",
        "two_responses": lambda: "It is a thing.\n******\nOne cannot say.",
    }
    return replies[name]()


def bad_reply(name: str, kw: dict[str, Any]) -> str:
    """A reply that just misses the instruction, or `PLAIN`, which follows none but those that forbid something."""
    replies = {
        "bullet_list": lambda: "\n".join(["* one point"] * (kw["num_bullets"] + 1)),
        "capital_words": lambda: "This is " + " ".join(["VERY"] * (kw["capital_frequency"] - 1)) + " good.",
        "end_phrase": lambda: f"{kw['end_phrase']} {PLAIN}",
        "first_word": lambda: "\n\n".join(["Something else."] * kw["num_paragraphs"]),
        "forbidden_words": lambda: f"It is here {kw['forbidden_words'][-1]} now.",
        "highlighted_sections": lambda: "It is *big* and *round*.",
        "keyword_frequency": lambda: " and ".join([kw["keyword"]] * (kw["frequency"] - 1)),
        "keywords": lambda: f"Only {kw['keywords'][0]}.",
        "letter_frequency": lambda: kw["letter"] * (kw["let_frequency"] - 1),
        "multiple_sections": lambda: "Section 1\nIt is.\nSection 2\nIt was.",
        "number_paragraphs": lambda: "\n***\n".join(["A few words."] * (kw["num_paragraphs"] + 1)),
        "number_sentences": lambda: " ".join(["The sun is up today."] * (kw["num_sentences"] - 1)),
        "number_words": lambda: " ".join(["word"] * kw["num_words"]),
        "placeholders": lambda: "Dear " + " ".join(["[name]"] * (kw["num_placeholders"] - 1)),
        "repeat_prompt": lambda: f"{PLAIN} {kw['prompt_to_repeat']}",
        "two_responses": lambda: "It is a thing.\n******\nIt is a thing.",
    }
    return replies.get(name, lambda: PLAIN)()


def query(entry: dict[str, Any]) -> str:
    return str(entry["without"] if "without" in entry else entry["query"])


def wording(entry: dict[str, Any]) -> str:
    return str(entry["prompt"].removeprefix(entry["without"] + " "))


def stored(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((files(builtin) / f"{name}.json").read_text(encoding="utf-8"))
    return found


def test_every_instruction_and_set_is_there() -> None:
    assert builtin.names() == EVERY
    assert builtin.instructions() == sorted(IDS)
    assert set(IDS.values()) == set(ifeval_checkers()), "all that lm-eval has"
    for nothing in ("queries", "yes_no_queries", "titel"):
        with pytest.raises(KeyError):
            builtin.prompts(nothing)


def test_the_files_are_small() -> None:
    sizes = [len(entry.read_bytes()) for entry in files(builtin).iterdir() if entry.name.endswith(".json")]
    assert len(sizes) == len(EVERY) + 2
    assert sum(sizes) < 400_000


@pytest.mark.parametrize("name", EVERY)
def test_prompts_are_many_and_unique(name: str) -> None:
    prompts = PROMPTS[name]
    asked = Counter(query(p) for p in prompts)
    assert len(asked) >= 40
    assert min(asked.values()) == max(asked.values()) == len(stored(name)["phrasings"]) >= 4
    assert len({p["prompt"] for p in prompts}) == len(prompts)
    assert prompts == builtin.prompts(name)


def test_no_prompt_is_in_two_capabilities() -> None:
    counts = Counter(p["prompt"] for prompts in PROMPTS.values() for p in prompts)
    assert max(counts.values()) == 1
    wordings = Counter(way for name in IDS for way in {wording(p) for p in PROMPTS[name]})
    assert max(wordings.values()) == 1
    owners = {(query(p), name) for name in (*SETS, "constrained_response", "title") for p in PROMPTS[name]}
    assert len({text for text, _ in owners}) == len(owners)


@pytest.mark.parametrize("name", EVERY)
def test_any_neighbours_differ_in_query_and_wording(name: str) -> None:
    prompts = PROMPTS[name]
    for start in range(0, len(prompts) - 40, 7):
        assert len({query(p) for p in prompts[start : start + 40]}) == 40
    if name in IDS:
        assert all(wording(a) != wording(b) for a, b in pairwise(prompts[:40]))
        assert len({wording(p) for p in prompts[:4]}) == 4


@pytest.mark.parametrize("name", sorted(IDS))
def test_every_wording_meets_every_variant(name: str) -> None:
    table = stored(name)
    ways, variants = len(table["phrasings"]), len(table.get("variants", [{}]))
    assert gcd(ways, variants) == 1, "or some wordings would come with some variants only"
    counts = Counter((wording(p), json.dumps(p["kwargs"])) for p in PROMPTS[name])
    expected = 60 * ways if name == "repeat_prompt" else ways * variants
    assert len(counts) == expected
    assert max(counts.values()) - min(counts.values()) <= ways, "about as often"


NUMBERS = {word: n for n, word in enumerate(["two", "three", "four", "five", "six", "seven", "eight"], start=2)}
ORDINALS = {1: "first", 2: "second", 3: "third"}
SAYINGS = {
    "at least": ("at least", "or more", "no fewer than", "minimum"),
    "less than": ("less than", "fewer", "under", "below"),
}
LANGUAGE_NAMES = {"de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "ru": "Russian", "hi": "Hindi"}


def says(entry: dict[str, Any], key: str, value: Any) -> bool:
    """Whether the wording names an argument."""
    text = wording(entry)
    if key == "nth_paragraph":
        return ORDINALS[value] in text or f"paragraph {value}" in text
    if key.endswith("relation"):
        return any(saying in text.lower() for saying in SAYINGS[value])
    if isinstance(value, int):
        return value in numbers(text)
    if isinstance(value, list):
        return all(re.search(rf"\b{re.escape(each)}\b", text) for each in value)
    if key == "prompt_to_repeat":
        return bool(value == entry["without"])
    shown = LANGUAGE_NAMES[value] if key == "language" else value
    return re.search(rf"(?<!\w){re.escape(shown)}(?!\w)", text) is not None


def numbers(text: str) -> set[int]:
    return {int(n) for n in re.findall(r"\d+", text)} | {
        NUMBERS[word] for word in re.findall(r"[a-z]+", text.lower()) if word in NUMBERS
    }


@pytest.mark.parametrize("name", sorted(IDS))
def test_wordings_name_what_the_checker_wants(name: str) -> None:
    """A wording that asks for three of something while the checker counts two would measure another instruction."""
    for prompt in PROMPTS[name]:
        assert prompt["instruction_id"] == IDS[name]
        assert prompt["prompt"] == f"{prompt['without']} {wording(prompt)}"
        assert not re.search(r"[{}]", prompt["prompt"])
        for key, value in prompt["kwargs"].items():
            assert says(prompt, key, value), (key, value, prompt["prompt"])
        wanted = {value for value in prompt["kwargs"].values() if isinstance(value, int)}
        if wanted and name != "multiple_sections":
            assert numbers(wording(prompt)) <= wanted, "and no other number"


@pytest.mark.parametrize("name", sorted(IDS))
def test_checkers_take_the_arguments_and_keep_them(name: str) -> None:
    checker = ifeval_checkers()[IDS[name]]
    for entry in PROMPTS[name][:60]:
        built = checker(IDS[name])
        assert built.build_description(**entry["kwargs"])
        kept = built.get_instruction_args() or {}
        for key, value in entry["kwargs"].items():
            assert kept[key] == (sorted(value) if isinstance(value, list) else value), "or the checker draws its own"
        assert set(kept) == set(entry["kwargs"]), "none is left for the checker to draw"


@pytest.mark.parametrize("name", sorted(IDS))
def test_checkers_tell_right_replies_from_wrong_ones(name: str) -> None:
    samples = {json.dumps(entry["kwargs"]): entry for entry in PROMPTS[name]}
    for entry in samples.values():
        kwargs = entry["kwargs"]
        assert check_response(IDS[name], kwargs, entry["prompt"], good_reply(name, kwargs)), kwargs
        assert not check_response(IDS[name], kwargs, entry["prompt"], bad_reply(name, kwargs)), kwargs


def test_questions_of_the_fixed_answers_can_be_answered_so() -> None:
    """Yes-or-no questions begin with a verb, where who, what and how would ask for more."""
    first = {query(p).split()[0] for p in PROMPTS["constrained_response"]}
    assert first <= {"Is", "Are", "Do", "Does", "Can", "Could", "Should", "Will"}


@pytest.mark.parametrize("name", SETS)
def test_sets_are_no_instructions(name: str) -> None:
    for entry in PROMPTS[name]:
        assert not entry.keys() & {"without", "instruction_id", "kwargs"}
        assert entry["query"] in entry["prompt"]
        assert not re.search(r"\{\w*\}", entry["prompt"])


def test_math_answers_are_right() -> None:
    for entry in PROMPTS["math"]:
        assert re.fullmatch(r"[\d.+*/() -]+", entry["working"])
        assert entry["answer"] == pytest.approx(eval(entry["working"]))
        assert gives_answer(f"Let me see. The answer is {entry['answer']}.", entry["answer"])
        assert not gives_answer(f"The answer is {entry['answer'] + 1}.", entry["answer"])
        assert "The answer is" in entry["prompt"]


def test_json_answers_stand_in_the_texts() -> None:
    for entry in PROMPTS["json_output"]:
        answer = entry["answer"]
        assert gives_answer(json.dumps(answer, indent=1), answer)
        assert not gives_answer(json.dumps({**answer, "more": 1}), answer)
        assert re.findall(r'"(\w+)"', entry["fields"]) == list(answer)
        assert entry["fields"] in entry["prompt"]
        assert len(answer) == 3
        for value in answer.values():
            assert re.search(rf"(?<!\w){re.escape(str(value))}(?!\w)", entry["query"]), (value, entry["query"])
        assert "JSON" in entry["prompt"]


def test_knowledge_is_answered_by_what_is_accepted() -> None:
    for entry in PROMPTS["knowledge"]:
        accepted = entry["accepted"]
        assert accepted[0] == entry["reference"]
        assert len(set(accepted)) == len(accepted)
        assert not any(re.search(rf"\b{re.escape(text)}\b", entry["prompt"], re.IGNORECASE) for text in accepted)


SOLUTIONS = {
    "largest": lambda a: max(a, default=None),
    "count_vowels": lambda t: sum(c in "aeiou" for c in t.lower()),
    "is_palindrome": lambda t: t == t[::-1],
    "add_tax": lambda a, b: a * (100 + b) / 100,
    "reverse_words": lambda t: " ".join(reversed(t.split())),
    "factorial": lambda n: 1 if n == 0 else n * SOLUTIONS["factorial"](n - 1),
    "is_prime": lambda n: n > 1 and all(n % k for k in range(2, n)),
    "remove_duplicates": lambda a: list(dict.fromkeys(a)),
    "celsius_to_fahrenheit": lambda d: d * 9 / 5 + 32,
    "fizz": lambda n: str(n) if n % 3 else "fizz",
    "sum_of_digits": lambda n: sum(map(int, str(n))),
    "fibonacci": lambda n: [0, 1, 1, 2, 3, 5, 8][:n],
    "longest_word": lambda t: max(t.split(), key=len),
    "count_words": lambda t: len(t.split()),
    "flatten": lambda a: [x for b in a for x in b],
    "average": lambda a: sum(a) / max(1, len(a)),
    "is_leap": lambda y: y % 4 == 0 and (y % 100 != 0 or y % 400 == 0),
    "gcd": gcd,
    "capitalize_all": lambda a: [w.title() for w in a],
    "even_numbers": lambda a: [x for x in a if x % 2 == 0],
    "second_largest": lambda a: sorted(set(a))[-2],
    "to_binary": lambda n: f"{n:b}",
    "count_letter": lambda t, c: t.count(c),
    "merge_sorted": lambda a, b: sorted(a + b),
    "is_sorted": lambda a: a == sorted(a),
    "power": lambda a, b: a**b,
    "common_items": lambda a, b: [x for x in a if x in b],
    "initials": lambda t: "".join(w[0].upper() for w in t.split()),
    "seconds_to_clock": lambda s: f"{s // 60}:{s % 60:02d}",
    "clamp": lambda x, a, b: min(max(x, a), b),
    "only_digits": lambda t: "".join(c for c in t if c.isdigit()),
    "index_of": lambda a, x: a.index(x) if x in a else -1,
    "swap_case": str.swapcase,
    "cumulative": lambda a: [sum(a[: n + 1]) for n in range(len(a))],
    "is_anagram": lambda a, b: sorted(a) == sorted(b),
    "chunk": lambda a, n: [a[k : k + n] for k in range(0, len(a), n)],
    "invert": lambda d: {v: k for k, v in d.items()},
    "tally": Counter,
    "triangle_area": lambda a, b: a * b / 2,
    "rotate": lambda a, n: a[n:] + a[:n],
    "remove_blanks": lambda t: t.replace(" ", ""),
    "multiples": lambda n, c: [n * k for k in range(1, c + 1)],
    "difference": lambda a: max(a) - min(a),
    "starts_with_vowel": lambda t: t[0].lower() in "aeiou",
    "median": lambda a: sorted(a)[len(a) // 2],
    "zip_pairs": lambda a, b: [list(pair) for pair in zip(a, b, strict=True)],
    "count_down": lambda n: list(range(n, 0, -1)),
    "absolute": lambda a: [abs(x) for x in a],
    "divisors": lambda n: [k for k in range(1, n + 1) if n % k == 0],
    "double_letters": lambda t: "".join(c * 2 for c in t),
    "count_positive": lambda a: sum(x > 0 for x in a),
    "last_item": lambda a: a[-1] if a else None,
    "join_with_dash": "-".join,
    "square_all": lambda a: [x * x for x in a],
    "contains_digit": lambda t: any(c.isdigit() for c in t),
    "dot_product": lambda a, b: sum(x * y for x, y in zip(a, b, strict=True)),
    "shorten": lambda t, n: t if len(t) <= n else t[:n] + "...",
    "evens_and_odds": lambda a: [[x for x in a if x % 2 == 0], [x for x in a if x % 2]],
    "count_lines": lambda t: len(t.splitlines()),
    "transpose": lambda a: [list(row) for row in zip(*a, strict=True)],
}


def test_code_examples_are_right() -> None:
    found = {entry["function"]: entry for entry in PROMPTS["code"]}
    assert found.keys() == SOLUTIONS.keys()
    for name, entry in found.items():
        assert re.fullmatch(rf"{name}\((\w+)(, \w+)*\)", entry["signature"])
        assert len(entry["examples"]) >= 2
        for example in entry["examples"]:
            assert len(example["arguments"]) == entry["signature"].count(",") + 1
            given = SOLUTIONS[name](*example["arguments"])
            assert given == example["gives"], (name, example)
            assert type(given) is type(example["gives"]) or isinstance(given, int | float | dict)
    assert all(entry["signature"] in entry["prompt"] for entry in PROMPTS["code"])


@pytest.mark.parametrize("name", EVERY)
def test_each_can_be_scored_on(name: str) -> None:
    """The prompts arrive whole, and no question is on both sides of a split, in whatever wording."""
    capability = load_capability(name, name)
    assert [p.prompt for p in capability.prompts] == [p["prompt"] for p in PROMPTS[name]]
    assert capability.has_pairs == (name in IDS)
    assert capability.has_references == (name == "knowledge")
    scoring, held_out = capability.split(scoring=32, held_out=16, seed=3)
    sides = [{p.query or p.without for p in side.prompts} for side in (scoring, held_out)]
    assert (len(sides[0]), len(sides[1])) == (32, 16), "each has a question of its own"
    assert not sides[0] & sides[1]


def test_only_like_is_joined_with_like() -> None:
    joined = load_capability("two", "keywords+constrained_response")
    assert [p.without for p in joined.prompts[:2]] == [
        PROMPTS[n][0]["without"] for n in ("keywords", "constrained_response")
    ]
    assert len(load_capability("two", "math+code").prompts) == len(PROMPTS["math"]) + len(PROMPTS["code"])
    with pytest.raises(CapabilityError, match="cannot be joined") as caught:
        load_capability("two", "title+math")
    assert "without" in str(caught.value.got)
    with pytest.raises(CapabilityError, match="cannot be joined") as caught:
        load_capability("two", "math+knowledge")
    assert "reference" in str(caught.value.got)


@pytest.mark.skipif(not IFEVAL.exists(), reason="IFEval's prompts are not at hand")
def test_no_prompt_is_from_ifeval() -> None:
    official = [json.loads(line)["prompt"].strip().lower() for line in IFEVAL.read_text().splitlines()]
    whole = "\n".join(official)
    for prompts in PROMPTS.values():
        assert not {p["prompt"].lower() for p in prompts} & set(official)
        assert not [q for q in {query(p).lower() for p in prompts} if q in whole]
    for name in IDS:
        assert not [text for text in {wording(p).strip().lower() for p in PROMPTS[name]} if text in whole]
