"""``wpmerge report``: artifacts as a page of figures."""

from pathlib import Path
from typing import Annotated

import typer

from wpmerge import console, options

PAGE = Path("report.html")


def report(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="What wpmerge score wrote.")],
    plan: Annotated[
        Path | None, typer.Option(metavar="PLAN", help="A plan or merge that came from them. Default: none.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(metavar="EVAL", help="What wpmerge eval wrote of its models. Default: none.")
    ] = None,
    proof: Annotated[
        Path | None, typer.Option(metavar="PROOF", help="What wpmerge prove wrote. Default: none.")
    ] = None,
    bench: Annotated[Path | None, typer.Option(metavar="DIR", help="What wpmerge bench wrote. Default: none.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help=f"The page to be made. Default: {PAGE}; with --text, --png or --explain none."
        ),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A directory to be made with every figure as PNG. Default: none.")
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Print the short form, for a terminal. Default: off.")] = False,
    explain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="UNIT",
            help="Print why the plan gives a unit its coefficients, and its scores; repeatable. Default: none.",
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Show scores, and what became of them, as one page that needs no network."""
    console.set_up(verbose=verbose)
    from wpmerge.lookup import explained
    from wpmerge.report import report_tables, write_report
    from wpmerge.report_inputs import read_material
    from wpmerge.summaries import explanation_tables

    material = read_material(scores, plan=plan, evaluation=evaluation, proof=proof, bench=bench)
    reasons = explained(material, explain) if explain else {}
    wanted = PAGE if out is None and png is None and not text and not explain else out
    written = write_report(material, out=wanted, png=png, overwrite=overwrite) | {"explanations": reasons}
    for remark in material.remarks if text else ():
        console.say(remark)
    tables = [*report_tables(material, written, text=text), *explanation_tables(reasons)]
    console.show(written, tables, as_json=as_json)
