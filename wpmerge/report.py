"""One self-contained page of figures from artifacts, the same figures as files, and the short form as text."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from wpmerge.arch import COARSE_KINDS, MODEL_KINDS, Kind
from wpmerge.cells import cell_width, kinds_of
from wpmerge.console import Table, finite
from wpmerge.errors import OutputError
from wpmerge.figures import DARK, LIGHT, Figure, with_data
from wpmerge.figures_evidence import anchor_curves, proof_curves, role_map, screen_scatter
from wpmerge.figures_maps import coefficient_map, model_units, score_map
from wpmerge.figures_results import bench_figure, instruction_figure, retention_figure
from wpmerge.lookup import EVERY, lookup, numbers
from wpmerge.output import check_output, check_output_file, output_directory, write_file, write_own_file
from wpmerge.page_data import compressed
from wpmerge.repeating import bench_command, eval_command, fuse_command, prove_command, score_command
from wpmerge.replaying import unit_coefficients
from wpmerge.report_inputs import Material
from wpmerge.report_tables import overview, provenance_tables, text_tables

PNG_SCALE = 2.0
"""Pixels per unit of a figure: sharp in a paper and on a slide."""
LARGEST = 5_000_000
"""Bytes that a page may take."""
GLOBALS = "window.vegaEmbed = vegaEmbed;"
"""What the page's script takes from the bundle of Vega's scripts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page: figures under a heading."""

    name: str
    title: str
    figures: Sequence[Figure]


def sections(material: Material) -> list[Section]:
    """Every figure that there is something for, in reading order."""
    scores, kinds = material.scores, kinds_of(material.scores)
    inner = [kind for kind in kinds if kind not in MODEL_KINDS]
    first = [kind for kind in ("head", "neuron") if kind in inner] or [k for k in inner if k in COARSE_KINDS][:1]
    rest = [kind for kind in inner if kind not in first]
    where = [
        *(score_map(scores, kind, "reference") for kind in first),
        model_units(scores, kinds, "reference"),
        *(score_map(scores, kind, "reference", folded=True) for kind in rest),
        *(score_map(scores, kind, other, folded=True) for other in ("anchor", "divergence") for kind in inner),
        *(score_map(scores, kind, "reference", retain=True, folded=True) for kind in inner),
    ]
    trust = [
        anchor_curves(scores),
        screen_scatter(scores, "reference", first),
        screen_scatter(scores, "reference", rest, others=True, folded=True),
        *(screen_scatter(scores, other, inner, folded=True) for other in ("anchor", "divergence")),
    ]
    if material.proof is not None:
        trust.append(proof_curves(material.proof, "reference"))
        trust += [role_map(material.proof, scores, kind) for kind in first]
        trust += [proof_curves(material.proof, other, folded=True) for other in ("anchor", "judged")]
    kept: list[Figure | None] = []
    if material.evaluation is not None:
        kept += [retention_figure(material.evaluation, material.retention), instruction_figure(material.evaluation)]
    if material.bench is not None:
        kept += [bench_figure(material.bench, "generated"), bench_figure(material.bench, "logprob", folded=True)]
    made = [
        Section(name="where", title="Where the skills lie", figures=_there(where)),
        Section(name="coefficients", title="What the merge takes", figures=_coefficients(material, first, rest)),
        Section(name="retention", title="What the merge keeps", figures=_there(kept)),
        Section(name="trust", title="How far to trust it", figures=_there(trust)),
    ]
    return [section for section in made if section.figures]


def _there(figures: Sequence[Figure | None]) -> list[Figure]:
    found = {figure.name: figure for figure in figures if figure is not None}
    return list(found.values())


def _coefficients(material: Material, first: Sequence[Kind], rest: Sequence[Kind]) -> list[Figure]:
    """Maps of a plan's coefficients, all with one scale of colours; of a plan with one number an expert, none."""
    plan, scores = material.plan, material.scores
    if plan is None or plan.granularity == "expert":
        return []
    arrays = {}
    for kind in (*first, *rest):
        found = {expert: unit_coefficients(plan, scores, expert, kind) for expert in plan.experts}
        known = {expert: values for expert, values in found.items() if values is not None}
        if len(known) == len(found):
            arrays[kind] = known
    highest = max([1.0, *(float(values.max()) for kind in arrays.values() for values in kind.values())])
    return [
        coefficient_map(
            kind,
            found,
            width=cell_width(scores, kind),
            highest=highest,
            folded=kind in rest,
        )
        for kind, found in arrays.items()
    ]


