"""The benchmark's test prompts are fresh, enough, the same for the same seed, and judged as they should be."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.demo_family import world
from benchmarks.merge_quality import prompts, wordings
from wpmerge import builtin
from wpmerge.ifeval import ifeval_checkers
from wpmerge.judges import judge, load_prompts, load_tests

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "family"
SKILLS = {"smollm2": prompts.SMOLLM2, "demo": tuple(world.EXPERTS)}
COUNT = 510


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prompts")
    prompts.write(out)
    return out


def known(folder: Path) -> list[str]:
    """Prompts of a family's own files, and the queries in them without instruction."""
    rows = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [row["prompt"] for row in rows] + [row["without"] for row in rows if "without" in row]


@pytest.mark.parametrize(("family", "skill"), [(family, skill) for family, all_ in SKILLS.items() for skill in all_])
def test_there_are_enough_and_all_differ(written: Path, family: str, skill: str) -> None:
    items = load_tests(written / family / f"{skill}.jsonl")
    assert len({item.prompt for item in items}) == len(items) == COUNT
    kinds = {"math": {"number"}, "json": {"json"}}.get(skill, {"ifeval"})
    assert {item.judge for item in items} == kinds
    if kinds == {"ifeval"}:
        names = [item.instructions[0][0] for item in items]
        counts = {name: names.count(name) for name in names}
        assert len(counts) == (6 if skill == "format" else 2)
        assert max(counts.values()) - min(counts.values()) <= 10


def test_the_same_seed_gives_the_same_files(written: Path, tmp_path: Path) -> None:
    prompts.write(tmp_path / "again")
    prompts.write(tmp_path / "other", seed=1)
    for path in written.rglob("*.jsonl"):
        name = path.relative_to(written)
        assert (tmp_path / "again" / name).read_bytes() == path.read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != path.read_bytes()


def test_retain_prompts_are_of_no_skill(written: Path) -> None:
    for family, skills in SKILLS.items():
        plain = load_prompts(written / family / "retain.jsonl")
        assert len(set(plain)) == len(plain) >= 120
        own = {prompt for skill in skills for prompt in load_prompts(written / family / f"{skill}.jsonl")}
        assert not own & set(plain)


def test_the_demos_queries_are_held_out_and_its_wordings_new(written: Path) -> None:
    splits = world.split_kinds(world.SEED)
    trained = {q for t in world.topics() for kind in splits[t.name][0] for q in world.queries(t, kind)}
    scored = set(known(ROOT / "wpmerge" / "demo_family" / "prompts"))
    scored |= {entry["without"] for name in builtin.instructions() for entry in builtin.prompts(name)}
    evaluated = load_prompts(ROOT / "wpmerge" / "demo_family" / "eval.jsonl")
    fresh = [p for skill in world.EXPERTS for p in load_prompts(written / "demo" / f"{skill}.jsonl")]
    queries = set(prompts.demo_queries(0))
    assert len(queries) == 260
    assert not queries & (trained | scored)
    assert not set(fresh) & set(evaluated)
    assert all(any(prompt.startswith(query) for query in queries) for prompt in fresh)
    orders = {way for ways in wordings.DEMO.values() for way in ways}
    for name in world.INSTRUCTIONS:
        for template in (*world.WORDINGS[name]["train"], *world.WORDINGS[name]["held_out"]):
            assert not orders & set(world.expansions(template))
    assert not orders & {
        entry["prompt"].removeprefix(f"{entry['without']} ")
        for name in builtin.instructions()
        for entry in builtin.prompts(name)
    }


def test_the_demo_has_no_more_than_it_has() -> None:
    with pytest.raises(ValueError, match="520"):
        prompts.demo("letters", count=521, seed=0)


@pytest.fixture(scope="module")
def seen() -> str:
    """Everything that SmolLM2's experts were scored, tuned or developed on, and the built-in prompts; lower case."""
    if not SHARED.exists():
        pytest.skip("needs ../shared/family")
    texts = known(SHARED / "prompts") + known(SHARED / "eval")
    texts += [entry["prompt"] for name in builtin.names() for entry in builtin.prompts(name)]
    return "\n".join(texts).lower()


def test_no_word_of_the_new_prompts_was_seen(seen: str) -> None:
    words = (*wordings.FORMAT_TOPICS, *wordings.NAMES, *wordings.THINGS, *wordings.JOBS, *wordings.CITIES)
    assert not [word for word in words if re.search(rf"\b{re.escape(word.lower())}\b", seen)]
    assert len(set(words)) == len(words)


