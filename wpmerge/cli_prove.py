"""``wpmerge prove``: is a ranking of units right?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from wpmerge import console, options
from wpmerge.errors import WpmergeError


def prove(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="What `wpmerge score` wrote.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="PROOF", help="The directory to be made. Default: SCORES-proof beside the scores."),
    ] = None,
    capability: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Which capability. Repeat for more. Default: all.")
    ] = None,
    share: Annotated[
        list[float] | None,
        typer.Option(
            metavar="K",
            help="Share of the moved parameters, 0 to 1, increasing. Repeat. Default: MIB's nine, .001 to .5.",
        ),
    ] = None,
    randoms: Annotated[int, typer.Option(metavar="N", min=1, help="Matched random rankings.")] = 10,
    prompts: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Held-out prompts to read on. Default: all.")
    ] = None,
    generate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="Judge generated replies to these test prompts too (as for `wpmerge bench --test`). Default: none.",
        ),
    ] = None,
    roles: Annotated[
        bool, typer.Option("--roles", help="Find source, aggregation and execution units too. Default: off.")
    ] = False,
    inputs: options.Inputs = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of every draw.")] = 0,
    device: options.Device = "cpu",
    stream: options.Stream = False,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Graft and revert the strongest units, against matched random and trivial rankings."""
    console.set_up(verbose=verbose)
    places = options.named("--model", inputs or [])
    files = options.named("--generate", generate or [])
    where = options.device(device)
    from wpmerge.curves import SHARES
    from wpmerge.judges import load_tests
    from wpmerge.proving import ProveSettings
    from wpmerge.proving import prove as run

    settings = ProveSettings(shares=tuple(share or SHARES), randoms=randoms, prompts=prompts, roles=roles, seed=seed)
    tests = {name: load_tests(Path(file)) for name, file in files.items()}
    for name, items in tests.items():
        if items[0].judge == "none":
            raise WpmergeError(
                "these test prompts are not judged", where=files[name], mend="give instructions or answers"
            )
    with console.reporting() as report:
        found = run(
            scores,
            out=out,
            capabilities=capability or [],
            tests=tests,
            models=places,
            settings=settings,
            device=where,
            resident=not stream,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=report,
        )
    console.show(found, proof_tables(found), as_json=as_json)


def proof_tables(found: Mapping[str, Any]) -> list[console.Table]:
    """The result as tables: a row per ranking, and the roles where they were asked for."""
    rows, roles = [], []
    for name, proof in found["capabilities"].items():
        for readout, curves in proof["readouts"].items():
            for ranking, there in curves["transplant"]["rankings"].items():
                back = curves["revert"]["rankings"][ranking]
                rows.append([name, readout, ranking, *_areas(there), *_areas(back), *_ahead(there), *_ahead(back)])
            if (chance := curves["transplant"]["random"]) is not None:
                back = curves["revert"]["random"]
                cells = [console.number(chance["cpr"]), _span(chance["cpr_range"])]
                cells += [console.number(back["cpr"]), _span(back["cpr_range"])]
                beaten = [f"{each['beaten']} of {each['count']} beaten" for each in (chance, back)]
                rows.append([name, readout, "matched random", *cells, beaten[0], beaten[1]])
        for each in (proof.get("roles") or {}).get("units", []):
            thirds = [str(count) for count in each["thirds"]]
            roles.append([name, each["kind"], each["role"], *thirds, " ".join(each["strongest"])])
    header = ["capability", "readout", "ranking", "transplant CPR", "95%", "revert CPR", "95%", "ahead", "ahead"]
    tables = [
        console.Table(title=f"area of recovered fraction over share; in {found['out']}", header=header, rows=rows)
    ]
    tables.append(_stability_table(found["capabilities"]))
    if roles:
        header = ["capability", "kind", "role", "first third", "second", "last", "strongest"]
        tables.append(console.Table(title="units by role and depth", header=header, rows=roles))
    return tables


def _stability_table(proofs: Mapping[str, Any]) -> console.Table:
    rows = [row for name, proof in proofs.items() for row in _stability_rows(name, proof["stability"])]
    header = ["capability", "over", "rank correlation", "95%", "overlap of top 5%", "with stored"]
    return console.Table(title="rank stability", header=header, rows=rows)


def _stability_rows(name: str, found: Mapping[str, Any]) -> list[list[str]]:
    halves, overlap, stored = (console.number(found[key]) for key in ("halves", "overlap", "stored"))
    rows = [[name, "halves of prompts", halves, _span(found["halves_interval"]), overlap, stored]]
    conditions: list[tuple[str, Any]] = []
    if (wordings := found["paraphrases"]) is not None:
        conditions.append((f"two wordings of {wordings['queries']} queries", wordings))
    if (seeds := found["seeds"]) is not None:
        conditions.append((f"{len(seeds['seeds'])} draws of {seeds['prompts']} prompts", seeds))
    if (layers := found["layers"]) is not None:
        near = layers["neighbours"].items()
        conditions += [(f"anchor at {layers['l_star']} and {layer}", each) for layer, each in near]
    for words, each in conditions:
        cells = [console.number(each["spearman"]), _span(each["interval"]), console.number(each["overlap"])]
        rows.append([name, words, *cells, console.number(each.get("stored"))])
    return rows


def _areas(record: Mapping[str, Any]) -> list[str]:
    return [console.number(record["cpr"]), _span(record["cpr_interval"])]


def _ahead(record: Mapping[str, Any]) -> list[str]:
    low, high = (console.number(each) for each in record["linear_ahead_interval"])
    return [f"{console.number(record['linear_ahead'])} [{low}, {high}]"]


def _span(bounds: Any) -> str:
    return f"{console.number(bounds[0])} to {console.number(bounds[1])}"
