"""The page as a file: whole, safe whatever artifacts hold, never half written; and what belongs together."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from reports import NASTY, data_of, made_bench, made_evaluation, made_plan, made_proof, made_scores, model
from test_figures import whole

from wpmerge.console import print_table
from wpmerge.errors import WpmergeError
from wpmerge.evaluation import to_json
from wpmerge.inspecting import inspect, inspection_tables
from wpmerge.plan import Plan
from wpmerge.proof import load_proof
from wpmerge.report import LARGEST, in_script, page, report_tables, sections, write_report
from wpmerge.report_inputs import Material, read_material


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Every artifact in its directory."""
    path = tmp_path_factory.mktemp("artifacts")
    material = whole()
    material.scores.save(path / "scores")
    material.plan.save(path / "plan")
    for name, text in (
        ("evaluation", to_json(material.evaluation)),
        ("proof", json.dumps(material.proof)),
        ("bench", json.dumps(material.bench)),
    ):
        (path / name).mkdir()
        (path / name / f"{name}.json").write_text(text)
    return path


def everything(home: Path) -> Material:
    return read_material(home / "scores", **{name: home / name for name in ("plan", "evaluation", "proof", "bench")})


@pytest.fixture(scope="module")
def text(home) -> str:
    material = everything(home)
    return page(material, sections(material), home / "report.html")


def test_the_page_needs_nothing_else(text):
    assert len(text.encode()) < LARGEST
    outside = text.replace(text[text.index("<script>") : text.index('<script type="text/plain"')], "")
    assert not re.search(r"(src|href)=\"?(https?:)?//", outside) and "@import" not in outside and "<link" not in outside
    assert "default-src 'none'" in text
    assert "{{" not in outside.replace("{{title}}", "")  # of NASTY, which is no placeholder


def test_what_artifacts_hold_is_text(text):
    assert NASTY not in text and "<img src=x" not in text
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;{{title}}" in text
    assert text.count("</script>") == 3


def test_scripts_cannot_end_their_element():
    assert "</script" not in in_script("'</script>'") and "<!--" not in in_script("'<!--'")
    assert in_script("a.replace(/</g, 1)") == "a.replace(/</g, 1)"


def test_the_data_say_of_a_unit_what_the_artifacts_do(home, text):
    found, scores = data_of(text)["lookup"], made_scores()
    row = found["units"].index("head.1.2")
    for column, each in enumerate(found["maps"]):
        key = f"linear/{each['label']}/{each['expert']}/head"
        if key in scores.arrays:
            assert found["values"][row][column] == pytest.approx(float(scores.arrays[key][1, 2]), rel=6e-3)
    column = [(each["label"], each["expert"]) for each in found["maps"]].index(("a@anchor", "a"))
    assert found["values"][found["units"].index("head.3.0")][column] is None
    assert found["exact"]["a"]["head.0.1"] == [0.1, 0.11, 0.02, "top"]
    plan = made_plan(scores)
    wanted = float(plan.coefficients["b"]["model.layers.1.self_attn.o_proj.weight"].values[4])
    assert found["coefficients"]["b"][row] == pytest.approx(wanted, rel=1e-3)
    assert found["names"]["norm.2.1"] == "post_attention_layernorm"
    assert found["roles"]["a"]["head.0.1"] == "source"


def test_commands_and_provenance(text):
    assert "wpmerge score --base models/base" in text and "wpmerge fuse " in text and "wpmerge report " in text
    assert "sampled-sha256:base" in text


def test_without_the_base_there_is_no_sentence_and_that_is_said(home, text):
    assert data_of(text)["lookup"]["why"] == {}
    assert "so the sentences behind coefficients are left out" in text


def test_writing(home, tmp_path, capsys):
    material = everything(home)
    out = tmp_path / "report.html"
    out.write_text("mine")
    with pytest.raises(WpmergeError, match="the output file exists"):
        write_report(material, out=out)
    assert out.read_text() == "mine"
    written = write_report(material, out=out, overwrite=True)
    assert out.stat().st_size == written["bytes"] and list(tmp_path.iterdir()) == [out]
    for table in report_tables(material, written, text=True):
        print_table(table)
    said = capsys.readouterr().out
    assert "a: reference" in said and "retention" in said and "matched random" in said and "uniform" in said
    with pytest.raises(WpmergeError, match="no such directory"):
        write_report(material, out=tmp_path / "no" / "report.html")
    with pytest.raises(WpmergeError, match="is a directory"):
        write_report(material, out=tmp_path)
    with pytest.raises(WpmergeError, match="in an input"):
        write_report(material, out=home / "scores" / "report.html")