def test_no_phrasing_of_the_new_prompts_was_seen(seen: str) -> None:
    ways = [way for _, each in wordings.FORMAT.values() for way in each]
    pieces = [*ways, *wordings.JSON_ORDERS, *(f.split("{topic}")[0] for f in wordings.FORMAT_FRAMES)]
    for way in (*wordings.PROBLEMS.values(), *wordings.PEOPLE):
        pieces += [piece for piece in re.split(r"\{\w+\}", way) if len(piece.split()) > 3]
    assert not [piece for piece in pieces if piece.lower().strip() in seen]


def test_numbers_lie_where_none_was_seen(seen: str) -> None:
    """Every problem has a number, and every person an age, beyond what the experts' prompts had in its place."""
    ages = {
        int(age)
        for age in re.findall(r'"age": (\d+)', (SHARED / "prompts" / "json.jsonl").read_text().replace("\\", ""))
    }
    fresh = {item["answer"]["age"] for item in prompts.smollm2("json", count=COUNT, seed=0)}
    assert ages
    assert not ages & fresh
    firsts = {int(number) for number in re.findall(r"(?:has|shares) (\d+)", seen)}
    groups = {int(number) for number in re.findall(r"among (\d+)|are (\d+) boxes", seen) for number in number if number}
    assert max(groups) < 10
    for item in prompts.smollm2("math", count=COUNT, seed=0):
        numbers = [int(number) for number in re.findall(r"\d+", item["prompt"])]
        if "trays" in item["prompt"] or "splits" in item["prompt"]:
            assert not {10, 11, 12}.isdisjoint(numbers), item  # that many groups were never asked about
        else:
            assert numbers[0] > 60, item
    assert firsts


@pytest.mark.parametrize(
    ("fresh", "known_as"),
    [
        ("left", r"has (\d+) \w+ and gives away"),
        ("found", r"has (\d+) \w+\. \w+ buys \d+ more"),
        ("packs", r"has (\d+) \w+\. \w+ buys \d+ bags"),
        ("drops", r"has (\d+) \w+, loses"),
    ],
)
def test_a_problem_starts_from_more_than_its_kind_was_seen_with(seen: str, fresh: str, known_as: str) -> None:
    largest = max(int(number) for number in re.findall(known_as, seen))
    items = [item["prompt"] for item in prompts.smollm2("math", count=COUNT, seed=0) if f" {fresh}" in item["prompt"]]
    firsts = [int(re.findall(r"\d+", text)[0]) for text in items]
    assert len(firsts) > 20
    assert min(firsts) > largest


def test_arithmetic_is_right() -> None:
    for item in prompts.smollm2("math", count=120, seed=3):
        first, *others = (int(number) for number in re.findall(r"\d+", item["prompt"]))
        text = item["prompt"]
        expected = {
            "left?": lambda a, b: a - b,
            "found": lambda a, b: a + b,
            "packs": lambda a, b, c: a + b * c,
            "drops": lambda a, b, c: a - b + c,
            "trays": lambda a, b: a * b,
            "splits": lambda a, b: a // b,
        }
        way = next(how for word, how in expected.items() if f" {word}" in text)
        assert item["answer"] == way(first, *others)
        assert item["answer"] > 0


def test_right_replies_are_judged_right(written: Path) -> None:
    for item in load_tests(written / "smollm2" / "json.jsonl")[:20]:
        assert judge(item, json.dumps(item.answer))
    for item in load_tests(written / "smollm2" / "math.jsonl")[:20]:
        assert judge(item, f"So the answer is {item.answer}.")
        assert not judge(item, f"The answer is {item.answer + 1}.")
    names = {
        name
        for skill in ("letters", "marks", "frame")
        for i in load_tests(written / "demo" / f"{skill}.jsonl")
        for name, _ in i.instructions
    }
    assert names <= set(ifeval_checkers())


def test_the_demos_own_answers_are_judged_right(written: Path) -> None:
    """The world's answer to each query follows its instruction, and the plain answer does not."""
    ids = {identifier: name for name, identifier in world.INSTRUCTION_IDS.items()}
    topic = world.topics()[0]
    for skill in world.EXPERTS:
        for item in load_tests(written / "demo" / f"{skill}.jsonl")[:60]:
            identifier, kwargs = item.instructions[0]
            order = world.Order(instruction=ids[identifier], text="", kwargs=dict(kwargs))
            assert judge(item, world.answer(topic, "look", 0, order)), item
            assert not judge(item, world.answer(topic, "look", 0)), item