def commands(material: Material, out: Path) -> list[str]:
    """The commands that make the artifacts, and the report, again."""
    paths, made = material.paths, []
    made.append(score_command(material.scores, paths["scores"]))
    if material.plan is not None:
        made.append(fuse_command(material.plan, paths["scores"], paths["plan"]))
    if material.evaluation is not None:
        made.append(eval_command(material.evaluation, paths["evaluation"]))
    if material.proof is not None:
        made.append(prove_command(material.proof, paths["scores"], paths["proof"]))
    if material.bench is not None:
        made.append(bench_command(material.bench, paths["scores"], paths["bench"]))
    return [*made, report_command(paths, out)]


def report_command(paths: Mapping[str, Path], out: Path) -> str:
    """``wpmerge report`` on these artifacts."""
    import shlex

    options = [part for name, path in paths.items() if name != "scores" for part in ("--" + name, str(path))]
    return shlex.join(["wpmerge", "report", str(paths["scores"]), *options, "--out", str(out)])


def page(material: Material, made: Sequence[Section], out: Path) -> str:
    """The page: no part of it is fetched from anywhere. Every text of an artifact is escaped.

    Every unit can be opened in it; where that would take more than :data:`LARGEST` bytes, of a kind with many only
    those that a cell shows and those that were verified.
    """
    if numbers(material.scores, kinds_of(material.scores)) <= EVERY:
        text = _page(material, made, out, every=True)
        if len(text.encode()) <= LARGEST:
            return text
    return _page(material, made, out, every=False)


def _page(material: Material, made: Sequence[Section], out: Path, *, every: bool) -> str:
    figures = [figure for section in made for figure in section.figures]
    drawn = {figure.name: figure.rows for figure in figures if figure.kind and figure.name.startswith("scores-")}
    value = {
        "figures": {
            figure.name: {"spec": figure.spec, "kind": figure.kind, "picks": figure.picks, "rows": packed(figure.rows)}
            for figure in figures
        },
        "themes": {"light": LIGHT, "dark": DARK},
        "lookup": lookup(material, kinds_of(material.scores), drawn, every=every),
    }
    parts = {
        "title": html.escape(f"wpmerge: {', '.join(material.scores.experts)}"),
        "style": _asset("report.css"),
        "vega": in_script(_vega()),
        "script": in_script(_asset("report.js")),
        "data": compressed(finite(value)),
        "nav": "".join(f'<a href="#{name}">{html.escape(title)}</a>' for name, title in _places(made)),
        "overview": overview(material),
        "sections": "\n".join(map(_section, made)),
        "provenance": provenance_tables(material, commands(material, out)),
    }
    # one pass: what an artifact says is never read as a placeholder
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("report.html"))


def _places(made: Sequence[Section]) -> list[tuple[str, str]]:
    inner = [(section.name, section.title) for section in made]
    return [("overview", "At a glance"), *inner, ("provenance", "How to repeat it")]


def _section(section: Section) -> str:
    figures = "\n".join(map(_block, section.figures))
    return f'<section id="{section.name}"><h2>{html.escape(section.title)}</h2>\n{figures}</section>'


