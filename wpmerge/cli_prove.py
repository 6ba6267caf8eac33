"""``wpmerge prove``: is a ranking of units right?"""

from pathlib import Path
from typing import Annotated

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
    from wpmerge.proof import proof_tables
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
    console.show(found, proof_tables(found, found["out"]), as_json=as_json)