def test_pngs_are_written_whole_or_not_at_all(tmp_path):
    scores = made_scores(layers=2, heads=2, neurons=4, names=("a",))
    material = Material(scores=scores, paths={"scores": tmp_path / "scores"})
    written = write_report(material, out=None, png=tmp_path / "png")
    names = {path.name for path in (tmp_path / "png").iterdir()}
    assert names == {"figures.json", *(f"{name}.png" for name in written["figures"])}
    with pytest.raises(WpmergeError, match="exists"):
        write_report(material, out=None, png=tmp_path / "png")


def foreign(scores, **changes) -> Plan:
    return replace(made_plan(scores), **changes)


def test_what_does_not_belong_together_is_refused(home, tmp_path):
    scores = made_scores()
    foreign(scores, base=model("another")).save(tmp_path / "plan")
    other = made_scores(names=("c", "d"))
    (tmp_path / "evaluation.json").write_text(to_json(made_evaluation(other)))
    (tmp_path / "proof.json").write_text(json.dumps(made_proof(other)))
    (tmp_path / "bench.json").write_text(json.dumps(made_bench(other)))
    for name, path in (
        ("plan", tmp_path / "plan"),
        ("evaluation", tmp_path),
        ("proof", tmp_path),
        ("bench", tmp_path),
    ):
        with pytest.raises(WpmergeError, match="other models or skills than the scores") as caught:
            read_material(home / "scores", **{name: path})
        assert caught.value.mend and caught.value.got and caught.value.expected
    alone = replace(made_evaluation(other), skills={}, models={"x": made_evaluation(other).models["c"]})
    (tmp_path / "evaluation.json").write_text(to_json(replace(alone, reference=None, base=None)))
    with pytest.raises(WpmergeError, match="other models or skills"):
        read_material(home / "scores", evaluation=tmp_path)


@pytest.mark.parametrize("name", ["proof", "bench", "evaluation"])
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"kind": "proof", "schema_version": 9}'])
def test_damaged_files_are_refused(home, tmp_path, name, content):
    (tmp_path / f"{name}.json").write_text(content)
    with pytest.raises(WpmergeError, match=r"cannot be read|of another version"):
        read_material(home / "scores", **{name: tmp_path})
    with pytest.raises(WpmergeError, match="cannot be read"):
        read_material(home / "scores", **{name: tmp_path / "absent"})


def test_a_model_evaluated_elsewhere_is_remarked(home):
    scores = made_scores()
    moved = made_evaluation(scores)
    models = {**moved.models, "a": replace(moved.models["a"], source="elsewhere/other")}
    (home / "moved").mkdir(exist_ok=True)
    (home / "moved" / "evaluation.json").write_text(to_json(replace(moved, models=models)))
    found = read_material(home / "scores", evaluation=home / "moved")
    assert found.remarks == ("a was evaluated from elsewhere/other and scored from models/a.",)


def test_a_proof_of_an_early_version_is_read_and_that_is_said(home, tmp_path, capsys):
    old = made_proof(made_scores())
    for each in old["capabilities"].values():
        each["stability"] = {k: v for k, v in each["stability"].items() if k not in ("paraphrases", "seeds")}
    (tmp_path / "proof.json").write_text(json.dumps(old))
    material = read_material(home / "scores", proof=tmp_path)
    (remark,) = material.remarks
    assert "kept no rank stability over two wordings, other draws of prompts" in remark
    assert remark in page(material, sections(material), tmp_path / "report.html")
    for table in inspection_tables(inspect(str(tmp_path))):
        print_table(table)
    assert "two wordings: not kept by the version that wrote it" in capsys.readouterr().out


def test_inspect_reads_a_proof(home, capsys):
    found = inspect(str(home / "proof"))
    assert found["kinds"] == ["proof"] and found["proof"] == load_proof(home / "proof")
    for table in inspection_tables(found):
        print_table(table)
    said = capsys.readouterr().out
    assert "matched random" in said and "rank stability" in said and "source" in said


def test_large_models_stay_below_the_limit(monkeypatch):
    material = whole(layers=30, heads=9, neurons=1536, names=("a", "b", "c"))
    material = replace(
        material, paths={name: Path(name) for name in ("scores", "plan", "evaluation", "proof", "bench")}
    )
    made = sections(material)
    text = page(material, made, Path("report.html"))
    assert len(text.encode()) < LARGEST
    found = data_of(text)["lookup"]
    assert all(each["whole"] for each in found["kinds"]) and len(found["units"]) > 30 * 1536
    last = found["units"].index("neuron.29.1535")
    assert found["values"][last][0] == pytest.approx(
        float(material.scores.array("a", "a", "neuron")[29, 1535]), rel=6e-3
    )
    monkeypatch.setattr("wpmerge.report.EVERY", 500_000)  # as for a model with more neurons
    text = page(material, made, Path("report.html"))
    assert len(text.encode()) < LARGEST
    assert [each["whole"] for each in data_of(text)["lookup"]["kinds"]][:2] == [True, False]
