"""The model card of a merge: front matter that hubs read, what was merged, and the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from wpmerge.checkpoint import Checkpoint
from wpmerge.directory import is_hub_id

if TYPE_CHECKING:
    from wpmerge.plan import Plan

_OPERATIONS = {
    "task_arithmetic": "Σ coefficient · (expert - base)",
    "ties": "TIES of coefficient · (expert - base)",
    "dare_linear": "Σ coefficient · DARE(expert - base)",
    "dare_ties": "TIES of coefficient · DARE(expert - base)",
}


def model_card(
    *,
    name: str,
    base: Checkpoint | None,
    models: Sequence[str],
    summary: str,
    recipe: str,
    version: str,
    record: str = "",
) -> str:
    """A ``README.md``.

    Args:
        name: the merged model's name.
        base: where the license is taken from, if its card states one.
        models: what was merged, as the user named it, the base first. Hubs refuse a card whose front matter names
            something else than their models: directories stand in the recipe alone.
        summary: what was done, in Markdown.
        recipe: the YAML recipe.
        version: of wpmerge.
        record: SHA-256 of ``merge.json``, which holds the checksum of every tensor.
    """
    known = _hub_ids(models)
    front: dict[str, Any] = {
        **({"base_model": known, "base_model_relation": "merge"} if known else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "wpmerge"],
    }
    if base and (license_ := front_matter(base.path).get("license")):
        front["license"] = license_
    if record:
        front["wpmerge_record"] = f"sha256:{record}"
    fence = "```"
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n"
        f"# {name}\n\n{summary}\n\nMade with wpmerge {version}.\n\n## Recipe\n\n{fence}yaml\n{recipe}{fence}\n"
    )


def _hub_ids(models: Sequence[str]) -> list[str]:
    """The hub ids among models, without revisions; of ``base+adapter`` both."""
    parts = [part for model in models for part in model.split("+")]
    return list(dict.fromkeys(part.partition("@")[0] for part in parts if is_hub_id(part) and not Path(part).exists()))


def plan_summary(plan: Plan) -> str:
    """What a plan did, in Markdown: the rule, and each expert with the range of its coefficients."""
    lines = [
        f"A merge of {len(plan.experts)} experts into `{plan.base.source}`, rule `{plan.rule}`, "
        f"granularity `{plan.granularity}`: merged = base + {_OPERATIONS[plan.operator.method]}, tensor by tensor.",
        "",
        "| expert | model | coefficients: least | mean over tensors | greatest |",
        "|---|---|---|---|---|",
    ]
    for name, expert in plan.experts.items():
        values = [coefficient.values for coefficient in plan.coefficients[name].values()]
        low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
        mean = sum(float(v.mean()) for v in values) / len(values)
        lines.append(f"| {name} | `{expert.source}` | {low:.4g} | {mean:.4g} | {high:.4g} |")
    return "\n".join(lines)


def front_matter(directory: Path) -> dict[str, Any]:
    """The front matter of a directory's ``README.md``; empty where there is none."""
    try:
        text = (directory / "README.md").read_text(encoding="utf-8")
        parts = text.split("---\n", 2)
        found = yaml.safe_load(parts[1]) if text.startswith("---\n") and len(parts) == 3 else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