def _block(figure: Figure) -> str:
    """A figure's place; a folded one is drawn when it is opened."""
    title, caption = html.escape(figure.title), html.escape(figure.caption)
    keys = " Arrow keys move from unit to unit." if figure.kind else ""
    chart = (
        f'<div class="chart" id="chart-{figure.name}" data-figure="{figure.name}" tabindex="0" role="group" '
        f'aria-label="{title}.{keys}"><div></div></div><p class="caption">{caption}</p>'
    )
    if figure.folded:
        return f'<details class="figure" id="{figure.name}"><summary>{title}</summary>{chart}</details>'
    return f'<figure class="figure" id="{figure.name}"><figcaption><h3>{title}</h3></figcaption>{chart}</figure>'


def packed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows by column: texts as numbers into a list of them. A third of the size of objects."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    found: dict[str, Any] = {}
    for name in columns:
        values = [row.get(name) for row in rows]
        if any(isinstance(value, str) for value in values):
            texts = {value: place for place, value in enumerate(dict.fromkeys(values))}
            found[name] = {"texts": list(texts), "at": [texts[value] for value in values]}
        else:
            found[name] = {"values": values}
    return {"length": len(rows), "columns": found}


def in_script(text: str) -> str:
    """A script that can stand inside its element: no string in it ends the element, or opens a comment."""
    return re.sub("</(?=script)", r"<\\/", text, flags=re.IGNORECASE).replace("<!--", "<\\!--")


def _asset(name: str) -> str:
    return (files("wpmerge") / name).read_text(encoding="utf-8")


def vega_lite_version() -> str:
    """Of the specs, as the converter names it."""
    return "_".join(alt.SCHEMA_VERSION.split(".")[:2])


@cache
def _vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script."""
    found: str = vl_convert.javascript_bundle(GLOBALS, vl_version=vega_lite_version())
    return found


def write_report(
    material: Material, *, out: Path | None, png: Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write the page, and the figures as files.

    Args:
        material: what is shown.
        out: the page; None for none.
        png: a directory to be made with a PNG of every figure and ``figures.json``, their titles and captions.
        overwrite: replace outputs that are there.

    Returns:
        ``out``, ``bytes``, ``figures``, ``png`` and ``remarks``.

    Raises:
        OutputError: an output cannot be written; nothing is then left under its name.
    """
    if out is not None:
        check_output_file(out, overwrite=overwrite)
        for path in material.paths.values():
            if path.resolve() == out.resolve().parent:
                raise OutputError("the report would lie in an input", where=out, mend="choose another place")
    if png is not None:
        check_output(png, inputs=material.paths.values(), overwrite=overwrite)
    made = sections(material)
    text = None if out is None else page(material, made, out).encode()
    figures = [figure for section in made for figure in section.figures]
    if png is not None:
        with output_directory(png, inputs=material.paths.values(), overwrite=overwrite) as staging:
            titles = {figure.name: {"title": figure.title, "caption": figure.caption} for figure in figures}
            write_file(staging / "figures.json", json.dumps(titles, indent=1, ensure_ascii=False))
            for figure in figures:
                write_file(staging / f"{figure.name}.png", png_of(figure))
    if out is not None and text is not None:
        write_own_file(out, text)
    return {
        "out": None if out is None else str(out),
        "bytes": None if text is None else len(text),
        "figures": [figure.name for figure in figures],
        "png": None if png is None else str(png),
        "remarks": list(material.remarks),
    }


def png_of(figure: Figure) -> bytes:
    """A figure as PNG, on white."""
    found: bytes = vl_convert.vegalite_to_png(
        json.dumps(finite(with_data(figure)), allow_nan=False), vl_version=vega_lite_version(), scale=PNG_SCALE
    )
    return found


def report_tables(material: Material, written: Mapping[str, Any], *, text: bool) -> list[Table]:
    """What the command prints: where things are, and with ``text`` the short form."""
    rows = [("page", written["out"], f"{written['bytes']:,} bytes")] if written["out"] else []
    rows += [("PNG", written["png"], f"{len(written['figures'])} figures")] if written["png"] else []
    tables = text_tables(material) if text else []
    return [*tables, *([Table(title="", header=("report", "where", "size"), rows=rows)] if rows else [])]
