"""Rank stability through `prove`: over wordings, draws of prompts, and layers beside the anchor's."""

import json
from pathlib import Path

import pytest
from families import WORDS, write_family
from typer.testing import CliRunner

from wpmerge import cli
from wpmerge.proving import ProveSettings, prove
from wpmerge.readings import ScoreSettings
from wpmerge.scoring import score

SETTINGS = ScoreSettings(prompts=8, held_out=6, reference_tokens=5, top=0, sample=0, accept_anchor=True, layer=1)
QUICK = ProveSettings(shares=(0.3,), randoms=1, draws=10)


def write_pairs(path: Path, *, wordings: int, queries: int = 16) -> Path:
    """Queries with the same instruction in several wordings, and a second instruction in one."""
    lines = []
    for number in range(queries):
        query = f"w{3 + number} w{20 + number} w{5 + 2 * number}"
        for wording in range(wordings):
            lines.append({"prompt": f"{query} w{WORDS - 1 - wording}", "without": query, "instruction": "end"})
        lines.append({"prompt": f"{query} w40 w41", "without": query, "instruction": "other"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(path: Path, *, wordings: int) -> dict[str, object]:
    made = write_family(path, names=("a",))
    prompts = write_pairs(path / "a.jsonl", wordings=wordings)
    score(
        base=str(made["base"]),
        experts={"a": str(made["a"])},
        capabilities={"a": str(prompts)},
        out=path / "scores",
        settings=SETTINGS,
    )
    return prove(path / "scores", settings=QUICK)["capabilities"]["a"]["stability"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("stability")


@pytest.fixture(scope="module")
def found(home):
    return run(home, wordings=3)


def test_every_condition_has_its_agreement(found):
    assert found["paraphrases"]["queries"] == 6
    seeds, layers = found["seeds"], found["layers"]
    assert (seeds["seeds"], seeds["prompts"]) == ([1, 2, 3], 6) and 0 <= seeds["shared"] < 1
    assert layers["l_star"] == 1 and set(layers["neighbours"]) == {"0", "2"}
    for each in (found["paraphrases"], seeds, *layers["neighbours"].values()):
        assert -1 <= each["spearman"] <= 1 and 0 <= each["overlap"] <= 1
        assert -1 <= each["interval"][0] <= each["interval"][1] <= 1
    assert layers["neighbours"]["0"]["spearman"] != layers["neighbours"]["2"]["spearman"]


def test_the_table_has_a_row_for_each(home, found):
    arguments = ["prove", str(home / "scores"), "--share=0.3", "--randoms=1", "--out", str(home / "table")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    table = result.stdout.partition("rank stability")[2]
    for words in ("halves of prompts", "two wordings of 6 queries", "3 draws of 6 prompts", "anchor at 1 and 0"):
        assert words in table


def test_without_a_second_wording_there_is_no_agreement_of_wordings(tmp_path):
    """Another instruction on the same query is no paraphrase."""
    found = run(tmp_path, wordings=1)
    assert found["paraphrases"] is None
    assert found["seeds"] is not None and found["layers"] is not None
