"""Figures as Vega-Lite: what all of them share. Pure functions.

Colours that depend on the page's background are names in braces, which :func:`themed` replaces; a page does the same.
Nothing is told by colour alone: signs have marks, roles have letters, lines have dashes, numbers are written out.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import altair as alt

LIGHT: Mapping[str, str] = {
    "{ink}": "#1b1f24",
    "{soft}": "#57606a",
    "{grid}": "#d8dee4",
    "{paper}": "#ffffff",
    "{low2}": "#b35806",
    "{low1}": "#f1a340",
    "{mid}": "#f4f4f4",
    "{high1}": "#74a9cf",
    "{high2}": "#0b4f8a",
    "{c0}": "#0072b2",
    "{c1}": "#d98c00",
    "{c2}": "#009e73",
    "{c3}": "#cc6fa3",
    "{c4}": "#56b4e9",
    "{c5}": "#d55e00",
    "{c6}": "#7f7f7f",
    "{c7}": "#a09300",
}
"""Orange to blue through grey: told apart under every common colour blindness, and in print."""
DARK: Mapping[str, str] = {
    "{ink}": "#e6edf3",
    "{soft}": "#9da7b3",
    "{grid}": "#30363d",
    "{paper}": "#0d1117",
    "{low2}": "#ffc46b",
    "{low1}": "#a8641a",
    "{mid}": "#22272e",
    "{high1}": "#2f78b7",
    "{high2}": "#9fd3ff",
    "{c0}": "#4aa8e8",
    "{c1}": "#f0b429",
    "{c2}": "#2fc295",
    "{c3}": "#e29ac7",
    "{c4}": "#9bd7ff",
    "{c5}": "#ff8a4c",
    "{c6}": "#a8a8a8",
    "{c7}": "#d6d14a",
}
PALETTE = tuple(f"{{c{number}}}" for number in range(8))
"""Colours of kinds of things: after Okabe and Ito, lighter on a dark page."""
READOUT_TITLES: Mapping[str, str] = {
    "reference": "log-probability of the reference replies",
    "anchor": "anchor in the residual stream",
    "divergence": "divergence from the expert",
}
PLURALS = {
    "head": "heads",
    "neuron": "neurons",
    "kv_group": "key/value groups",
    "norm": "norms",
    "output_bias": "biases",
}

_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure, ready to be drawn.

    Attributes:
        name: of its file, and of its place in a page.
        title: what is shown.
        caption: how it is read; plain text.
        spec: Vega-Lite without data.
        rows: its data, which the spec calls ``rows``.
        picks: a click on it picks the unit named in the row's ``unit``.
        folded: shown only when it is asked for.
        kind: of the units that it maps, layer × unit; empty for what is no such map.
    """

    name: str
    title: str
    caption: str
    spec: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    picks: bool = False
    folded: bool = False
    kind: str = ""


def config() -> dict[str, Any]:
    """Type sizes and colours that every figure shares."""
    return {
        "background": "transparent",
        "font": _FONT,
        "view": {"stroke": "{grid}", "fill": None},
        "axis": {
            "labelColor": "{soft}",
            "titleColor": "{ink}",
            "titleFontWeight": 500,
            "titleFontSize": 12,
            "labelFontSize": 11,
            "domainColor": "{soft}",
            "tickColor": "{soft}",
            "gridColor": "{grid}",
        },
        "axisX": {"labelFlush": False},
        "header": {
            "labelPadding": 6,
            "titlePadding": 4,
            "labelColor": "{ink}",
            "titleColor": "{soft}",
            "labelFontSize": 12,
            "titleFontSize": 12,
        },
        "legend": {"labelColor": "{ink}", "titleColor": "{ink}", "titleFontSize": 12, "titleLimit": 400},
        "title": {"color": "{ink}", "subtitleColor": "{soft}", "anchor": "start", "fontSize": 15, "offset": 14},
        "text": {"color": "{ink}"},
        "rule": {"color": "{soft}"},
        "range": {"category": list(PALETTE)},
    }


def finish(chart: Any) -> dict[str, Any]:
    """A chart as a spec, its data named ``rows`` and left to the page."""
    made: dict[str, Any] = chart.to_dict(validate=False)
    made.pop("config", None)
    made.pop("datasets", None)
    return {**made, "config": config()}


def themed(spec: Mapping[str, Any], theme: Mapping[str, str]) -> dict[str, Any]:
    """A spec with its colours."""
    text = json.dumps(spec)
    for name, colour in theme.items():
        text = text.replace(name, colour)
    found: dict[str, Any] = json.loads(text)
    return found


def with_data(figure: Figure, theme: Mapping[str, str] = LIGHT) -> dict[str, Any]:
    """A figure's whole spec, titled, on its background: for a file of its own."""
    spec = themed(figure.spec, theme)
    spec["config"]["background"] = theme["{paper}"]
    return {**spec, "title": {"text": figure.title}, "datasets": {"rows": list(figure.rows)}, "padding": 12}


def rows() -> Any:
    """A part of a chart on the figure's own data, which the whole is given."""
    return alt.Chart()


def own_data() -> Any:
    """The figure's own data, by name."""
    return alt.NamedData(name="rows")


def vertical(value: float, title: str) -> Any:
    """A dashed line at a number of the horizontal axis, which bears a title."""
    once = rows().transform_aggregate(rows="count()")
    return once.mark_rule(color="{soft}", strokeDash=[3, 3]).encode(x=alt.datum(value, title=title))


def ticks(count: int, size: float) -> list[int]:
    """Which of the numbers from 0 on have room for a label, at so many pixels a number."""
    every = next((step for step in (1, 2, 5, 10, 20, 50, 100) if step * size >= 16), 1000)
    return list(range(0, count, every))


def number_axis(count: int, size: int, title: str) -> Any:
    """An axis of ordinal numbers."""
    return alt.Axis(title=title, values=ticks(count, size), labelAngle=0, ticks=False, domain=False)
