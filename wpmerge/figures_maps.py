"""Maps layer × unit: recovery, cross effects, coefficients; and the units outside the layers. Pure functions."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from wpmerge.arch import MODEL_KINDS, Kind, Unit
from wpmerge.cells import Panel, cell_width, cells, panels
from wpmerge.figures import PALETTE, PLURALS, READOUT_TITLES, Figure, finish, number_axis, own_data, rows, vertical
from wpmerge.scores import Scores

SCORE = "recovery, fraction of the gap"
HATCH = "M-1,1L1,-1"
"""A stroke through a cell that has no number."""


def reach(values: Sequence[float | None]) -> float:
    """A symmetric end for a scale of colours: the 99.5th percentile of sizes, lest one unit pale the rest."""
    sizes = sorted(abs(value) for value in values if value is not None)
    if not sizes or sizes[-1] == 0:
        return 1.0
    return float(f"{sizes[min(len(sizes) - 1, int(0.995 * len(sizes)))] or sizes[-1]:.3g}")


def diverging(end: float) -> Any:
    """Colours about 0."""
    domain = [-end, -end / 2, 0, end / 2, end]
    colours = ["{low2}", "{low1}", "{mid}", "{high1}", "{high2}"]
    return alt.Scale(domain=domain, range=colours, interpolate="lab", clamp=True)


def steps(layers: int, bins: int, columns: int) -> tuple[int, int]:
    """Width and height of a cell in pixels, so that a row of maps fits a page."""
    wide = max(5, min(34, 820 // max(1, columns * layers)))
    return wide, max(5, min(26, wide + 2, 300 // max(1, bins)))


def bin_axis(count: int, width: int, size: int, kind: str) -> Any:
    """The axis of units; where several share a cell its labels are the first unit of the cell."""
    title = kind.replace("_", " ")
    axis = number_axis(count, size, title if width == 1 else f"{title} ({width} a cell)")
    if width > 1:
        axis.labelExpr = f"format(datum.value * {width}, 'd')"
    return axis


TIPS = (
    alt.Tooltip("unit:N", title="unit"),
    alt.Tooltip("expert:N", title="from expert"),
    alt.Tooltip("read:N", title="read by"),
    alt.Tooltip("value:Q", title="score (linear)", format=".4~g"),
    alt.Tooltip("sure:N", title="how known"),
    alt.Tooltip("exact:Q", title="exact", format=".4~g"),
    alt.Tooltip("low:Q", title="interval from", format=".3~g"),
    alt.Tooltip("high:Q", title="interval to", format=".3~g"),
)


def map_layers(*, x: Any, y: Any, colour: Any, tips: Sequence[Any], cell: tuple[int, int], marks: bool) -> Any:
    """Cells, hatching where there is no number, marks on the strongest, and a frame about the place that was picked."""
    base = rows().encode(x=x, y=y)
    place = alt.param(name="place", value="")
    drawn = [
        base.mark_rect().encode(color=colour, tooltip=list(tips)).transform_filter("isValid(datum.value)"),
        base.mark_point(shape=HATCH, size=(min(cell) * 0.9) ** 2, stroke="{soft}", strokeWidth=0.8, opacity=0.6)
        .encode(tooltip=list(tips[:5]))
        .transform_filter("!isValid(datum.value)"),
    ]
    if marks:
        size = max(6, min(13, *cell))
        look = {"fontSize": size, "stroke": "{paper}", "strokeWidth": 2.5, "strokeOpacity": 0.85}
        marked = base.encode(text=alt.Text("mark:N"), tooltip=list(tips)).transform_filter("isValid(datum.mark)")
        drawn += [marked.mark_text(**look), marked.mark_text(fontSize=size, color="{ink}")]
    frame = base.mark_rect(fill=None, stroke="{ink}", strokeWidth=2.5).encode(tooltip=list(tips))
    drawn.append(frame.transform_filter("datum.layer + '/' + datum.bin === place").add_params(place))
    return alt.layer(*drawn)


def score_map(scores: Scores, kind: Kind, readout: str, *, retain: bool = False, folded: bool = False) -> Figure | None:
    """Recoveries and cross effects of a kind: a row of maps per expert, a column per capability read.

    Args:
        scores: what is shown.
        kind: of unit, in layers.
        readout: "reference", "anchor" or "divergence".
        retain: of retain sets instead of capabilities.
        folded: see :class:`Figure`.
    """
    maps = panels(scores, readout, kind, retain=retain)
    if not maps:
        return None
    found = cells(scores, kind, maps)
    layers, count = scores.array(maps[0].label, maps[0].expert, kind).shape
    width, columns = cell_width(scores, kind), len({each.label for each in maps})
    bins = -(-count // width)
    wide, high = cell = steps(layers, bins, columns)
    end = reach([each["value"] for each in found])
    unit = "effect, nats per token" if retain else SCORE
    colour = alt.Color(
        "value:Q", scale=diverging(end), legend=alt.Legend(title=unit, orient="top", gradientLength=260, format=".2~g")
    )
    chart = map_layers(
        x=alt.X("layer:O", axis=number_axis(layers, wide, "layer")),
        y=alt.Y("bin:O", axis=bin_axis(bins, width, high, kind)),
        colour=colour,
        tips=TIPS,
        cell=cell,
        marks=True,
    ).properties(width=wide * layers, height=high * bins)
    labels, experts = list(dict.fromkeys(each.label for each in maps)), list(dict.fromkeys(m.expert for m in maps))
    chart = chart.facet(
        data=own_data(),
        row=alt.Row("expert:N", sort=experts, header=alt.Header(title="units from expert")),
        column=alt.Column("read:N", sort=labels, header=alt.Header(title="read by")),
        spacing=14,
    )
    name = PLURALS.get(kind, kind)
    title = f"{name.capitalize()}: " + ("effects on retain sets" if retain else "recovery and cross effects")
    return Figure(
        name=f"scores-{kind}-" + ("retain" if retain else readout),
        title=title + f", by {READOUT_TITLES[readout]}",
        caption=_map_caption(maps, width, end, retain, name),
        spec=finish(chart),
        rows=found,
        picks=True,
        folded=folded,
        kind=kind,
    )


def _map_caption(maps: Sequence[Panel], width: int, end: float, retain: bool, name: str) -> str:
    text = (
        "Each cell is one unit put from the expert into the base"
        if width == 1
        else (f"Each cell stands for {width} neighbouring {name} and shows the one whose score is largest in size")
    )
    text += ". Blue helps, orange hurts; ▲ and ▼ mark the five largest of each map"
    text += f". Colours end at ±{end:g}, the 99.5th percentile; hover for the number"
    if not retain and any(not each.own for each in maps):
        text += ". Where the expert is not the capability's own, the map is a cross effect: help or interference"
    return text + ". Hatched: the readout cannot see the unit, which is not a score of 0."


def model_units(scores: Scores, kinds: Sequence[Kind], readout: str) -> Figure | None:
    """Scores of units outside the layers, a point each."""
    found: list[dict[str, Any]] = []
    for kind in (kind for kind in kinds if kind in MODEL_KINDS):
        for each in cells(scores, kind, panels(scores, readout, kind)):
            found.append({**each, "own": each["expert"] == scores.readouts[each["read"]].capability})
    if not found:
        return None
    experts = list(dict.fromkeys(each["expert"] for each in found))
    legend = alt.Legend(title="units from expert", orient="top")
    points = (
        rows()
        .transform_filter("isValid(datum.value)")
        .mark_point(size=90, filled=True, opacity=0.9)
        .encode(
            x=alt.X("value:Q", title=SCORE),
            y=alt.Y("unit:N", title=None, sort=list(dict.fromkeys(each["unit"] for each in found))),
            color=alt.Color("expert:N", scale=alt.Scale(domain=experts, range=list(PALETTE)), legend=legend),
            shape=alt.Shape("expert:N", scale=alt.Scale(domain=experts), legend=legend),
            tooltip=list(TIPS),
        )
    )
    zero = vertical(0, SCORE)
    chart = alt.layer(zero, points, data=own_data()).properties(width=230)
    labels = list(dict.fromkeys(each["read"] for each in found))
    chart = chart.facet(column=alt.Column("read:N", sort=labels, header=alt.Header(title="read by")))
    return Figure(
        name="scores-outside-layers",
        title="Units outside the layers: recovery and cross effects",
        caption="Embedding, final norm and head are one unit each. An estimate far from 0 belongs to a large unit: "
        "most of a model's parameters may lie in its embedding.",
        spec=finish(chart),
        rows=found,
        picks=True,
    )


def coefficient_map(
    kind: Kind,
    arrays: Mapping[str, Any],
    *,
    width: int,
    highest: float,
    folded: bool = False,
) -> Figure:
    """The coefficients of a kind, a map per expert.

    Args:
        kind: of unit, in layers.
        arrays: expert → coefficients [layers, units].
        width: units that share a cell, as in the maps of their scores.
        highest: end of the scale of colours.
        folded: see :class:`Figure`.
    """
    layers, count = next(iter(arrays.values())).shape
    bins = -(-count // width)
    found = []
    for expert, values in arrays.items():
        for layer in range(layers):
            for place in range(bins):
                part = values[layer, place * width : (place + 1) * width]
                found.append(
                    {
                        "expert": expert,
                        "layer": layer,
                        "bin": place,
                        "unit": str(Unit(kind=kind, layer=layer, index=place * width)),
                        "value": float(f"{float(part.mean()):.4g}"),
                        "low": float(f"{float(part.min()):.4g}"),
                        "high": float(f"{float(part.max()):.4g}"),
                    }
                )
    wide, high = cell = steps(layers, bins, len(arrays))
    legend = alt.Legend(title="coefficient, 0 the base, 1 the expert", orient="top", gradientLength=260)
    tips = [
        alt.Tooltip("unit:N", title="unit" if width == 1 else "first unit"),
        alt.Tooltip("expert:N", title="of expert"),
        alt.Tooltip("value:Q", title="coefficient" if width == 1 else "mean coefficient", format=".4~g"),
        *([alt.Tooltip("low:Q", title="least"), alt.Tooltip("high:Q", title="greatest")] if width > 1 else []),
    ]
    chart = map_layers(
        x=alt.X("layer:O", axis=number_axis(layers, wide, "layer")),
        y=alt.Y("bin:O", axis=bin_axis(bins, width, high, kind)),
        colour=alt.Color("value:Q", scale=alt.Scale(scheme="viridis", domain=[0, highest], clamp=True), legend=legend),
        tips=[*tips, *tips[:1]],
        cell=cell,
        marks=False,
    ).properties(width=wide * layers, height=high * bins)
    chart = chart.facet(
        data=own_data(),
        column=alt.Column("expert:N", sort=list(arrays), header=alt.Header(title="coefficients of expert")),
        spacing=14,
    )
    name = PLURALS.get(kind, kind)
    shared = (
        "" if width == 1 else f" Each cell is the mean over {width} neighbouring {name}; hover for least and greatest."
    )
    return Figure(
        name=f"coefficients-{kind}",
        title=f"{name.capitalize()}: coefficients of the merge",
        caption="What each unit's difference between expert and base is multiplied by; dark is the base's, yellow the "
        f"most of the expert's.{shared}",
        spec=finish(chart),
        rows=found,
        picks=True,
        folded=folded,
        kind=kind,
    )
