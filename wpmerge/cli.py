"""The commands: options to functions, results to stdout. Nothing heavy is imported before a command runs."""

import atexit
import gc
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from wpmerge import console, options
from wpmerge.cli_bench import bench
from wpmerge.cli_eval import evaluate
from wpmerge.cli_fuse import fuse
from wpmerge.cli_merge import merge, verify
from wpmerge.cli_prove import prove
from wpmerge.cli_questions import questions
from wpmerge.cli_report import report
from wpmerge.cli_run import run
from wpmerge.errors import WpmergeError, ran_out_of_memory, reason_of

READOUTS = ("reference", "anchor", "divergence", "auto")
KINDS = ("head", "neuron", "kv_group", "norm", "output_bias", "embedding", "positions", "final_norm", "lm_head")
COARSE_KINDS = ("attention", "mlp", "layer", "tensor")
ESTIMATORS = ("linear", "integrated", "exact")
DIRECTIONS = ("sufficiency", "necessity")
VOCABULARIES = ("base",)


def _no_memory(error: Exception) -> WpmergeError:
    return WpmergeError(
        "memory ran out",
        got=reason_of(error),
        mend="a smaller --max-memory or --batch-size, --stream, or another --device, as far as the command has them; "
        "it goes on from the pieces that are finished",
    )


