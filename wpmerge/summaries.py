"""What an artifact says in short: as a mapping for scripts, and from that as tables for people."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from wpmerge.arch import COARSE_KINDS, KINDS, MODEL_KINDS, Kind, Unit
from wpmerge.console import Table, number
from wpmerge.evaluation import Evaluation
from wpmerge.fusing import FuseResult
from wpmerge.merge_summaries import merge_summary, merge_tables
from wpmerge.plan import InputModel, Plan
from wpmerge.scores import DIRECTIONS, Direction, ReadoutRecord, Scores, array_key
from wpmerge.statistics import Interval

GAP_UNITS = {"reference": "nats per token", "divergence": "nats per token", "anchor": "residual-stream units"}


def scores_summary(scores: Scores, *, top: int = 1) -> dict[str, Any]:
    """Each readout's numbers, and per kind how far the screen can be trusted and the ``top`` strongest units."""
    return {
        "base": _model(scores.base),
        "experts": {name: _model(expert) for name, expert in scores.experts.items()},
        "model_type": scores.model_type,
        "layers": scores.layers,
        "units": dict(scores.counts),
        "estimators": sorted({key.split("/")[0] for key in scores.arrays}),
        "readouts": {label: _readout(scores, label, record, top) for label, record in scores.readouts.items()},
        "provenance": dict(scores.provenance),
    }


def _readout(scores: Scores, label: str, record: ReadoutRecord, top: int) -> dict[str, Any]:
    own = record.model_dump(exclude={"curve", "verification"})
    unit = GAP_UNITS[record.readout]
    found: dict[str, Any] = {}
    for direction in DIRECTIONS:
        kinds = {
            str(kind): _kind(scores, label, kind, direction, top)
            for kind in (*KINDS, *COARSE_KINDS)
            for expert in [_shown(scores, record)]
            if array_key("linear", label, expert, kind, direction=direction) in scores.arrays
        }
        if kinds:
            found[direction] = kinds
    score_unit = unit if record.gap is None else "fraction of the gap"
    sufficiency = found.pop("sufficiency", {})
    return {**own, "unit": unit, "score_unit": score_unit, "kinds": sufficiency, **found}


def _shown(scores: Scores, record: ReadoutRecord) -> str:
    """Whose units are shown: the capability's own expert's, or of a retain set the first one's."""
    return record.capability if record.capability in scores.experts else next(iter(scores.experts))


def _kind(scores: Scores, label: str, kind: Kind, direction: Direction, top: int) -> dict[str, Any]:
    """One kind of unit of the capability's own expert."""
    record = scores.readouts[label]
    array = scores.array(label, _shown(scores, record), kind, direction=direction)
    found = record.verification.get(direction, {}).get(kind)
    exact = {unit.unit: unit for unit in found.units} if found else {}
    other = array_key("linear", label, _shown(scores, record), kind)
    sufficiency = scores.arrays[other].flatten() if direction == "necessity" and other in scores.arrays else None
    flat = array.flatten()
    # both directions: where they differ most
    sizes = flat if sufficiency is None else flat - sufficiency
    order = sizes.abs().nan_to_num(nan=-1.0).argsort(descending=True, stable=True).tolist()
    strongest = []
    for place in order[:top]:
        if flat[place].isnan():
            break
        layer, index = divmod(place, array.shape[1])
        model_wide = kind in MODEL_KINDS
        unit = str(Unit(kind=kind, layer=layer, index=index))
        name = None if model_wide or kind not in scores.labels else scores.labels[kind][index]
        verified, value = exact.get(unit), float(flat[place])
        entry = {"unit": unit, "name": name, "recovery": value}
        entry |= {field: getattr(verified, field) if verified else None for field in ("screen", "exact")}
        for estimator in ("integrated", "exact"):
            key = array_key(estimator, label, _shown(scores, record), kind, direction=direction)
            if key in scores.arrays:
                entry[f"{estimator}_score"] = float(scores.arrays[key].flatten()[place])
        if sufficiency is not None:
            entry |= {"sufficiency": float(sufficiency[place]), "difference": value - float(sufficiency[place])}
        strongest.append(entry)
    return {
        "units": array.numel(),
        "scored": int((~array.isnan()).sum()),
        "verified": len(exact),
        **{
            field: getattr(found, field) if found else None
            for field in ("spearman", "spearman_random", "recall", "missed_share", "largest_error")
        },
        "strongest": strongest,
    }


