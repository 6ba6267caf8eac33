"""``wpmerge fuse``: scores to coefficients, a plan, a recipe and a merged checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from wpmerge import console, options

RULES = ("refine", "scaled", "uniform", "proportional", "select", "joint")
METHODS = ("task_arithmetic", "ties", "dare_linear", "dare_ties")
GRANULARITIES = ("unit", "block", "tensor", "expert")


def fuse(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="What wpmerge score wrote.")],
    out: Annotated[Path, typer.Option(metavar="MERGED", help="The directory to be made.")],
    rule: Annotated[
        str, typer.Option(metavar="RULE", help=f"How scores become coefficients: {', '.join(RULES)}.")
    ] = "refine",
    granularity: Annotated[
        str | None,
        typer.Option(
            metavar="LEVEL",
            help=f"What shares a coefficient: {', '.join(GRANULARITIES)}. "
            "Default: expert for uniform and scaled, unit for the others.",
        ),
    ] = None,
    scale: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]X",
            help="An expert's scale, or all experts', a factor on its difference to the base. "
            "Default: chosen by running merges on held-out prompts.",
        ),
    ] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Write plan and recipe, and stop before the weights. Default: off.")
    ] = False,
    model: options.Inputs = None,
    power: Annotated[float, typer.Option(metavar="P", help="Of proportional: exponent of the recovery, 0 to 4.")] = 0.5,
    density: Annotated[
        float,
        typer.Option(metavar="RHO", help="Of select: share of scored parameters that get the full scale, 0 to 1."),
    ] = 0.2,
    floor: Annotated[
        float, typer.Option(metavar="F", help="Of select: what the rest gets, as a share of the scale, 0 to 1.")
    ] = 0.3,
    max_coefficient: Annotated[float, typer.Option(metavar="X", help="Largest coefficient, 0 to 10.")] = 1.5,
    mu: Annotated[
        float, typer.Option(metavar="MU", help="Of joint: what leaving the scales costs, 1e-6 to 1e6.")
    ] = 1.0,
    steps: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=options.LEAST["steps"],
            help="Of refine: steps, each a forward and backward run over its prompts.",
        ),
    ] = 16,
    batch: Annotated[
        int, typer.Option(metavar="N", min=options.LEAST["batch"], help="Of refine: prompts per capability and step.")
    ] = 8,
    ridge: Annotated[
        float, typer.Option(metavar="X", help="Of refine: pull back to the start at each step, as a share, 0 to 1.")
    ] = 0.0,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Choose the rule's own numbers on held-out prompts too: power; density and floor; mu. The other rules "
            "have none beside their scales. Default: off.",
        ),
    ] = False,
    tolerance: Annotated[
        float,
        typer.Option(
            metavar="X",
            help="What a merge may lose on a retain set, nats per token below the base, a standard error included.",
        ),
    ] = 0.02,
    evaluations: Annotated[
        int,
        typer.Option(
            metavar="N", min=options.LEAST["evaluations"], help="Merges run on held-out prompts to choose the numbers."
        ),
    ] = 24,
    seed: Annotated[int, typer.Option(metavar="N", help="Of refine's draws of prompts, and of what dare drops.")] = 0,
    explain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="UNIT",
            help="Say in one sentence what made each expert's coefficient of a unit, such as head.3.0, or of a tensor "
            "or block where that is the granularity. Repeat for more. Default: none.",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(metavar="METHOD", help=f"What combines the weighted task vectors: {', '.join(METHODS)}.")
    ] = "task_arithmetic",
    method_density: Annotated[
        float, typer.Option(metavar="X", help="Of ties and dare: the share of a task vector that is kept, 0 to 1.")
    ] = 1.0,
    exact_recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Also make a directory with a recipe that reproduces the merge in stock mergekit, unit by unit, with "
            "the auxiliary checkpoint it takes. Default: none.",
        ),
    ] = None,
    allow_nan: options.AllowNan = False,
    shard_size: options.ShardSize = "5GB",
    dtype: options.Dtype = None,
    threads: options.Threads = 2,
    device: options.Device = "cpu",
    stream: options.Stream = False,
    max_memory: options.MaxMemory = None,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Turn scores into coefficients, a plan, a mergekit recipe and a merged checkpoint."""
    console.set_up(verbose=verbose)
    scales = options.scales(scale or [])
    inputs = options.named("--model", model or [])
    shard_bytes = options.byte_size("--shard-size", shard_size)
    chosen_rule = options.one_of("--rule", rule, RULES)
    level = None if granularity is None else options.one_of("--granularity", granularity, GRANULARITIES)
    by = options.one_of("--method", method, METHODS)
    options.stored_dtype("--dtype", dtype)
    memory = None if max_memory is None else options.byte_size("--max-memory", max_memory)
    from wpmerge import api, summaries

    with console.reporting() as report:
        result = api.fuse(
            scores,
            out=out,
            rule=chosen_rule,
            granularity=level,
            scale=scales,
            plan_only=plan_only,
            model=inputs,
            power=power,
            density=density,
            floor=floor,
            max_coefficient=max_coefficient,
            mu=mu,
            steps=steps,
            batch=batch,
            ridge=ridge,
            calibrate=calibrate,
            tolerance=tolerance,
            evaluations=evaluations,
            seed=seed,
            explain=explain,
            method=by,
            method_density=method_density,
            exact_recipe=exact_recipe,
            allow_nan=allow_nan,
            shard_size=shard_bytes,
            dtype=dtype,
            threads=threads,
            device=device,
            stream=stream,
            max_memory=memory,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=report,
        )
    summary = summaries.fuse_summary(result)
    summary |= {
        "held_out_lost": dict(result.lost),
        "held_out_lost_error": dict(result.lost_errors),
        "tolerance": tolerance,
        "explanations": {k: list(v) for k, v in result.explanations.items()},
    }
    tables = [
        *summaries.fuse_tables(summary),
        *_lost(result.lost, result.lost_errors, tolerance),
        *summaries.explanation_tables(result.explanations),
    ]
    console.show(summary, tables, as_json=as_json)


def _lost(lost: Mapping[str, float], errors: Mapping[str, float], tolerance: float) -> list[console.Table]:
    rows = [
        (name, console.number(value), console.number(errors.get(name, 0.0)), console.number(tolerance))
        for name, value in lost.items()
    ]
    title = "retain sets: what the merge loses on prompts that no step saw, nats per token below the base"
    header = ("retain set", "lost", "standard error", "both may be")
    return [console.Table(title=title, header=header, rows=rows)] if rows else []
