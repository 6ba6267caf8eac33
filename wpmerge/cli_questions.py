"""``wpmerge questions``: prompts for a retain set, out of the base itself."""

from pathlib import Path
from typing import Annotated

import typer

from wpmerge import console, options

SHOWN = 8
"""Questions that are printed."""


def questions(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A chat model, directory or hub id: the base.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help='The JSONL file to be made, {"prompt": …} a line.')],
    count: Annotated[int, typer.Option(metavar="N", min=options.LEAST["prompts"], help="How many.")] = 120,
    longest: Annotated[int, typer.Option(metavar="N", min=4, help="Longest question, tokens, its end included.")] = 64,
    temperature: Annotated[float, typer.Option(metavar="T", min=0.01, max=10.0, help="Of the sampling.")] = 1.0,
    top_p: Annotated[
        float, typer.Option(metavar="P", min=0.01, max=1.0, help="Share of the probability that is drawn from.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the sampling.")] = 0,
    device: options.Device = "cpu",
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Let a chat model write what users ask it: a retain set for wpmerge score, to be read before it is used."""
    console.set_up(verbose=verbose)
    where = options.device(device)
    from wpmerge.questions import QuestionSettings, write_questions

    settings = QuestionSettings(count=count, longest=longest, temperature=temperature, top_p=top_p, seed=seed)
    with console.reporting() as report:
        found = write_questions(
            model,
            out,
            settings=settings,
            device=where,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=report,
        )
    summary = {"out": str(found.out), "questions": len(found.texts), "draws": found.draws}
    shown = console.Table(
        title=f"the first of {len(found.texts)} questions, in {found.draws} draws; all are in {found.out}",
        header=["question"],
        rows=[[text] for text in found.texts[:SHOWN]],
    )
    console.show(summary, [shown], as_json=as_json)
