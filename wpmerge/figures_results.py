"""Figures of what merges keep: retention per skill, instructions followed, a benchmark. Pure functions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from wpmerge.cells import Z95, rounded
from wpmerge.evaluation import Evaluation
from wpmerge.figures import PALETTE, Figure, finish, own_data, rows, vertical
from wpmerge.statistics import Interval, Retention

MEAN, LEAST = "mean over skills", "the worst skill"
RETENTION = "retention, fraction of the gap"
COLUMNS = 4
OURS = "fuse:"
"""What the names of this tool's own strategies begin with in a benchmark."""
MODEL_LOOKS = {"base": ("cross", "{soft}"), "expert": ("square", PALETTE[1]), "merge": ("circle", PALETTE[0])}
STRATEGY_LOOKS = {"wpmerge": ("circle", PALETTE[0]), "other methods": ("square", PALETTE[1])}
MEASURES = {"generated": "share of correct replies", "logprob": "log-probability of reference replies"}


def retention_figure(evaluation: Evaluation, kept: Mapping[str, Retention]) -> Figure | None:
    """What each model keeps of each skill, with 95% intervals; the base is at 0 and a skill's expert at 1.

    Args:
        evaluation: of base, experts and merges.
        kept: its retention.
    """
    if not kept:
        return None
    found = [_row(str(evaluation.base), skill, None, "base") for skill in (*evaluation.skills, MEAN, LEAST)]
    experts = {each.expert for each in evaluation.skills.values()}
    for model, each in kept.items():
        role = "expert" if model in experts else "merge"
        for skill, interval in {**each.skills, MEAN: each.mean, LEAST: each.minimum}.items():
            found.append(_row(model, skill, interval, role))
    models = [str(evaluation.base), *kept]
    return Figure(
        name="retention",
        title="Retention of each skill",
        caption="0 is the base and 1 the skill's own expert, on the evaluation's documents. Bars are 95% bootstrap "
        "intervals over documents, base, expert and merge drawn together.",
        spec=finish(_intervals(models, [*evaluation.skills, MEAN, LEAST], MODEL_LOOKS)),
        rows=found,
    )


def _row(model: str, skill: str, interval: Interval | None, role: str) -> dict[str, Any]:
    value = interval or Interval(value=0.0, low=0.0, high=0.0)
    numbers = {"value": rounded(value.value), "low": rounded(value.low), "high": rounded(value.high)}
    return {"model": model, "panel": skill, "role": role, **numbers}


