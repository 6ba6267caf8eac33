"""The Proof artifact: read again, and in short for people. docs/formats.md states what it holds."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wpmerge.console import Table, number
from wpmerge.errors import WpmergeError

SCHEMA_VERSION = 1
FILE = "proof.json"
CONDITIONS: Mapping[str, str] = {
    "paraphrases": "two wordings",
    "seeds": "other draws of prompts",
    "layers": "nearby layers",
}
"""What rank stability is asked over, beside prompts, and in words."""


def load_proof(path: Path) -> dict[str, Any]:
    """Read a proof's directory, or its proof.json.

    Raises:
        WpmergeError: the file is missing, damaged, or of another schema version.
    """
    file = path / FILE if path.is_dir() else path
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if found["kind"] != "proof" or found["schema_version"] != SCHEMA_VERSION:
            raise WpmergeError(
                "a proof is of another version",
                where=file,
                got=f"{found['kind']} schema {found['schema_version']}",
                expected=f"proof schema {SCHEMA_VERSION}",
                mend="use the version of wpmerge that wrote it, or prove again",
            )
        for each in found["capabilities"].values():
            for curves in each["readouts"].values():
                for curve in ("transplant", "revert"):
                    _ = curves[curve]["random"], curves[curve]["rankings"]["linear"]["recovered"]
            _ = each["shares"], each["stability"]["halves"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WpmergeError(
            "a proof cannot be read",
            where=file,
            got=f"{type(error).__name__}: {error}",
            expected="proof.json, as `wpmerge prove` writes it",
        ) from None
    return found


def absent(stability: Mapping[str, Any]) -> list[str]:
    """Conditions that a proof of an early version does not know; later ones hold null where there is no number."""
    return [key for key in CONDITIONS if key not in stability]


def proof_tables(found: Mapping[str, Any], where: str) -> list[Table]:
    """A proof as tables: a row per ranking, rank stability, and the roles where they were asked for."""
    rows, roles = [], []
    for name, proof in found["capabilities"].items():
        for readout, curves in proof["readouts"].items():
            for ranking, there in curves["transplant"]["rankings"].items():
                back = curves["revert"]["rankings"][ranking]
                rows.append([name, readout, ranking, *_areas(there), *_areas(back), *_ahead(there), *_ahead(back)])
            if (chance := curves["transplant"]["random"]) is not None:
                back = curves["revert"]["random"]
                cells = [number(chance["cpr"]), _span(chance["cpr_range"]), number(back["cpr"])]
                cells += [_span(back["cpr_range"])]
                beaten = [f"{each['beaten']} of {each['count']} beaten" for each in (chance, back)]
                rows.append([name, readout, "matched random", *cells, beaten[0], beaten[1]])
        for each in (proof.get("roles") or {}).get("units", []):
            thirds = [str(count) for count in each["thirds"]]
            roles.append([name, each["kind"], each["role"], *thirds, " ".join(each["strongest"])])
    header = ["capability", "readout", "ranking", "transplant CPR", "95%", "revert CPR", "95%", "ahead", "ahead"]
    tables = [Table(title=f"area of recovered fraction over share; in {where}", header=header, rows=rows)]
    tables.append(_stability_table(found["capabilities"]))
    if roles:
        header = ["capability", "kind", "role", "first third", "second", "last", "strongest"]
        tables.append(Table(title="units by role and depth", header=header, rows=roles))
    return tables


def _stability_table(proofs: Mapping[str, Any]) -> Table:
    rows = [row for name, proof in proofs.items() for row in _stability_rows(name, proof["stability"])]
    header = ["capability", "over", "rank correlation", "95%", "overlap of top 5%", "with stored"]
    return Table(title="rank stability", header=header, rows=rows)


def _stability_rows(name: str, found: Mapping[str, Any]) -> list[list[str]]:
    halves, overlap, stored = (number(found[key]) for key in ("halves", "overlap", "stored"))
    rows = [[name, "halves of prompts", halves, _span(found["halves_interval"]), overlap, stored]]
    rows += [
        [name, f"{CONDITIONS[key]}: not kept by the version that wrote it", "–", "–", "–", "–"] for key in absent(found)
    ]
    conditions: list[tuple[str, Any]] = []
    if (wordings := found.get("paraphrases")) is not None:
        conditions.append((f"two wordings of {wordings['queries']} queries", wordings))
    if (seeds := found.get("seeds")) is not None:
        conditions.append((f"{len(seeds['seeds'])} draws of {seeds['prompts']} prompts", seeds))
    if (layers := found.get("layers")) is not None:
        near = layers["neighbours"].items()
        conditions += [(f"anchor at {layers['l_star']} and {layer}", each) for layer, each in near]
    for words, each in conditions:
        cells = [number(each["spearman"]), _span(each["interval"]), number(each["overlap"])]
        rows.append([name, words, *cells, number(each.get("stored"))])
    return rows


def _areas(record: Mapping[str, Any]) -> list[str]:
    return [number(record["cpr"]), _span(record["cpr_interval"])]


def _ahead(record: Mapping[str, Any]) -> list[str]:
    low, high = (number(each) for each in record["linear_ahead_interval"])
    return [f"{number(record['linear_ahead'])} [{low}, {high}]"]


def _span(bounds: Any) -> str:
    return f"{number(bounds[0])} to {number(bounds[1])}"
