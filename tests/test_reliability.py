"""The readout that is chosen: by hand, and through `score` on tiny models."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from families import write_family, write_prompts
from test_scoring import QUICK, Disk, Stop, make_disk
from typer.testing import CliRunner

from wpmerge import cli
from wpmerge.attribution import linear
from wpmerge.errors import AnchorError, WpmergeError
from wpmerge.models import open_family
from wpmerge.pieces import Pieces
from wpmerge.proving import ProveSettings, anchor_label, prove
from wpmerge.readings import ScoreSettings, make_reading, prepare_case
from wpmerge.recovery import measure_gap
from wpmerge.reliability import CANDIDATES, MARGIN, choose, compare, half_scores, pick
from wpmerge.scores import Candidate, Scores, load_scores
from wpmerge.scoring import score


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    return make_disk(tmp_path_factory.mktemp("reliability"))


AUTO = dataclasses.replace(QUICK, readouts=("auto", "anchor"))


@pytest.fixture(scope="module")
def auto(disk: Disk) -> Scores:
    return disk.score("auto", AUTO)


def candidate(readout: str, behaviour: float | None, halves: float = 0.5, *, usable: bool = True) -> Candidate:
    return Candidate(readout=readout, usable=usable, behaviour=behaviour, halves=halves)


def test_the_readout_that_foretells_the_behaviour_is_picked_and_a_preferred_one_within_the_margin() -> None:
    assert pick([candidate("reference", 0.5), candidate("anchor", 0.5 + MARGIN / 2)]) == "reference"
    assert pick([candidate("reference", 0.5), candidate("anchor", 0.5 + 2 * MARGIN)]) == "anchor"
    assert pick([candidate("reference", 0.5, 0.5), candidate("anchor", 0.1, 0.9)]) == "reference", "stable is not right"
    assert pick([candidate("reference", None), candidate("anchor", 0.1)]) == "anchor"
    assert pick([candidate("reference", 0.2), candidate("anchor", 0.9, usable=False)]) == "reference"
    assert pick([candidate("reference", 0.2, usable=False), candidate("anchor", 0.9, usable=False)]) == "anchor"
    assert pick([candidate("divergence", None, 0.3), candidate("anchor", None, 0.9)]) == "anchor", "by halves alone"


def test_halves_are_compared_where_all_candidates_read_and_something_moved() -> None:
    """Units 0 to 3 count: 4 did not move, 5 is above the anchor's layer."""
    reference = torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.0, 9.0], [1.0, 2.0, 4.0, 3.0, 0.0, 1.0]])
    anchor = torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.0, math.nan], [4.0, 3.0, 2.0, 1.0, 0.0, math.nan]])
    found = compare({"reference": reference, "anchor": anchor}, ["reference", "anchor"])
    assert found["reference"]["halves"] == pytest.approx(0.8)
    assert found["reference"]["behaviour"] == pytest.approx(0.8)
    assert found["anchor"]["halves"] == pytest.approx(-1.0)
    # the first half's ranks 1 2 3 4 with 1 2 4 3, the second half's 4 3 2 1 with 1 2 3 4
    assert found["anchor"]["behaviour"] == pytest.approx((0.8 - 1.0) / 2)
    alone = compare({"reference": reference, "anchor": anchor}, ["reference"])
    assert alone["reference"]["halves"] != found["reference"]["halves"], "an unusable anchor hides no unit"
    still = torch.zeros(2, 6)
    assert compare({"reference": still}, ["reference"])["reference"] == {
        "halves": None,
        "overlap": None,
        "behaviour": None,
    }


def test_halves_of_a_behavioural_readout_average_to_the_whole(disk: Disk, tmp_path: Path) -> None:
    family = open_family(disk.models["base"], {"e0": disk.models["e0"]})
    from wpmerge.capability import load_capability

    case = prepare_case(
        family, load_capability("e0", disk.capabilities["e0"]), QUICK, Pieces(tmp_path / "p"), lambda *_: None
    )
    gap = measure_gap(family, case, "reference", QUICK, 1 << 30, first=True)
    halves = half_scores(family, gap, QUICK, 1 << 30)["halves"]
    reading = make_reading(family, case, None, QUICK, count=len(case.starts))
    (arrays,) = linear(family.engine, family.weights[""], [family.weights["e0"]], reading.rows, reading.readout)
    whole = torch.cat([array.flatten() for array in arrays.values()])
    torch.testing.assert_close(halves.mean(dim=0), whole, rtol=1e-4, atol=1e-7)


