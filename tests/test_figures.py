"""Figures are valid Vega-Lite, tell what the artifacts say, and nothing by colour alone."""

import json
from dataclasses import replace

import pytest
import vl_convert
from reports import NASTY, TYPES, made_bench, made_evaluation, made_plan, made_proof, made_scores

from wpmerge.console import finite
from wpmerge.figures import DARK, LIGHT, Figure, themed, with_data
from wpmerge.figures_evidence import anchor_curves, proof_curves, role_map, role_members, screen_scatter
from wpmerge.figures_maps import model_units, reach, score_map
from wpmerge.figures_results import bench_figure, instruction_figure, retention_figure
from wpmerge.report import packed, png_of, sections, vega_lite_version
from wpmerge.report_inputs import Material


def whole(**sizes) -> Material:
    scores = made_scores(**sizes)
    return Material(
        scores=scores,
        plan=made_plan(scores),
        evaluation=made_evaluation(scores),
        proof=made_proof(scores),
        bench=made_bench(scores),
        retention=made_evaluation(scores).retention(),
    )


def all_figures(material: Material) -> list[Figure]:
    return [figure for section in sections(material) for figure in section.figures]


def compiled(figure: Figure) -> dict:
    """Vega's spec: the compiler refuses what is no Vega-Lite."""
    text = json.dumps(finite(with_data(figure)), allow_nan=False)
    return vl_convert.vegalite_to_vega(text, vl_version=vega_lite_version())


def size_of(figure: Figure) -> tuple[float, float]:
    text = json.dumps(finite(with_data(figure)), allow_nan=False)
    svg = vl_convert.vegalite_to_svg(text, vl_version=vega_lite_version())
    head = svg[: svg.index(">")]
    return tuple(float(head.split(f'{name}="')[1].split('"')[0]) for name in ("width", "height"))


def test_all_figures_compile():
    figures = all_figures(whole())
    names = [figure.name for figure in figures]
    assert len(set(names)) == len(names)
    assert set(names) >= {
        "scores-head-reference", "scores-neuron-reference", "scores-head-anchor", "scores-head-retain",
        "scores-outside-layers", "coefficients-head", "coefficients-neuron", "anchors", "screen-reference",
        "proof-reference", "roles-head", "roles-neuron", "retention", "instructions", "bench-generated",
    }  # fmt: skip
    for figure in figures:
        made = compiled(figure)
        assert made["marks"] and figure.caption and figure.title and figure.rows
        assert "{" + "ink}" not in json.dumps(with_data(figure))


def test_scores_alone_are_enough():
    names = [figure.name for figure in all_figures(Material(scores=made_scores()))]
    assert "scores-head-reference" in names and "anchors" in names and "retention" not in names


@pytest.mark.parametrize(
    "sizes", [{"layers": 4, "heads": 4, "neurons": 16}, {"layers": 30, "heads": 9, "neurons": 1536}]
)
def test_maps_fit_a_page_whatever_the_model(sizes):
    scores = made_scores(**sizes, names=("a", "b", "c"))
    for kind in ("head", "neuron"):
        figure = score_map(scores, kind, "reference")
        width, height = size_of(figure)
        assert 350 < width < 1150 and 200 < height < 1400, (kind, width, height)
        assert len(figure.rows) <= 15_000


def test_marks_say_what_colours_say():
    figure = score_map(made_scores(), "head", "reference")
    assert {each["mark"] for each in figure.rows} == {"▲", "▼", None}
    text = json.dumps(figure.spec)
    assert "mark:N" in text or '"mark"' in text
    assert "cross effect" in figure.caption and "not a score of 0" in figure.caption


def test_colours_end_where_most_units_do():
    assert reach([0.0, None]) == 1.0
    assert reach([0.1] * 999 + [5.0]) == 0.1
    assert reach([-0.5, 0.2]) == 0.5


def test_both_themes_have_the_same_colours_to_give():
    assert set(LIGHT) == set(DARK)
    figure = model_units(made_scores(), ["embedding"], "reference")
    assert themed(figure.spec, LIGHT) != themed(figure.spec, DARK)


def test_anchors_mark_their_layer():
    figure = anchor_curves(made_scores())
    assert {each["text"] for each in figure.rows if "text" in each} == {"l* = 1"}
    assert len([each for each in figure.rows if each.get("measure") == "t"]) == 8
    scores = made_scores()
    assert anchor_curves(replace(scores, readouts={k: v for k, v in scores.readouts.items() if "@" not in k})) is None