def _intervals(models: Sequence[str], panels: Sequence[str], looks: Mapping[str, tuple[str, str]]) -> Any:
    """A dot and a bar per model; a panel per skill. ``looks``: what a model is → shape and colour."""
    y = alt.Y("model:N", sort=list(models), title=None, axis=alt.Axis(labelLimit=220, grid=True))
    shapes = alt.Scale(domain=list(looks), range=[shape for shape, _ in looks.values()])
    colours = alt.Scale(domain=list(looks), range=[colour for _, colour in looks.values()])
    legend = alt.Legend(title=None, orient="top")
    bars = (
        rows()
        .transform_filter("isValid(datum.low)")
        .mark_rule(strokeWidth=2)
        .encode(
            x=alt.X("low:Q", title=RETENTION, scale=alt.Scale(padding=7)),
            x2="high:Q",
            y=y,
            color=alt.Color("role:N", scale=colours, legend=legend),
        )
    )
    dots = (
        rows()
        .transform_filter("isValid(datum.value)")
        .mark_point(size=50, filled=True, opacity=1)
        .encode(
            x=alt.X("value:Q", title=RETENTION),
            y=y,
            color=alt.Color("role:N", scale=colours, legend=legend),
            shape=alt.Shape("role:N", scale=shapes, legend=legend),
            tooltip=[
                "model:N",
                alt.Tooltip("panel:N", title="of"),
                *(alt.Tooltip(f"{name}:Q", format=".3f") for name in ("value", "low", "high")),
            ],
        )
    )
    header = alt.Header(title=None, labelExpr="split(datum.label, '\\n')", labelLineHeight=15)
    few = min(COLUMNS, len(panels))
    return (
        alt.layer(vertical(0, RETENTION), vertical(1, RETENTION), bars, dots, data=own_data())
        .properties(width=max(150, 800 // few), height=24 * len(models))
        .facet(facet=alt.Facet("panel:N", sort=list(panels), header=header), columns=few)
    )


def instruction_figure(evaluation: Evaluation) -> Figure | None:
    """Scores per instruction type, IFEval's: a table whose cells are coloured and written out."""
    found: list[dict[str, Any]] = []
    for model, result in evaluation.models.items():
        for metric, score in result.scores.items():
            task, level, *kind = metric.split("/", 2)
            if not kind or "inst_level_strict" not in level:
                continue
            written = "–" if math.isnan(score.value) else f"{score.value:.2f}"
            reach = Z95 * score.stderr  # not a number where it is not known: no bound is better than a wrong one
            bounds = [score.value - reach, score.value + reach]
            low, high = (rounded(each if math.isnan(each) else min(1.0, max(0.0, each))) for each in bounds)
            found.append(
                {
                    "model": model,
                    "type": kind[0],
                    "task": task,
                    "value": rounded(score.value),
                    "stderr": rounded(score.stderr),
                    "n": score.n,
                    "written": written,
                    "low": low,
                    "high": high,
                }
            )
    if not found:
        return None
    models, kinds = list(evaluation.models), sorted({each["type"] for each in found})
    tasks = list(dict.fromkeys(each["task"] for each in found))
    base = rows().encode(
        x=alt.X("model:N", sort=models, title=None, axis=alt.Axis(orient="top", labelAngle=-25, labelLimit=160)),
        y=alt.Y("type:N", sort=kinds, title=None, axis=alt.Axis(labelLimit=330)),
    )
    legend = alt.Legend(title="share followed", gradientLength=160)
    scale = alt.Scale(scheme="viridis", domain=[0, 1])
    tips = [
        "model:N",
        "type:N",
        alt.Tooltip("value:Q", title="share followed", format=".3f"),
        *(alt.Tooltip(f"{name}:Q", format=".3f") for name in ("stderr", "low", "high")),
        alt.Tooltip("n:Q", title="documents"),
    ]
    cells = base.mark_rect(stroke="{paper}").encode(
        color=alt.Color("value:Q", scale=scale, legend=legend), tooltip=tips
    )
    ink = alt.condition("datum.value < 0.6", alt.value("#ffffff"), alt.value("#111111"))
    texts = base.mark_text(fontSize=12).encode(text="written:N", color=ink, tooltip=tips)
    chart = alt.layer(cells, texts).properties(width=74 * len(models), height=26 * len(kinds))
    if len(tasks) > 1:
        chart = chart.facet(data=own_data(), column=alt.Column("task:N", sort=tasks, title=None))
    else:
        chart = chart.properties(data=own_data())
    return Figure(
        name="instructions",
        title="Instructions followed, by type",
        caption="Share of replies that follow each instruction by IFEval's own checkers, strictly; hover for standard "
        "error, 95% interval (normal approximation) and documents.",
        spec=finish(chart),
        rows=found,
    )


def bench_figure(bench: Mapping[str, Any], measure: str, *, folded: bool = False) -> Figure | None:
    """Mean and worst retention of every strategy of a benchmark, a panel each per set of experts."""
    found: list[dict[str, Any]] = []
    panels: list[str] = []
    strategies: dict[str, tuple[str, float]] = {}
    for cell in (each for each in bench["cells"] if each["measure"] == measure):
        names = " + ".join(cell["subset"])
        for row in cell["rows"]:
            role = "wpmerge" if row["strategy"].startswith(OURS) else "other methods"
            strategies.setdefault(row["strategy"], (names, row["mean"]["value"] or 0.0))
            for what, key in ((MEAN, "mean"), (LEAST, "minimum")):
                panel = f"{names}\n{what}"
                panels += [panel] if panel not in panels else []
                numbers = {name: rounded(row[key][name]) for name in ("value", "low", "high")}
                found.append({"model": row["strategy"], "panel": panel, "role": role, **numbers})
    if not found:
        return None
    first = next(iter(strategies.values()))[0]  # strategies that cannot merge all of its experts come last
    order = sorted(strategies, key=lambda name: (strategies[name][0] != first, -strategies[name][1]))
    return Figure(
        name=f"bench-{measure}",
        title=f"Strategies tuned alike: retention by {MEASURES.get(measure, measure)}",
        caption="0 is the base and 1 each skill's own expert, on fresh prompts. Bars are 95% intervals, by prompt "
        "and seed. Circles are this tool's rules and their controls, squares other ways of merging.",
        spec=finish(_intervals(order, panels, STRATEGY_LOOKS)),
        rows=found,
        folded=folded,
    )
