"""``wpmerge run``: a recipe from base and experts to a merge that has been judged; what that will take."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wpmerge import console, options

if TYPE_CHECKING:
    from wpmerge.running import Finished, Run

UNKNOWN = "unknown until downloaded"


def run(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="RECIPE.yaml", help="What is merged and how: recipes/ has some to start from."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The directory of the run. Default: the recipe's.")
    ] = None,
    model: options.Inputs = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say what would be downloaded, read and written, in how much memory, disk and time, and stop. "
            "Needs configurations only, and no network. Default: off.",
        ),
    ] = False,
    schema: Annotated[
        bool,
        typer.Option("--schema", help="Print the recipe's JSON Schema, for editors, and stop. Default: off."),
    ] = False,
    confirm_unsafe_code: options.ConfirmUnsafeCode = False,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Score, fuse, evaluate and report as a recipe says; what is done already is skipped."""
    console.set_up(verbose=verbose)
    places = options.named("--model", model or [])
    from wpmerge.errors import RecipeError
    from wpmerge.run_recipe import json_schema, read_run_recipe

    if schema:
        console.show(json_schema(), [], as_json=True)
        return
    if recipe is None:
        raise RecipeError("wpmerge run needs a recipe", expected="RECIPE.yaml", mend="recipes/ has some to start from")
    asked = read_run_recipe(recipe)
    from wpmerge import running

    with console.reporting() as report:
        prepared = running.prepare(
            asked,
            out=out,
            models=places,
            trust_remote_code=trust_remote_code,
            unsafe_code=confirm_unsafe_code,
            progress=None if dry_run else report,
        )
        if not dry_run:
            finished = running.carry_out(prepared, overwrite=overwrite)
    if dry_run:
        summary = dry_summary(prepared, recipe)
        console.show(summary, dry_tables(summary), as_json=as_json)
    else:
        _show_finished(prepared, finished, as_json=as_json)


def _show_finished(run: "Run", finished: "list[Finished]", *, as_json: bool) -> None:
    from wpmerge import summaries
    from wpmerge.evaluation import load_evaluation
    from wpmerge.plan import load_plan

    outputs = {each.name: each for each in finished}
    summary: dict[str, Any] = {
        "out": str(run.out),
        "stages": [
            {"stage": each.name, "output": str(each.output), "done_before": each.before, "seconds": each.seconds}
            for each in finished
        ],
        "merged": str(outputs["fuse"].output),
        "recipe": str(outputs["fuse"].output / "recipe.yml"),
        "report": str(outputs["report"].output),
        "rule": load_plan(outputs["fuse"].output).rule,
    }
    rows = [
        [each.name, "done before" if each.before else console.duration(each.seconds), str(each.output)]
        for each in finished
    ]
    tables = [console.Table(title=f"a run, in {run.out}", header=["stage", "time", "output"], rows=rows)]
    if "eval" in outputs:
        summary["evaluation"] = summaries.evaluation_summary(load_evaluation(outputs["eval"].output))
        tables += summaries.evaluation_tables(summary["evaluation"])
    console.show(summary, tables, as_json=as_json)


