"""What a benchmark's test prompts are judged by, on models whose replies are known."""

from pathlib import Path

import pytest
from talkers import FOUR, MURMUR, SHOUT, save_talker

from wpmerge import bench_testing
from wpmerge.bench_setup import BenchSettings
from wpmerge.judges import TestPrompt
from wpmerge.models import Family, open_family
from wpmerge.pieces import Pieces

NO_COMMA = ("punctuation:no_comma", {})
CAPITAL = ("change_case:english_capital", {})


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A base that murmurs, one expert that counts and one that shouts."""
    root = tmp_path_factory.mktemp("talking")
    base = save_talker(root / "base", MURMUR)
    experts = {"count": save_talker(root / "count", FOUR), "shout": save_talker(root / "shout", SHOUT)}
    return open_family(str(base), {name: str(path) for name, path in experts.items()})


def prepared(family: Family, place: Path, *, longest: int = 16) -> bench_testing.Tester:
    """Six sums a seed, every other of them 4; capitals and no comma for the shouter."""
    sums = tuple(TestPrompt(prompt=f"number {n}", judge="number", answer=4 if n % 2 else 12) for n in range(12))
    orders = tuple(TestPrompt(prompt=f"order {n}", judge="ifeval", instructions=(NO_COMMA, CAPITAL)) for n in range(12))
    settings = BenchSettings(seeds=(0, 1), longest=longest, batch_size=4)
    return bench_testing.Tester(family, {"count": sums, "shout": orders}, (), settings, Pieces(place))


def test_right_replies_are_counted_and_no_others(family: Family, tmp_path: Path) -> None:
    case = prepared(family, tmp_path)
    for seed in (0, 1):
        counted = case.test(family.weights["count"], seed, ("count", "shout"))
        wanted = "".join("1" if item.answer == 4 else "0" for item in case.tests["count"][seed])
        assert counted["count"].correct == wanted and {"0", "1"} == set(wanted)
        assert counted["shout"].correct == "000000"  # no comma, and no capitals either
        shouted = case.test(family.weights["shout"], seed, ("count", "shout"))
        assert shouted["shout"].correct == "111111"
        assert shouted["count"].correct == "000000"
        murmured = case.test(family.weights[""], seed, ("count", "shout"))
        assert murmured["count"].correct == murmured["shout"].correct == "000000"
        assert all(each.unfinished == 0 for run in (counted, shouted, murmured) for each in run.values())


def test_a_reply_cut_short_is_counted_as_unfinished(family: Family, tmp_path: Path) -> None:
    found = prepared(family, tmp_path, longest=3).test(family.weights["count"], 0, ("count",))["count"]
    assert (found.correct, found.unfinished) == ("000000", 6)  # "the answer is", and no number
