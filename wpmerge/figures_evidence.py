"""Figures of how far to trust scores: anchors, screen against exact patching, proofs, roles. Pure functions."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from wpmerge.cells import Z95, rounded
from wpmerge.console import fixed
from wpmerge.figures import PALETTE, PLURALS, Figure, finish, own_data, rows, ticks
from wpmerge.scores import Scores

RANDOM, LINEAR = "matched random, mean", "linear"
EXACT, RECOVERED = "exact, fraction of the gap", "recovered, fraction of the gap"
DASHES = ((1, 0), (6, 3), (2, 2), (8, 3, 2, 3), (4, 4), (10, 4), (3, 1))
ROLE_MARKS = {"source": "S", "aggregation": "A", "execution": "E"}
ROLE_COLOURS = {"source": PALETTE[0], "aggregation": PALETTE[5], "execution": PALETTE[2]}
CURVE_MEASURES = {"cosine": "cosine of half-directions", "carried": "carried share of the gap"}


def anchor_curves(scores: Scores) -> Figure | None:
    """What each anchor shows at every layer, with the layer it is read after."""
    found: list[dict[str, Any]] = []
    stars: list[dict[str, Any]] = []
    for label, record in scores.readouts.items():
        for point in record.curve:
            for measure, name in CURVE_MEASURES.items():
                value = rounded(getattr(point, measure))
                found.append({"panel": label, "layer": point.layer, "measure": name, "value": value, "row": "share"})
            found.append({"panel": label, "layer": point.layer, "measure": "t", "value": rounded(point.t), "row": "t"})
        if record.curve:
            stars.append({"panel": label, "star": record.l_star, "text": f"l* = {record.l_star}"})
    if not found:
        return None
    found += [{**star, "row": row} for star in stars for row in ("share", "t")]
    labels = [star["panel"] for star in stars]
    wide = max(170, min(300, 780 // len(labels)))
    parts = [
        _anchor_row("share", "fraction", list(CURVE_MEASURES.values()), labels, wide, scores.layers, header=True),
        _anchor_row("t", "t of the gap", ["t"], labels, wide, scores.layers, header=False),
    ]
    chart = alt.vconcat(*parts, spacing=8).resolve_scale(color="independent", strokeDash="independent")
    return Figure(
        name="anchors",
        title="Anchors: where the control state of a capability has formed",
        caption="At every layer: how alike the directions of two halves of the prompts are (at least 0.9 is asked), "
        "the share of the behavioural gap that the direction carries, and the t-statistic of the gap along it (from "
        "5 on). The dashed line is l*, the layer the anchor is read after: the smallest that passes and carries half "
        "of what the best one does.",
        spec=finish(chart),
        rows=found,
    )


def _anchor_row(
    row: str, title: str, measures: Sequence[str], labels: Sequence[str], wide: int, layers: int, *, header: bool
) -> Any:
    base, named = rows().transform_filter(f"datum.row === '{row}'"), "" if header else "layer"
    legend = alt.Legend(title=None, orient="top", symbolType="stroke", symbolSize=400) if len(measures) > 1 else None
    scale = alt.Scale(domain=list(measures), range=list(PALETTE[: len(measures)]))
    dashes = alt.Scale(domain=list(measures), range=[list(each) for each in DASHES[: len(measures)]])
    lines = (
        base.transform_filter("isValid(datum.value)")
        .mark_line(point=alt.OverlayMarkDef(size=36), strokeWidth=2)
        .encode(
            x=alt.X(
                "layer:Q",
                scale=alt.Scale(domain=[-0.25, max(1, layers) - 0.75], nice=False),
                axis=_layer_axis(layers, wide),
                title=named,
            ),
            y=alt.Y("value:Q", title=title),
            color=alt.Color("measure:N", scale=scale, legend=legend),
            strokeDash=alt.StrokeDash("measure:N", scale=dashes, legend=legend),
            tooltip=["layer:Q", "measure:N", alt.Tooltip("value:Q", format=".3~g")],
        )
    )
    star = base.transform_filter("isValid(datum.star)")
    rule = star.mark_rule(color="{ink}", strokeDash=[4, 3], strokeWidth=1.5).encode(x=alt.X("star:Q", title=named))
    layered = [lines, rule]
    if header:
        left = star.mark_text(align="left", dx=5, baseline="top", fontWeight=600, color="{ink}")
        layered.append(left.encode(x=alt.X("star:Q", title=named), y=alt.value(75), text="text:N"))
    titled = alt.Header(title=None, labels=header)
    return (
        alt.layer(*layered)
        .properties(width=wide, height=150 if header else 90)
        .facet(column=alt.Column("panel:N", sort=list(labels), header=titled), data=own_data(), spacing=22)
    )


def _layer_axis(layers: int, wide: int) -> Any:
    return alt.Axis(values=ticks(layers, wide / max(1, layers - 1)), format="d", grid=False)


def screen_scatter(
    scores: Scores, readout: str, kinds: Sequence[str], *, others: bool = False, folded: bool = False
) -> Figure | None:
    """Screened against exact recovery of the verified units, with Spearman's rank correlation.

    Args:
        scores: what is shown.
        readout: "reference", "anchor" or "divergence".
        kinds: of units.
        others: the kinds are those that another figure of this readout leaves out.
        folded: see :class:`~wpmerge.figures.Figure`.
    """
    found: list[dict[str, Any]] = []
    order: list[str] = []
    for kind in kinds:
        for label, record in scores.readouts.items():
            check = record.verification.get("sufficiency", {}).get(kind)
            if record.readout != readout or record.gap is None or check is None or len(check.units) < 3:
                continue
            random = "" if check.spearman_random is None else f", of the random draw {fixed(check.spearman_random)}"
            panel = f"{label}: {PLURALS.get(kind, kind)}\nSpearman {fixed(check.spearman)}{random}"
            order.append(panel)
            for each in check.units:
                found.append(
                    {
                        "panel": panel,
                        "unit": each.unit,
                        "drawn": "among the strongest" if each.drawn == "top" else "at random",
                        "screen": rounded(each.screen),
                        "exact": rounded(each.exact),
                        "low": rounded(each.exact - Z95 * each.stderr),
                        "high": rounded(each.exact + Z95 * each.stderr),
                    }
                )
    if not found:
        return None
    columns = len({panel.partition(":")[0] for panel in order})
    drawn = ["among the strongest", "at random"]
    legend = alt.Legend(title="drawn", orient="top")
    points = rows().encode(x=alt.X("screen:Q", title="screen (linear), fraction of the gap"))
    tips = [
        "unit:N",
        "drawn:N",
        *(alt.Tooltip(f"{name}:Q", format=".3~g") for name in ("screen", "exact", "low", "high")),
    ]
    marks = points.mark_point(size=46, strokeWidth=1.4).encode(
        y=alt.Y("exact:Q", title=EXACT),
        shape=alt.Shape("drawn:N", scale=alt.Scale(domain=drawn, range=["circle", "triangle-up"]), legend=legend),
        color=alt.Color("drawn:N", scale=alt.Scale(domain=drawn, range=[PALETTE[0], PALETTE[5]]), legend=legend),
        tooltip=tips,
    )
    bars = (
        points.transform_filter("isValid(datum.low)")
        .mark_rule(strokeWidth=1, opacity=0.7)
        .encode(y=alt.Y("low:Q", title=EXACT), y2="high:Q")
    )
    same = points.mark_line(color="{soft}", strokeDash=[4, 3], strokeWidth=1).encode(y=alt.Y("screen:Q", title=EXACT))
    header = alt.Header(
        title=None, labelExpr="split(datum.label, '\\n')", labelLineHeight=15, labelAlign="left", labelAnchor="start"
    )
    chart = (
        alt.layer(same, bars, marks)
        .properties(width=max(170, min(250, 640 // columns)), height=170)
        .facet(data=own_data(), facet=alt.Facet("panel:N", sort=order, header=header), columns=columns)
        .resolve_scale(x="independent", y="independent")
    )
    return Figure(
        name=f"screen-{readout}" + ("-others" if others else ""),
        title=f"Screen against exact patching, by {readout}" + (": other kinds" if others else ""),
        caption="Every point is a unit that was replaced for real: the linear estimate that ranks all units, and what "
        "replacing it gave, on the same prompts. Bars are 95% intervals over prompts; on the dashed line both agree. "
        "Spearman's rank correlation is over all points of a panel, and over the random draw alone.",
        spec=finish(chart),
        rows=found,
        picks=True,
        folded=folded,
    )


def proof_curves(proof: Mapping[str, Any], readout: str, *, folded: bool = False) -> Figure | None:
    """Recovered fraction over the share of moved parameters, for every ranking, with the band of random ones."""
    found: list[dict[str, Any]] = []
    names, panels = [RANDOM], []
    for capability, each in proof["capabilities"].items():
        for curve in ("transplant", "revert") if readout in each["readouts"] else ():
            record = each["readouts"][readout][curve]
            panel = {"capability": capability, "curve": f"{curve} of the strongest"}
            panels.append(capability)
            for ranking, drawn in record["rankings"].items():
                names += [ranking] if ranking not in names else []
                cpr = {"ranking": ranking, "cpr": rounded(drawn["cpr"])}
                found += [
                    {**panel, **cpr, "share": share, "value": rounded(value)}
                    for share, value in zip(each["shares"], drawn["recovered"], strict=True)
                ]
            if (chance := record["random"]) is not None:
                lows, highs = chance.get("recovered_range") or ([None] * len(each["shares"]),) * 2
                cpr = {"ranking": RANDOM, "cpr": rounded(chance["cpr"])}
                found += [
                    {**panel, **cpr, "share": share, "value": rounded(v), "low": rounded(low), "high": rounded(high)}
                    for share, v, low, high in zip(each["shares"], chance["recovered"], lows, highs, strict=True)
                ]
    if not found:
        return None
    names = [LINEAR, RANDOM, *(name for name in names if name not in (LINEAR, RANDOM))]
    capabilities = list(dict.fromkeys(panels))
    colours = ["{ink}" if name == RANDOM else PALETTE[i % len(PALETTE)] for i, name in enumerate(names)]
    legend = alt.Legend(
        title="ranking by", orient="top", columns=4, symbolType="stroke", symbolSize=400, symbolStrokeWidth=2
    )
    x = alt.X(
        "share:Q",
        title="share of moved parameters",
        scale=alt.Scale(type="log"),
        axis=alt.Axis(format=".2~g", tickCount=4),
    )
    band = (
        rows()
        .transform_filter("isValid(datum.low)")
        .mark_area(color="{soft}", opacity=0.25)
        .encode(x=x, y=alt.Y("low:Q", title=RECOVERED), y2="high:Q")
    )
    lines = (
        rows()
        .mark_line(point=alt.OverlayMarkDef(size=20))
        .encode(
            x=x,
            y=alt.Y("value:Q", title=RECOVERED),
            color=alt.Color("ranking:N", scale=alt.Scale(domain=names, range=colours), legend=legend),
            strokeDash=alt.StrokeDash(
                "ranking:N",
                scale=alt.Scale(domain=names, range=[list(DASHES[i % len(DASHES)]) for i in range(len(names))]),
                legend=legend,
            ),
            strokeWidth=alt.condition(f"datum.ranking === '{LINEAR}'", alt.value(3), alt.value(1.4)),
            tooltip=[
                "ranking:N",
                alt.Tooltip("share:Q", format=".3~g"),
                alt.Tooltip("value:Q", title="recovered", format=".3~f"),
                alt.Tooltip("cpr:Q", title="area (CPR)", format=".3~f"),
            ],
        )
    )
    chart = (
        alt.layer(band, lines)
        .properties(width=max(170, min(260, 790 // len(capabilities))), height=170)
        .facet(
            data=own_data(),
            column=alt.Column("capability:N", sort=capabilities, header=alt.Header(title=None)),
            row=alt.Row(
                "curve:N",
                sort=["transplant of the strongest", "revert of the strongest"],
                header=alt.Header(title=None),
            ),
        )
    )
    matched = "random rankings, matched in layer, kind and size."
    ranged = any(row.get("low") is not None for row in found)
    chance = f"The grey band spans {matched}" if ranged else f"The dark line is the mean of {matched}"
    return Figure(
        name=f"proof-{readout}",
        title=f"Proof: what the strongest units do together, read by {readout}",
        caption="Units in the order of a ranking, put from the expert into the base (transplant: higher is better) or "
        f"back into the expert from the base (revert: lower is better), on held-out prompts. {chance}",
        spec=finish(chart),
        rows=found,
        folded=folded,
    )


def role_members(proof: Mapping[str, Any] | None) -> dict[str, dict[str, str]]:
    """Capability → unit → role; of proofs that list the strongest only, those."""
    found: dict[str, dict[str, str]] = {}
    for name, each in (proof or {"capabilities": {}})["capabilities"].items():
        for count in (each.get("roles") or {}).get("units", ()):
            for unit in count.get("members") or count["strongest"]:
                found.setdefault(name, {})[unit] = count["role"]
    return found


def role_map(proof: Mapping[str, Any], scores: Scores, kind: str) -> Figure | None:
    """Which units of a kind are source, aggregation or execution units, layer × unit."""
    members, found = role_members(proof), []
    for capability, units in members.items():
        for unit, role in units.items():
            if unit.startswith(f"{kind}."):
                _, layer, index = unit.split(".")
                place = {"unit": unit, "layer": int(layer), "index": int(index)}
                found.append({"capability": capability, **place, "role": role, "mark": ROLE_MARKS[role]})
    if not found:
        return None
    capabilities, count = [name for name in members if members[name]], scores.counts[kind]
    stars = [{"capability": name, "star": proof["capabilities"][name]["roles"]["l_star"]} for name in capabilities]
    wide, high = max(150, min(260, 800 // len(capabilities))), max(110, min(200, 26 * count))
    x = alt.X(
        "layer:Q",
        title="layer",
        scale=alt.Scale(domain=[-0.5, scores.layers - 0.5], nice=False),
        axis=alt.Axis(values=ticks(scores.layers, wide / scores.layers), format="d", grid=False),
    )
    y = alt.Y(
        "index:Q",
        title=kind.replace("_", " "),
        scale=alt.Scale(domain=[-0.5, count - 0.5], nice=False, reverse=True),
        axis=alt.Axis(values=ticks(count, high / count), format="d"),
    )
    colour = alt.Scale(domain=list(ROLE_COLOURS), range=list(ROLE_COLOURS.values()))
    legend = alt.Legend(title="role (S, A, E)", orient="top", symbolType="square")
    marks = (
        rows()
        .transform_filter("isValid(datum.role)")
        .mark_text(fontWeight=700, fontSize=12)
        .encode(
            x=x,
            y=y,
            text="mark:N",
            color=alt.Color("role:N", scale=colour, legend=legend),
            tooltip=["unit:N", "capability:N", "role:N"],
        )
    )
    star = rows().transform_filter("isValid(datum.star)").mark_rule(strokeDash=[4, 3])
    chart = (
        alt.layer(star.encode(x=alt.X("star:Q", title="layer")), marks)
        .properties(width=wide, height=high)
        .facet(data=own_data(), column=alt.Column("capability:N", sort=capabilities, header=alt.Header(title=None)))
    )
    return Figure(
        name=f"roles-{kind}",
        title=f"{PLURALS.get(kind, kind).capitalize()}: source, aggregation, execution",
        caption="S, source: its weights carry the skill. A, aggregation: the skill passes it, its weights do not "
        "carry it. E, execution: after l* (dashed), high on the output. The rule is stated in docs/method.md; other "
        "thresholds give other counts.",
        spec=finish(chart),
        rows=[*found, *stars],
        picks=True,
    )
