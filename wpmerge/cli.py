"""The commands: options to functions, results to stdout. Nothing heavy is imported before a command runs."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from wpmerge import console, options
from wpmerge.cli_eval import evaluate
from wpmerge.errors import WpmergeError

READOUTS = ("reference", "anchor")
KINDS = ("head", "neuron", "kv_group", "norm", "output_bias", "embedding", "positions", "final_norm", "lm_head")
RULES = ("scaled", "uniform", "proportional", "select")
GRANULARITIES = ("unit", "block", "tensor", "expert")


class _Commands(TyperGroup):
    """The one place where errors that a user can mend, and interrupts, become messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except WpmergeError as error:
            console.say(f"error: {error}")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            console.say("interrupted: run the same command again, and it goes on from the pieces that are finished")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # the plain form is quicker, and does not cut the names of options
    pretty_exceptions_enable=False,
    help="Merge expert language models by knowing which of their modules carry which skill.",
    epilog="Results go to stdout, messages and progress to stderr. Exit code 2: something in the input can be mended.",
)


def main() -> None:
    """Run the command line."""
    app(prog_name="wpmerge")


def _print_version(asked: bool) -> None:
    if asked:
        from wpmerge import __version__

        typer.echo(f"wpmerge {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
def score(
    base: Annotated[str, typer.Option(metavar="BASE", help="The base: a directory, or a hub id.")],
    expert: Annotated[
        list[str],
        typer.Option(metavar="NAME=PATH", help="An expert: a directory, hub id or LoRA adapter. Repeat for each."),
    ],
    capability: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=SPEC",
            help="What the expert NAME is good at: a built-in name, several joined by +, or a JSONL file of "
            "prompt, without, reference. One for each expert.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="SCORES", help="The directory to be made.")],
    readout: Annotated[
        list[str],
        typer.Option(
            metavar="READOUT",
            help=f"What is read: {', '.join(READOUTS)}. Repeat for more; the first decides coefficients.",
        ),
    ] = list(READOUTS),  # noqa: B006 - typer reads it, nothing changes it
    prompts: Annotated[int, typer.Option(metavar="N", min=4, help="Prompts per capability to score on.")] = 32,
    held_out: Annotated[
        int, typer.Option(metavar="N", min=4, help="More prompts per capability, to choose scales on.")
    ] = 16,
    reference_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest reference, tokens.")] = 48,
    top_k: Annotated[
        int, typer.Option(metavar="N", min=0, help="Strongest units of each kind to verify by exact patching.")
    ] = 32,
    random_sample: Annotated[
        int, typer.Option(metavar="N", min=0, help="Random other units of each kind to verify.")
    ] = 64,
    verify_prompts: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts per capability to verify on.")] = 4,
    kind: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND", help=f"Kind of unit to score: {', '.join(KINDS)}. Repeat for more. Default: all."),
    ] = None,
    cross: Annotated[
        bool, typer.Option("--cross/--no-cross", help="Score every expert on every capability, or on its own only.")
    ] = True,
    integrated_points: Annotated[
        int, typer.Option(metavar="N", min=0, help="Points of the integrated estimator; 0 leaves it out.")
    ] = 0,
    layer: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="Layer to read every anchor after, from 0. Default: chosen by reliability."
        ),
    ] = None,
    accept_anchor: Annotated[
        bool, typer.Option("--accept-anchor", help="Go on with an anchor or a gap that is not reliable. Default: off.")
    ] = False,
    tokens_per_row: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens packed into one row; sets memory.")
    ] = 384,
    seed: Annotated[int, typer.Option(metavar="N", help="Of prompt splits and random draws.")] = 0,
    device: options.Device = "cpu",
    stream: options.Stream = False,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Score every unit of every expert: which modules carry which skill."""
    console.set_up(verbose=verbose)
    experts = options.expert_names(options.named("--expert", expert))
    capabilities = options.named("--capability", capability, form="NAME=SPEC")
    readouts = options.all_of("--readout", readout, READOUTS)
    kinds = options.all_of("--kind", kind or KINDS, KINDS)
    from wpmerge import readings, scoring, summaries

    settings = readings.ScoreSettings(
        readouts=readouts,
        prompts=prompts,
        held_out=held_out,
        reference_tokens=reference_tokens,
        top=top_k,
        sample=random_sample,
        verify_prompts=verify_prompts,
        kinds=kinds,
        cross=cross,
        integrated_points=integrated_points,
        layer=layer,
        accept_anchor=accept_anchor,
        tokens_per_row=tokens_per_row,
        seed=seed,
    )
    with console.reporting() as report:
        scores = scoring.score(
            base=base,
            experts=experts,
            capabilities=capabilities,
            out=out,
            settings=settings,
            device=options.device(device),
            resident=not stream,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=report,
        )
    summary = {"out": str(out), **summaries.scores_summary(scores)}
    console.show(summary, summaries.scores_tables(summary), as_json=as_json)


@app.command()
def fuse(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="What wpmerge score wrote.")],
    out: Annotated[Path, typer.Option(metavar="MERGED", help="The directory to be made.")],
    rule: Annotated[
        str, typer.Option(metavar="RULE", help=f"How scores become coefficients: {', '.join(RULES)}.")
    ] = "scaled",
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
        float, typer.Option(metavar="RHO", help="Of select: share of all parameters that gets the full scale, 0 to 1.")
    ] = 0.2,
    floor: Annotated[
        float, typer.Option(metavar="F", help="Of select: what the rest gets, as a share of the scale, 0 to 1.")
    ] = 0.3,
    max_coefficient: Annotated[float, typer.Option(metavar="X", help="Largest coefficient, 0 to 10.")] = 1.5,
    evaluations: Annotated[
        int, typer.Option(metavar="N", min=1, help="Merges run on held-out prompts to choose the scales.")
    ] = 24,
    shard_size: options.ShardSize = "5GB",
    dtype: options.Dtype = None,
    threads: options.Threads = 1,
    device: options.Device = "cpu",
    stream: options.Stream = False,
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
    written_dtype = options.torch_dtype("--dtype", dtype)
    chosen_rule = options.one_of("--rule", rule, RULES)
    level = None if granularity is None else options.one_of("--granularity", granularity, GRANULARITIES)
    from wpmerge import fusing, summaries

    settings = fusing.FuseSettings(
        rule=chosen_rule,
        granularity=level,
        scales=scales,
        power=power,
        density=density,
        floor=floor,
        max_coefficient=max_coefficient,
        evaluations=evaluations,
    )
    with console.reporting() as report:
        result = fusing.fuse(
            scores,
            out,
            settings=settings,
            models=inputs,
            plan_only=plan_only,
            dtype=written_dtype,
            shard_bytes=shard_bytes,
            threads=threads,
            overwrite=overwrite,
            device=options.device(device),
            resident=not stream,
            trust_remote_code=trust_remote_code,
            progress=report,
        )
    summary = summaries.fuse_summary(result)
    console.show(summary, summaries.fuse_tables(summary), as_json=as_json)


@app.command()
def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yml", help="A mergekit recipe; mergekit is not used.")],
    out: Annotated[Path, typer.Option(metavar="MERGED", help="The directory to be made.")],
    shard_size: options.ShardSize = "5GB",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help=f"Of the written weights: {', '.join(options.DTYPES)}. Default: the recipe's, or the base's.",
        ),
    ] = None,
    threads: options.Threads = 1,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Carry out a mergekit recipe with the streaming engine, block by block."""
    console.set_up(verbose=verbose)
    shard_bytes = options.byte_size("--shard-size", shard_size)
    written_dtype = options.torch_dtype("--dtype", dtype)
    from wpmerge import summaries
    from wpmerge.merge import merge_recipe

    with console.reporting() as report:
        result = merge_recipe(
            recipe,
            out,
            shard_bytes=shard_bytes,
            dtype=written_dtype,
            threads=threads,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=lambda done, total: report("merging", done, total),
        )
    summary = summaries.merge_summary(result)
    console.show(summary, summaries.merge_tables(summary), as_json=as_json)