def test_the_screen_says_its_rank_correlation():
    figure = screen_scatter(made_scores(), "reference", ["head", "neuron"])
    assert {each["panel"] for each in figure.rows} == {
        f"{name}: heads\nSpearman 0.90, of the random draw 0.80" for name in "ab"
    }
    first = figure.rows[1]
    assert (first["screen"], first["exact"], first["low"], first["high"]) == (0.1, 0.11, 0.0708, 0.1492)
    assert screen_scatter(made_scores(), "divergence", ["head"]) is None


def test_curves_of_a_proof_have_a_band_where_it_is_known():
    scores = made_scores()
    figure = proof_curves(made_proof(scores), "reference")
    chance = [each for each in figure.rows if each["ranking"] == "matched random, mean"]
    assert (chance[0]["low"], chance[0]["value"], chance[0]["high"]) == (0.1, 0.2, 0.3) and "band" in figure.caption
    older = proof_curves(made_proof(scores, ranged=False), "reference")
    assert all(each.get("low") is None for each in older.rows) and "band" not in older.caption
    compiled(older)
    assert proof_curves(made_proof(scores), "judged") is None


def test_roles_are_letters():
    scores = made_scores()
    proof = made_proof(scores)
    for kind, marks in (("head", {("head.0.1", "S"), ("head.1.2", "S")}), ("neuron", {("neuron.3.7", "E")})):
        figure = role_map(proof, scores, kind)
        assert {(each["unit"], each["mark"]) for each in figure.rows if "role" in each} == marks
    assert role_map(proof, scores, "norm") is None
    assert role_members(proof)["a"] == {"head.0.1": "source", "head.1.2": "source", "neuron.3.7": "execution"}
    for each in proof["capabilities"]["a"]["roles"]["units"]:
        each.pop("members")  # of an older proof: the strongest only
    assert role_members(proof)["b"] == {"head.0.1": "source", "neuron.3.7": "execution"}
    assert role_members(None) == {}


def test_retention_has_base_experts_and_merges():
    evaluation = made_evaluation(made_scores())
    figure = retention_figure(evaluation, evaluation.retention())
    rows = {(each["model"], each["panel"]): each for each in figure.rows}
    assert rows["a", TYPES[0]]["value"] == 1.0 and rows["a", TYPES[0]]["role"] == "expert"
    assert rows["base", TYPES[0]]["value"] == 0.0 and rows["merge", TYPES[1]]["role"] == "merge"
    assert rows["merge", TYPES[0]]["value"] == pytest.approx(5 / 6, abs=1e-3)
    assert rows["merge", TYPES[0]]["low"] < 5 / 6 < rows["merge", TYPES[0]]["high"]
    assert retention_figure(evaluation, {}) is None


def test_instructions_are_written_out():
    figure = instruction_figure(made_evaluation(made_scores()))
    rows = {(each["model"], each["type"]): each for each in figure.rows}
    assert rows["merge", TYPES[0]]["written"] == "0.83" and rows["base", TYPES[1]]["written"] == "0.00"
    assert rows["merge", TYPES[0]]["n"] == 6


def test_a_benchmark_tells_ours_from_theirs():
    figure = bench_figure(made_bench(made_scores()), "generated")
    assert {(each["model"], each["role"]) for each in figure.rows} == {
        ("uniform", "other methods"),
        ("fuse:refine", "wpmerge"),
    }
    assert bench_figure(made_bench(made_scores()), "logprob") is None


def test_packing_keeps_every_row():
    rows = [{"a": 1, "b": "x"}, {"a": None, "b": NASTY}, {"b": "x", "c": 0.5}]
    made = packed(rows)

    def cell(name: str, i: int) -> object:
        column = made["columns"][name]
        return column["texts"][column["at"][i]] if "texts" in column else column["values"][i]

    assert made["length"] == 3
    assert [[cell(name, i) for name in "abc"] for i in range(3)] == [
        [1, "x", None],
        [None, NASTY, None],
        [None, "x", 0.5],
    ]


def test_a_png_is_one():
    found = png_of(anchor_curves(made_scores()))
    assert found[:8] == b"\x89PNG\r\n\x1a\n" and len(found) > 5_000
