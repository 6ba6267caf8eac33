"""``wpmerge bench``: merging strategies on one family, tuned alike."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wpmerge import console, options

if TYPE_CHECKING:
    from wpmerge.bench_table import Cell, StrategyRow
    from wpmerge.statistics import Interval

QUICK = {"seeds": (0,), "evaluations": 8, "tune": 6, "tests": 18, "longest": 64}
"""What --quick asks for, where nothing else is said: to see that everything works, not to believe a number."""


def bench(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="What wpmerge score wrote.")],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where results are kept; a rerun with the same options goes on from there."),
    ],
    test: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=FILE",
            help="A skill's test prompts, JSONL: prompt, and instruction_id_list with kwargs, answer, or reference. "
            "Repeat for each skill.",
        ),
    ],
    strategy: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A strategy. Repeat for more. Default: all, and the controls beside ours."),
    ] = None,
    subset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME+NAME", help="Experts merged together. Repeat for more. Default: all, and every pair."
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE", help="More prompts to tune on, JSONL. Default: those held out by the scores."
        ),
    ] = None,
    retain: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Prompts outside every skill, JSONL, on which the base is to be kept. Default: none."
        ),
    ] = None,
    evaluations: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Merges each strategy may run to tune itself. Default: 24.")
    ] = None,
    tune: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Prompts per skill and seed to tune on. Default: 16.")
    ] = None,
    tests: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Test prompts per skill, all seeds together. Default: all.")
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Of prompt splits and draws. Repeat for more. Default: 0, 1 and 2."),
    ] = None,
    only_seed: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            help="Of the seeds, one to run now, so that machines can share them. Repeat for more. Default: all.",
        ),
    ] = None,
    finalists: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="After the first seed only the N best rivals and the N best rules go on, by mean and by minimum; "
            "uniform, scaled and fuse:refine-expert always. Default: all.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Longest reply, tokens. Default: 96.")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts generated together.")] = 48,
    generate: Annotated[
        bool, typer.Option("--generate/--no-generate", help="Judge generated replies, or read log-probabilities alone.")
    ] = True,
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed, all experts together, few prompts and evaluations. Default: off.")
    ] = False,
    inputs: options.Inputs = None,
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Compare merging strategies, each tuned alike, on fresh prompts."""
    console.set_up(verbose=verbose)
    given = {
        "evaluations": evaluations,
        "tune": tune,
        "tests": tests,
        "longest": max_new_tokens,
        "seeds": tuple(seed) if seed else None,
        "only_seeds": tuple(only_seed) if only_seed else None,
        "finalists": finalists,
        "subsets": tuple(tuple(text.split("+")) for text in subset) if subset else None,
        "strategies": tuple(strategy) if strategy else None,
    }
    files = {name: Path(path) for name, path in options.named("--test", test, form="NAME=FILE").items()}
    more = {name: Path(path) for name, path in options.named("--prompts", prompts or [], form="NAME=FILE").items()}
    places = options.named("--model", inputs or [])
    where = options.device(device)
    from wpmerge.bench import bench as run
    from wpmerge.bench_setup import BenchSettings

    chosen: dict[str, Any] = dict(QUICK) if quick else {}
    if quick:
        chosen["subsets"] = (tuple(files),)
    chosen |= {name: value for name, value in given.items() if value is not None}
    with console.reporting() as report:
        result = run(
            scores,
            out,
            tests=files,
            prompts=more,
            retain=retain,
            settings=BenchSettings(generate=generate, batch_size=batch_size, **chosen),
            models=places,
            device=where,
            trust_remote_code=trust_remote_code,
            progress=report,
        )
    summary = {"out": str(out), "cells": [cell_summary(cell) for cell in result.cells]}
    console.show(summary, [cell_table(cell) for cell in result.cells], as_json=as_json)


def cell_summary(cell: "Cell") -> dict[str, Any]:
    """A cell as a mapping for scripts."""
    from dataclasses import asdict

    return asdict(cell)


def cell_table(cell: "Cell") -> console.Table:
    """A cell as a table for people: retention with 95% intervals, and differences to the best rival."""
    seeds = f"{len(cell.seeds)} seed{'s' if len(cell.seeds) > 1 else ''}"
    what = "replies" if cell.measure == "generated" else "log-probability"
    counts = ", ".join(
        f"{name}: {cell.prompts[name]} prompts, base {cell.base[name]:.2f}, expert {cell.expert[name]:.2f}"
        for name in cell.subset
    )
    columns = ["strategy", *cell.subset, "mean", "minimum", f"mean − {cell.best_mean}"]
    header = [*columns, f"minimum − {cell.best_minimum}", "retain set", "evaluations"]
    rows = [_cells_of(row, cell.subset) for row in cell.rows]
    return console.Table(title=f"{'+'.join(cell.subset)}, {what}, {seeds} ({counts})", header=header, rows=rows)


def _cells_of(row: "StrategyRow", subset: Sequence[str]) -> list[str]:
    return [
        row.strategy,
        *(f"{row.skills[name].value:.2f}" for name in subset),
        _interval(row.mean),
        _interval(row.minimum),
        _interval(row.mean_difference, signed=True),
        _interval(row.minimum_difference, signed=True),
        _interval(row.retain, signed=True, digits=3),
        str(row.evaluations),
    ]


def _interval(value: "Interval | None", *, signed: bool = False, digits: int = 2) -> str:
    if value is None:
        return "–"
    form = f"{'+' if signed else ''}.{digits}f"
    return f"{value.value:{form}} [{value.low:{form}}, {value.high:{form}}]"


def markdown(table: console.Table, notes: Mapping[str, str] | None = None) -> str:
    """A table as markdown, for results that are kept."""
    lines = [f"**{table.title}**", "", "| " + " | ".join(table.header) + " |", "|---" * len(table.header) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in table.rows]
    lines += [f"\n{name}: {text}" for name, text in (notes or {}).items()]
    return "\n".join(lines)