def scores_tables(summary: Mapping[str, Any]) -> list[Table]:
    """A table for each readout; with more than one strongest unit a kind, a table of those too."""
    tables = _choice_tables(summary)
    for label, record in summary["readouts"].items():
        anchor = f" ({record['anchor']})" if record["anchor"] else ""
        gap = (
            f"retain set, {number(record['base'])} {record['unit']} in the base"
            if record["gap"] is None
            else f"gap {number(record['gap'])} {record['unit']}, t {number(record['gap_t'])}, "
            f"noise floor {number(record['noise_floor'], 2)} of the gap"
        )
        title = f"{label}: {record['readout']}{anchor}, l* {record['l_star']}, {gap}"
        title += ", accepted although unreliable" if record["accepted"] else ""
        tables += _kind_tables(title, record["kinds"], record["score_unit"])
        if "necessity" in record:
            tables += _kind_tables(f"{label}: necessity", record["necessity"], record["score_unit"])
    return tables


def _choice_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Where readouts were chosen: what each candidate was worth, and which one is used."""
    rows = []
    for record in summary["readouts"].values():
        for each in record["choice"]:
            verdict = "used" if each["chosen"] else ("" if each["usable"] else f"no: {each['refused']}")
            numbers = (number(each[field]) for field in ("behaviour", "halves", "overlap", "gap_t", "l_star"))
            rows.append((record["capability"], each["readout"], *numbers, verdict))
    if not rows:
        return []
    header = ("capability", "readout", "with reference", "with itself", "overlap of top 5%", "t of gap", "l*", "")
    title = "readouts by how far one half of the prompts foretells the other: rank correlations of unit scores"
    return [Table(title=title, header=header, rows=rows)]


def _kind_tables(title: str, kinds: Mapping[str, Any], unit: str) -> list[Table]:
    """A row for each kind; where more than the strongest unit is asked for, or directions differ, a row for each."""
    rows = []
    for kind, entry in kinds.items():
        best = entry["strongest"][0] if entry["strongest"] else None
        rows.append(
            (
                kind,
                f"{entry['scored']:,} of {entry['units']:,}",
                *(number(entry[field]) for field in ("spearman", "spearman_random", "recall")),
                _unit_name(best) if best else "–",
                number(best["recovery"]) if best else "–",
            )
        )
    column = "recovery" if unit == "fraction of the gap" else unit
    header = ("kind", "scored", "Spearman", "of random", "recall", "strongest", column)
    tables = [Table(title=title, header=header, rows=rows)]
    strongest = [each for entry in kinds.values() for each in entry["strongest"]]
    columns = {"recovery": "linear", "screen": "linear, verified prompts", "exact": "exact, verified prompts"}
    extra = {"integrated_score": "integrated", "exact_score": "exact"}
    columns |= {field: name for field, name in extra.items() if any(field in each for each in strongest)}
    if any("sufficiency" in each for each in strongest):
        columns |= {"sufficiency": "sufficiency", "difference": "necessity − sufficiency"}
    if len(strongest) > len(rows) or "sufficiency" in columns:
        cells = [(_unit_name(each), *(number(each.get(field)) for field in columns)) for each in strongest]
        label = title.split(":", maxsplit=1)[0] + (": necessity" if "sufficiency" in columns else "")
        what = "largest differences" if "sufficiency" in columns else "strongest units"
        tables.append(Table(title=f"{label}: {what}, {unit}", header=("unit", *columns.values()), rows=cells))
    return tables


def _unit_name(entry: Mapping[str, Any]) -> str:
    return f"{entry['unit']} ({entry['name']})" if entry["name"] else str(entry["unit"])


def plan_summary(plan: Plan) -> dict[str, Any]:
    """Rule, granularity, and each expert with the range of its coefficients."""
    experts = {}
    for name, expert in plan.experts.items():
        values = [coefficient.values for coefficient in plan.coefficients[name].values()]
        experts[name] = {
            **_model(expert),
            "tensors": len(values),
            "vectors": sum(value.ndim for value in values),
            "least": min(float(value.min()) for value in values),
            "mean_over_tensors": float(torch.stack([value.mean() for value in values]).mean()),
            "greatest": max(float(value.max()) for value in values),
        }
    return {
        "rule": plan.rule,
        "granularity": plan.granularity,
        "base": _model(plan.base),
        "experts": experts,
        "provenance": dict(plan.provenance),
    }


def plan_tables(summary: Mapping[str, Any]) -> list[Table]:
    """The experts and the range of their coefficients."""
    rows = [
        (
            name,
            entry["source"],
            *(number(entry[field]) for field in ("least", "mean_over_tensors", "greatest")),
            str(entry["tensors"]),
            str(entry["vectors"]),
        )
        for name, entry in summary["experts"].items()
    ]
    header = ("expert", "model", "least", "mean over tensors", "greatest", "tensors", "with a vector")
    title = f"plan: rule {summary['rule']}, granularity {summary['granularity']}, base {summary['base']['source']}"
    return [Table(title=title, header=header, rows=rows)]


def fuse_summary(result: FuseResult) -> dict[str, Any]:
    """The plan in short, the scales, the retention on held-out prompts, and what was written."""
    plan = plan_summary(result.plan)
    return {
        "out": str(result.out),
        "rule": plan["rule"],
        "granularity": plan["granularity"],
        "scales": dict(result.scales),
        "held_out_retention": dict(result.retention),
        "groups_without_a_score": result.outcome.unscored,
        "experts": plan["experts"],
        "written": merge_summary(result.summary) if result.summary else None,
    }


def fuse_tables(summary: Mapping[str, Any]) -> list[Table]:
    """One row an expert: its scale, its coefficients, what the merge keeps of it; then what was written."""
    rows = []
    for name, entry in summary["experts"].items():
        span = f"{number(entry['least'])} to {number(entry['greatest'])}"
        kept = summary["held_out_retention"].get(name)
        rows.append((name, number(summary["scales"].get(name)), span, number(kept)))
    title = f"{summary['out']}: rule {summary['rule']}, granularity {summary['granularity']}"
    if unscored := summary["groups_without_a_score"]:
        title += f"; {unscored:,} groups without a score take their expert's scale"
    header = ("expert", "scale", "coefficients", "retention on held-out prompts, fraction of the gap")
    written = merge_tables(summary["written"]) if summary["written"] else []
    return [Table(title=title, header=header, rows=rows), *written]


def evaluation_summary(evaluation: Evaluation) -> dict[str, Any]:
    """Scores of every model, differences to the reference, retention, doubts; outcomes stay in the file."""
    return {
        "reference": evaluation.reference,
        "base": evaluation.base,
        "models": {
            name: {
                metric: {"value": score.value, "stderr": score.stderr, "n": score.n}
                for metric, score in result.scores.items()
            }
            for name, result in evaluation.models.items()
        },
        "differences": {
            name: {metric: _interval(each) for metric, each in row.items()}
            for name, row in evaluation.differences().items()
        },
        "retention": {
            name: {
                "skills": {skill: _interval(each) for skill, each in kept.skills.items()},
                "mean": _interval(kept.mean),
                "minimum": _interval(kept.minimum),
            }
            for name, kept in evaluation.retention().items()
        },
        "flags": evaluation.flags(),
    }


def evaluation_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Metrics × models with standard errors, then differences and retention with 95% intervals.

    IFEval's scores per instruction type are left to the file.
    """
    models = summary["models"]
    metrics = [name for name in dict.fromkeys(m for row in models.values() for m in row) if name.count("/") < 2]
    rows = [(metric, *(_scored(row.get(metric)) for row in models.values())) for metric in metrics]
    tables = [Table(title="scores ± standard error", header=("metric", *models), rows=rows)]
    if others := summary["differences"]:
        rows = [
            (metric, *(_spanned(row.get(metric)) for row in others.values()))
            for metric in metrics
            if any(metric in row for row in others.values())
        ]
        title = f"difference to {summary['reference']}, with its 95% interval"
        tables.append(Table(title=title, header=("metric", *others), rows=rows))
    if kept := summary["retention"]:
        skills: Sequence[str] = list(next(iter(kept.values()))["skills"])
        rows = [
            (
                name,
                *(_spanned(row["skills"][skill]) for skill in skills),
                _spanned(row["mean"]),
                _spanned(row["minimum"]),
            )
            for name, row in kept.items()
        ]
        title = "retention, fraction of the gap from base to expert, with its 95% interval"
        tables.append(Table(title=title, header=("model", *skills, "mean", "minimum"), rows=rows))
    return tables


def _model(model: InputModel) -> dict[str, Any]:
    return {"source": model.source, "content_hash": model.content_hash, "adapter": model.adapter}


def _interval(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _scored(score: Mapping[str, float] | None) -> str:
    return "–" if score is None else f"{score['value']:.3f} ± {number(score['stderr'], 2)}"


def _spanned(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "–"
    return f"{interval['value']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]"


def explanation_tables(explanations: Mapping[str, Sequence[str]]) -> list[Table]:
    """Why units got their coefficients: a table each, a sentence an expert."""
    return [
        Table(title=f"why {name} gets what it gets", header=("coefficient",), rows=[(text,) for text in sentences])
        for name, sentences in explanations.items()
    ]
