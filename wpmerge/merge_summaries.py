"""What a merge and its verification say in short; apart from :mod:`wpmerge.summaries`, which imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wpmerge.console import Table, number
from wpmerge.writing import MergeSummary

if TYPE_CHECKING:
    from wpmerge.verify import Verification


def merge_summary(summary: MergeSummary) -> dict[str, Any]:
    """What a merge wrote."""
    return {
        "out": str(summary.out),
        "tensors": summary.tensors,
        "bytes": summary.nbytes,
        "files": summary.shards,
        "seconds": round(summary.seconds, 3),
    }


def verification_summary(directory: Path, found: Verification) -> dict[str, Any]:
    """What was recomputed, and what is wrong."""
    return {
        "merged": str(directory),
        "tensors": found.tensors,
        "recomputed": len(found.checked),
        "faults": dict(found.faults),
        "passed": found.passed,
    }


def verification_tables(summary: Mapping[str, Any]) -> list[Table]:
    """One row that says how it went, then a row per fault."""
    row = (summary["merged"], f"{summary['recomputed']} of {summary['tensors']}", str(len(summary["faults"])))
    tables = [Table(title="tensors made again", header=("merged", "recomputed", "faults"), rows=[row])]
    if summary["faults"]:
        rows = [(name, fault) for name, fault in summary["faults"].items()]
        tables.append(Table(title="not what they should be", header=("tensor", "fault"), rows=rows))
    return tables


def merge_tables(summary: Mapping[str, Any]) -> list[Table]:
    """What a merge wrote, in one row."""
    row = (summary["out"], str(summary["tensors"]), f"{summary['bytes']:,}", str(summary["files"]))
    header = ("written", "tensors", "bytes of weights", "files of weights", "seconds")
    return [Table(title="", header=header, rows=[(*row, number(summary["seconds"]))])]