def test_scores_say_what_was_chosen_and_from_what(disk: Disk, auto: Scores) -> None:
    stored = load_scores(disk.root / "auto")
    for name in ("e0", "e1"):
        record = stored.readouts[name]
        assert [each.readout for each in record.choice] == list(CANDIDATES)
        (chosen,) = (each for each in record.choice if each.chosen)
        assert chosen.readout == record.readout and chosen.l_star == record.l_star
        assert all(each.halves is not None and -1 <= each.halves <= 1 for each in record.choice)
        anchors = [label for label, each in stored.readouts.items() if each.readout == "anchor" and name in label]
        assert anchors == [anchor_label(stored, name)]
    named = disk.score("named", dataclasses.replace(QUICK, readouts=(stored.readouts["e0"].readout,)))
    for key, array in named.arrays.items():
        if key.split("/")[1] == "e0":
            assert torch.equal(auto.arrays[key].nan_to_num(9), array.nan_to_num(9)), "as if it had been asked for"
    assert not named.readouts["e0"].choice


def test_a_killed_run_chooses_the_same_again(disk: Disk, auto: Scores) -> None:
    with pytest.raises(KeyboardInterrupt):
        disk.score("killed", AUTO, progress=Stop("e1: linear"))
    again = disk.score("killed", AUTO)
    assert again.readouts == auto.readouts
    assert all(torch.equal(array.nan_to_num(9), again.arrays[key].nan_to_num(9)) for key, array in auto.arrays.items())


def test_what_cannot_be_measured_is_refused_with_its_reason(disk: Disk, tmp_path: Path) -> None:
    """Without insisting, tiny random models have no reliable anchor."""
    family = open_family(disk.models["base"], {"e0": disk.models["e0"]})
    from wpmerge.capability import load_capability

    cautious = dataclasses.replace(QUICK, accept_anchor=False)
    case = prepare_case(
        family, load_capability("e0", disk.capabilities["e0"]), cautious, Pieces(tmp_path / "p"), lambda *_: None
    )
    try:
        gaps = choose(family, case, cautious, 1 << 30, Pieces(tmp_path / "q"), lambda *_: None)
    except AnchorError as error:
        assert error.got
    else:
        assert all(each.usable or each.refused for each in gaps[0].choice)
        assert not next(each for each in gaps[0].choice if each.readout == "anchor").usable


def test_auto_comes_first_or_not_at_all(disk: Disk) -> None:
    with pytest.raises(WpmergeError, match="auto is not the first"):
        ScoreSettings(readouts=("anchor", "auto"))
    arguments = ["score", "--base", disk.models["base"], "--expert", f"e0={disk.models['e0']}"]
    arguments += ["--capability", f"e0={disk.capabilities['e0']}", "--out", str(disk.root / "none")]
    result = CliRunner().invoke(cli.app, [*arguments, "--readout", "anchor", "--readout", "auto"])
    assert result.exit_code == 2 and "auto is not the first" in result.stderr


def test_the_command_says_which_readout_it_uses(disk: Disk) -> None:
    arguments = ["score", "--base", disk.models["base"], "--expert", f"e0={disk.models['e0']}", "--accept-anchor"]
    arguments += ["--capability", f"e0={disk.capabilities['e0']}", "--out", str(disk.root / "said")]
    arguments += ["--readout=auto", "--prompts=6", "--held-out=4", "--top-k=0", "--random-sample=0"]
    arguments += ["--reference-tokens=5"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    table = result.stdout.partition("readouts by how far one half of the prompts")[2].partition("e0:")[0]
    assert table.count("used") == 1 and all(name in table for name in CANDIDATES)


def test_a_ranking_whose_readout_is_the_anchor_is_proved_by_it(tmp_path: Path) -> None:
    """The anchor's scores then bear the capability's own name."""
    made = write_family(tmp_path, names=("a",))
    write_prompts(tmp_path / "a.jsonl")
    settings = ScoreSettings(
        readouts=("anchor",), prompts=8, held_out=6, reference_tokens=5, top=0, sample=0, accept_anchor=True, layer=1
    )
    score(
        base=str(made["base"]),
        experts={"a": str(made["a"])},
        capabilities={"a": str(tmp_path / "a.jsonl")},
        out=tmp_path / "scores",
        settings=settings,
    )
    found = prove(tmp_path / "scores", settings=ProveSettings(shares=(0.2,), randoms=1, draws=5, roles=True))
    proof = found["capabilities"]["a"]
    assert set(proof["readouts"]) == {"reference", "anchor"} and proof["roles"]["l_star"] == 1
    assert set(proof["stability"]["layers"]["neighbours"]) == {"0", "2"}
