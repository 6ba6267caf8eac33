"""The tables of a report: at a glance, provenance, and the short form for a terminal. Pure functions."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wpmerge.console import Table, fixed, number
from wpmerge.plan import InputModel
from wpmerge.proof import proof_tables
from wpmerge.report_inputs import Material
from wpmerge.summaries import (
    GAP_UNITS,
    evaluation_summary,
    evaluation_tables,
    plan_summary,
    plan_tables,
    scores_summary,
    scores_tables,
)

_SHOWN = ("seconds", "peak_memory_bytes", "machine", "device")
LONGEST = 400
"""Characters of a prompt that are shown."""
PROMPTS = 5
"""Prompts of a capability that are shown."""


def overview(material: Material) -> str:
    """The first look: a row per readout, what the merge keeps, and what to be careful about, as HTML."""
    scores = material.scores
    rows = []
    for label, entry in scores_summary(scores)["readouts"].items():
        record = scores.readouts[label]
        gap = "retain set" if record.gap is None else f"{number(record.gap)} {GAP_UNITS[record.readout]}"
        ranks = [
            f"{kind} {fixed(each['spearman'])}"
            for kind, each in entry["kinds"].items()
            if each["spearman"] is not None and kind in ("head", "neuron", "kv_group")
        ]
        best = [each["strongest"][0] for each in entry["kinds"].values() if each["strongest"]]
        best = sorted(best, key=lambda each: -abs(each["recovery"]))[:3]
        strongest = ", ".join(f"{each['unit']} ({number(each['recovery'], 2)})" for each in best)
        anchor = f" ({record.anchor})" if record.anchor else ""
        rows.append(
            (
                label,
                record.readout + anchor,
                gap + (", accepted although unreliable" if record.accepted else ""),
                number(record.gap_t),
                str(record.l_star),
                ", ".join(ranks) or "–",
                strongest,
            )
        )
    header = (
        "read by",
        "readout",
        "gap from base to expert",
        "t",
        "l*",
        "Spearman, screen with exact",
        "strongest units (recovery)",
    )
    made = [table(header, rows)]
    made.append(_kept(material))
    flags = [*material.remarks, *(material.evaluation.flags() if material.evaluation else ())]
    if flags:
        items = "".join(f"<li>{html.escape(flag)}</li>" for flag in flags)
        made.append(f'<div class="remarks" role="note"><strong>To be careful about</strong><ul>{items}</ul></div>')
    return "\n".join(made)


def _kept(material: Material) -> str:
    if not (kept := material.retention):
        return ""
    rows = [
        (
            name,
            *(_spanned(each.value, each.low, each.high) for each in (*one.skills.values(), one.mean, one.minimum)),
        )
        for name, one in kept.items()
    ]
    skills = next(iter(kept.values())).skills
    return "<h3>Retention, fraction of the gap from base to expert, with 95% intervals</h3>" + table(
        ("model", *skills, "mean", "the worst"), rows, kind="numbers"
    )


def _spanned(value: float, low: float, high: float) -> str:
    return f"{number(value, 2)} [{number(low, 2)}, {number(high, 2)}]"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "texts") -> str:
    """An HTML table of "texts", or of "numbers" that are not broken; everything in it is escaped."""
    head = "".join(f'<th scope="col">{html.escape(each)}</th>' for each in header)
    body = "".join(
        '<tr><th scope="row">'
        + html.escape(row[0])
        + "</th>"
        + "".join(f"<td>{html.escape(each)}</td>" for each in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def provenance_tables(material: Material, commands: Sequence[str]) -> str:
    """Models, prompts, settings and versions of every artifact, and the commands that make them, as HTML."""
    scores = material.scores
    models: dict[str, InputModel] = {"base": scores.base, **scores.experts}
    rows = [(n, each.source, each.content_hash, "yes" if each.adapter else "no") for n, each in models.items()]
    made = ["<h3>Commands</h3>", f"<pre><code>{html.escape(chr(10).join(commands))}</code></pre>"]
    made += ["<h3>Models</h3>", table(("name", "source", "content", "LoRA adapter"), rows), "<h3>Prompts</h3>"]
    for name, record in scores.capabilities.items():
        shown = "".join(f"<li>{html.escape(_short(prompt))}</li>" for prompt in record.scored[:PROMPTS])
        said = (
            f"{record.source}, {record.content_hash}: {len(record.scored)} prompts scored, "
            f"{len(record.held_out.prompts)} held out, references {record.references}"
            + (", a retain set" if record.retain else "")
        )
        summary = f"<strong>{html.escape(name)}</strong>: {html.escape(said)}"
        made.append(f"<details><summary>{summary}</summary><ol>{shown}</ol></details>")
    if material.plan is not None:
        said = f"rule {material.plan.rule}, granularity {material.plan.granularity}, {material.plan.operator.method}"
        made.append(_settings("Plan", said, material.plan.provenance))
    made.insert(-1 if material.plan is not None else len(made), _settings("Scores", "", scores.provenance))
    if material.evaluation is not None:
        known = {"settings": material.evaluation.settings, **material.evaluation.provenance}
        made.append(_settings("Evaluation", "", known))
    for name, record_ in (("Proof", material.proof), ("Benchmark", material.bench)):
        if record_ is not None:
            made.append(_settings(name, "", record_["provenance"]))
    return "\n".join(made)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


def _settings(title: str, said: str, known: Mapping[str, Any]) -> str:
    rows = [(name.replace("_", " "), _plain(known[name])) for name in _SHOWN if known.get(name) is not None]
    for group in ("versions", "settings", "scales", "held_out_retention", "task_data", "documents_sha256"):
        entry = known.get(group)
        rows += [(f"{group.replace('_', ' ')}: {name}", _plain(value)) for name, value in (entry or {}).items()]
    summary = f"<strong>{html.escape(title)}</strong>: {html.escape(said or 'settings and versions')}"
    return f"<details><summary>{summary}</summary>{table(('what', 'value'), rows)}</details>"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return number(value, 6)
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else str(value)


def text_tables(material: Material) -> list[Table]:
    """The short form: what a report shows, as tables for a terminal."""
    tables = scores_tables(scores_summary(material.scores, top=3))
    if material.plan is not None:
        tables += plan_tables(plan_summary(material.plan))
    if material.evaluation is not None:
        tables += evaluation_tables(evaluation_summary(material.evaluation))
    if material.proof is not None:
        tables += proof_tables(material.proof, str(material.paths.get("proof", "")))
    if material.bench is not None:
        tables += _bench_tables(material.bench)
    if material.remarks:
        rows = [(remark,) for remark in material.remarks]
        tables.append(Table(title="to be careful about", header=("remark",), rows=rows))
    return tables


def _bench_tables(bench: Mapping[str, Any]) -> list[Table]:
    made = []
    for cell in bench["cells"]:
        rows = [
            (
                row["strategy"],
                *(_spanned(*(row[what][name] for name in ("value", "low", "high"))) for what in ("mean", "minimum")),
            )
            for row in cell["rows"]
        ]
        title = f"{' + '.join(cell['subset'])}: retention by {cell['measure']}"
        made.append(Table(title=title, header=("strategy", "mean", "the worst skill"), rows=rows))
    return made