app.command("eval")(evaluate)


@app.command()
def inspect(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="Scores, a plan, an evaluation, or a checkpoint: directory or hub id.")
    ],
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Strongest units of each kind to show, of scores.")] = 5,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Say what lies in a directory, and what it holds."""
    console.set_up(verbose=verbose)
    from wpmerge import inspecting

    found = inspecting.inspect(path, top=top, trust_remote_code=trust_remote_code)
    console.show(found, inspecting.inspection_tables(found), as_json=as_json)


@app.command()
def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The directory to be made. Default: wpmerge-demo, or wpmerge-demo-2, …, here."
        ),
    ] = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Score, fuse and evaluate the small family that comes with the package."""
    console.set_up(verbose=verbose)
    from wpmerge.demo import run_demo

    with console.reporting() as report:
        result = run_demo(out, progress=report)
    summary = {
        "out": str(result.out),
        "scales": result.scales,
        "models": [dict(zip(result.header, row, strict=True)) for row in result.table],
        "seconds": round(result.seconds, 1),
    }
    scales = [[name, *(console.number(scale) for scale in row.values())] for name, row in result.scales.items()]
    title = f"share of replies that follow each instruction; {result.seconds:.0f} s; everything is in {result.out}"
    tables = [
        console.Table(title="scales", header=["merge", *result.instructions], rows=scales),
        console.Table(title=title, header=result.header, rows=result.table),
    ]
    console.show(summary, tables, as_json=as_json)