def dry_summary(run: "Run", recipe: Path) -> dict[str, Any]:
    """What a run would do and take, as JSON values; what is not known is null."""
    from wpmerge import forecast, run_record, running

    sources = running.sources_of(run)
    there = {name: source.path if source.complete else None for name, source in sources.items()}
    stages = running.stages_of(run, there)
    record = run_record.read_record(run.out)
    states = {stage.name: run_record.state_of(stage, record) for stage in stages}
    work = forecast.workload(run.recipe, sources, run.capabilities)
    needs = {} if work is None else {"score": forecast.scoring_needs(work), "fuse": forecast.fusing_needs(work)}
    if work is not None and run.recipe.evaluation is not None:
        needs["eval"] = forecast.judging_needs(work, run.recipe.evaluation)
    if work is not None:
        needs["report"] = forecast.REPORT
    wanted = [needs[stage.name] for stage in stages if states[stage.name] != "done" and stage.name in needs]
    whole = forecast.longest(wanted)
    fetched = [source for source in sources.values() if source.place == "hub"]
    return {
        "recipe": str(recipe),
        "out": str(run.out),
        "models": {
            name: {
                "source": source.source,
                "adapter": source.adapter,
                "download": source.place == "hub",
                "weights_here": source.complete,
                "bytes": source.nbytes,
                "bytes_from": source.sized,
            }
            for name, source in sources.items()
        },
        "stages": [
            {
                "stage": stage.name,
                "state": states[stage.name],
                "output": str(stage.output),
                "memory_bytes": needs[stage.name].memory if stage.name in needs else None,
                "written_bytes": needs[stage.name].written if stage.name in needs else None,
                "about_seconds": needs[stage.name].seconds if stage.name in needs else None,
            }
            for stage in stages
        ],
        "download_bytes": sum(source.nbytes or 0 for source in fetched),
        "download_bytes_unknown": [source.source for source in fetched if source.nbytes is None],
        "memory_bytes": whole.memory,
        "written_bytes": whole.written,
        "about_seconds": whole.seconds,
        "about_seconds_without": [
            stage.name
            for stage in stages
            if states[stage.name] != "done" and (stage.name not in needs or needs[stage.name].seconds is None)
        ],
        "device": run.recipe.device,
        "seconds_are_of": forecast.HARDWARE,
    }


def dry_tables(summary: dict[str, Any]) -> list[console.Table]:
    """What :func:`dry_summary` says, for people."""
    models = [[name, entry["source"], _place(entry), _weight(entry)] for name, entry in summary["models"].items()]
    stages = [
        [
            entry["stage"],
            entry["state"],
            _size(entry["memory_bytes"]),
            _size(entry["written_bytes"]) if entry["stage"] not in ("eval", "report") else "little",
            _time(entry["about_seconds"]),
            entry["output"],
        ]
        for entry in summary["stages"]
    ]
    unknown = summary["download_bytes_unknown"]
    more = f", and {', '.join(unknown)}, of unknown size" if unknown else ""
    totals = [
        ["downloads", f"{_size(summary['download_bytes'])}{more}"],
        ["most memory", f"about {_size(summary['memory_bytes'])}" if summary["memory_bytes"] else UNKNOWN],
        ["disk", f"about {_size(summary['written_bytes'])} beside downloads" if summary["written_bytes"] else "little"],
        ["time", _time_on(summary)],
    ]
    note = "nothing was downloaded, run or written"
    return [
        console.Table(title=f"{summary['recipe']}: {note}", header=["model", "source", "is", "weights"], rows=models),
        console.Table(title="stages", header=["stage", "state", "memory", "writes", "time", "output"], rows=stages),
        console.Table(title="in all, of what is to be done", header=["what", "how much"], rows=totals),
    ]


def _place(entry: dict[str, Any]) -> str:
    if entry["download"]:
        return "to be downloaded"
    kind = "adapter" if entry["adapter"] else "checkpoint"
    return f"{kind}, read where it is" if entry["weights_here"] else f"{kind} without weights: a run would be refused"


def _weight(entry: dict[str, Any]) -> str:
    if entry["bytes"] is None:
        return UNKNOWN if entry["download"] else "unknown"
    about = {"files": "", "index": " by its index", "config": " estimated from its config"}[entry["bytes_from"]]
    return f"{_size(entry['bytes'])}{about}"


def _size(value: int | None) -> str:
    if value is None:
        return "unknown"
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value / 1e3:.3g} kB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return "a minute or less" if seconds <= 60 else f"about {console.duration(seconds)}"


def _time_on(summary: dict[str, Any]) -> str:
    said = _time(summary["about_seconds"])
    if summary["about_seconds"] is None:
        return said
    if without := summary["about_seconds_without"]:
        said += f", and {', '.join(without)}, which takes an unknown time,"
    elsewhere = (
        "" if summary["device"] == "cpu" else f"; {summary['device']} was not measured, and should be far quicker"
    )
    return f"{said} on {summary['seconds_are_of']}, extrapolated from smaller models (docs/performance.md){elsewhere}"