class _Commands(TyperGroup):
    """The one place where errors that a user can mend, and interrupts, become messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except WpmergeError as error:
            console.say(f"error: {error}")
            raise typer.Exit(2) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            console.say(f"error: {_no_memory(error)}")
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
    # What importing torch makes lives to the end: collecting among it, then and at exit, takes a quarter of the start.
    gc.set_threshold(50_000, 20, 100)
    atexit.register(gc.freeze)
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
    retain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SPEC",
            help="Prompts on which a merge must stay what the base is, as for --capability; no expert has them. "
            "Repeat for more. Default: none.",
        ),
    ] = None,
    readout: Annotated[
        list[str],
        typer.Option(
            metavar="READOUT",
            help=f"What is read: {', '.join(READOUTS)}. Repeat for more; the first decides coefficients. auto: the "
            "one whose scores best foretell the behaviour on other prompts, for each capability.",
        ),
    ] = ["reference", "anchor"],  # noqa: B006 - typer reads it, nothing changes it
    prompts: Annotated[
        int, typer.Option(metavar="N", min=options.LEAST["prompts"], help="Prompts per capability to score on.")
    ] = 32,
    held_out: Annotated[
        int,
        typer.Option(
            metavar="N", min=options.LEAST["held_out"], help="More prompts per capability, to choose scales on."
        ),
    ] = 16,
    reference_tokens: Annotated[
        int, typer.Option(metavar="N", min=options.LEAST["reference_tokens"], help="Longest reference, tokens.")
    ] = 96,
    top_k: Annotated[
        int,
        typer.Option(
            metavar="N", min=options.LEAST["top_k"], help="Strongest units of each kind to verify by exact patching."
        ),
    ] = 32,
    random_sample: Annotated[
        int,
        typer.Option(
            metavar="N", min=options.LEAST["random_sample"], help="Random other units of each kind to verify."
        ),
    ] = 64,
    verify_prompts: Annotated[
        int, typer.Option(metavar="N", min=options.LEAST["verify_prompts"], help="Prompts per capability to verify on.")
    ] = 4,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help=f"Kind of unit to score: {', '.join(KINDS)}, or coarse: {', '.join(COARSE_KINDS)}. "
            "Repeat for more. Default: all that are not coarse.",
        ),
    ] = None,
    cross: Annotated[
        bool, typer.Option("--cross/--no-cross", help="Score every expert on every capability, or on its own only.")
    ] = True,
    estimator: Annotated[
        list[str],
        typer.Option(
            metavar="ESTIMATOR",
            help=f"How every unit's score is found: {', '.join(ESTIMATORS)}. Repeat for more; linear always is one.",
        ),
    ] = ["linear"],  # noqa: B006 - typer reads it, nothing changes it
    direction: Annotated[
        list[str],
        typer.Option(
            metavar="DIRECTION",
            help="sufficiency: the base with a unit from the expert, always; necessity: also the expert with it from "
            "the base.",
        ),
    ] = ["sufficiency"],  # noqa: B006
    integrated_points: Annotated[
        int,
        typer.Option(metavar="N", min=options.LEAST["integrated_points"], help="Points of the integrated estimator."),
    ] = 4,
    layer: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=options.LEAST["layer"],
            help="Layer to read every anchor after, from 0. Default: chosen by reliability.",
        ),
    ] = None,
    accept_anchor: Annotated[
        bool, typer.Option("--accept-anchor", help="Go on with an anchor or a gap that is not reliable. Default: off.")
    ] = False,
    tokens_per_row: Annotated[
        int,
        typer.Option(metavar="N", min=options.LEAST["tokens_per_row"], help="Tokens packed into one row; sets memory."),
    ] = 384,
    seed: Annotated[int, typer.Option(metavar="N", help="Of prompt splits and random draws.")] = 0,
    vocab: Annotated[
        str | None,
        typer.Option(
            metavar="WHOSE",
            help="base: cut an expert whose vocabulary is larger, by a pad token say, to the base's rows. "
            "Default: refuse it.",
        ),
    ] = None,
    device: options.Device = "cpu",
    stream: options.Stream = False,
    max_memory: options.MaxMemory = None,
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
    retained = options.named("--retain", retain or [], form="NAME=SPEC")
    kinds = options.all_of("--kind", kind or KINDS, (*KINDS, *COARSE_KINDS))
    estimators = options.all_of("--estimator", ["linear", *estimator], ESTIMATORS)
    directions = options.all_of("--direction", ["sufficiency", *direction], DIRECTIONS)
    whose = None if vocab is None else options.one_of("--vocab", vocab, VOCABULARIES)
    memory = None if max_memory is None else options.byte_size("--max-memory", max_memory)
    from wpmerge import api, summaries

    with console.reporting() as report:
        scores = api.score(
            base=base,
            expert=experts,
            capability=capabilities,
            out=out,
            retain=retained,
            readout=readouts,
            prompts=prompts,
            held_out=held_out,
            reference_tokens=reference_tokens,
            top_k=top_k,
            random_sample=random_sample,
            verify_prompts=verify_prompts,
            kind=kinds,
            cross=cross,
            estimator=estimators,
            direction=directions,
            integrated_points=integrated_points,
            layer=layer,
            accept_anchor=accept_anchor,
            tokens_per_row=tokens_per_row,
            seed=seed,
            vocab=whose,
            device=device,
            stream=stream,
            max_memory=memory,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=report,
        )
    summary = {"out": str(out), **summaries.scores_summary(scores)}
    console.show(summary, summaries.scores_tables(summary), as_json=as_json)


app.command("fuse")(fuse)
app.command("merge")(merge)
app.command("verify")(verify)
app.command("eval")(evaluate)
app.command("bench")(bench)
app.command("prove")(prove)
app.command("report")(report)
app.command("run")(run)
app.command("questions")(questions)


@app.command()
def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="Scores, a plan, a proof, an evaluation, or a checkpoint: directory or hub id."
        ),
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
    from wpmerge.demo import REPORT, run_demo

    with console.reporting() as report:
        result = run_demo(out, progress=report)
    summary = {
        "out": str(result.out),
        "report": str(result.out / REPORT),
        "scales": result.scales,
        "models": [dict(zip(result.header, row, strict=True)) for row in result.table],
        "seconds": round(result.seconds, 1),
    }
    scales = [[name, *(console.number(scale) for scale in row.values())] for name, row in result.scales.items()]
    title = f"share of replies that follow each instruction; {result.seconds:.0f} s; everything is in {result.out}, "
    title += f"and {result.out / REPORT} shows it"
    tables = [
        console.Table(title="scales", header=["merge", *result.instructions], rows=scales),
        console.Table(title=title, header=result.header, rows=result.table),
    ]
    console.show(summary, tables, as_json=as_json)
