"""``wpmerge merge`` and ``wpmerge verify``: recipes and plans → checkpoints, and whether one is what it says."""

from pathlib import Path
from typing import Annotated

import typer

from wpmerge import console, options

ENGINES = ("wpmerge", "mergekit")
VOCABULARIES = ("base", "largest")


def merge(
    recipe: Annotated[
        Path,
        typer.Argument(metavar="RECIPE", help="A mergekit recipe, or the directory of a plan that wpmerge fuse made."),
    ],
    out: Annotated[Path, typer.Option(metavar="MERGED", help="The directory to be made.")],
    engine: Annotated[
        str,
        typer.Option(metavar="ENGINE", help=f"What carries it out: {', '.join(ENGINES)}; mergekit takes any recipe."),
    ] = "wpmerge",
    parity: Annotated[
        str | None,
        typer.Option(
            metavar="mergekit",
            help="Compute task arithmetic in mergekit's own steps and dtype, to the bit. "
            "Default: float32, rounded once.",
        ),
    ] = None,
    vocab: Annotated[
        str | None,
        typer.Option(
            metavar="WHOSE",
            help=f"Where vocabularies differ in size, whose is taken: {', '.join(VOCABULARIES)}. Default: refuse.",
        ),
    ] = None,
    allow_nan: options.AllowNan = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of what DARE drops; a plan has its own.")] = 0,
    model: options.Inputs = None,
    shard_size: options.ShardSize = "5GB",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help=f"Of the written weights: {', '.join(options.DTYPES)}. Default: the recipe's, or the base's.",
        ),
    ] = None,
    threads: options.Threads = 2,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Carry out a mergekit recipe or a plan with the streaming engine, block by block."""
    console.set_up(verbose=verbose)
    shard_bytes = options.byte_size("--shard-size", shard_size)
    written_dtype = options.stored_dtype("--dtype", dtype)
    by = options.one_of("--engine", engine, ENGINES)
    alike = None if parity is None else options.one_of("--parity", parity, ("mergekit",))
    whose = None if vocab is None else options.one_of("--vocab", vocab, VOCABULARIES)
    places = options.named("--model", model or [])
    from wpmerge import merge_summaries
    from wpmerge.errors import RecipeError
    from wpmerge.merging import merge_plan, merge_recipe

    with console.reporting() as report:

        def tell(done: int, total: int) -> None:
            report("merging", done, total)

        if recipe.is_dir():
            if by != "wpmerge" or alike or seed:
                raise RecipeError(
                    "a plan is carried out as it is",
                    where=recipe,
                    got="--engine, --parity or --seed",
                    mend="leave the option out, or give the plan's recipe.yml",
                )
            result = merge_plan(
                recipe,
                out,
                models=places,
                shard_bytes=shard_bytes,
                dtype=written_dtype,
                threads=threads,
                overwrite=overwrite,
                allow_nan=allow_nan,
                vocab=whose,
                trust_remote_code=trust_remote_code,
                progress=tell,
            )
        else:
            if places:
                raise RecipeError("a recipe names its models itself", where=recipe, got="--model")
            result = merge_recipe(
                recipe,
                out,
                shard_bytes=shard_bytes,
                dtype=written_dtype,
                threads=threads,
                overwrite=overwrite,
                allow_nan=allow_nan,
                vocab=whose,
                seed=seed,
                parity=alike,
                engine=by,
                trust_remote_code=trust_remote_code,
                progress=tell,
            )
    summary = merge_summaries.merge_summary(result)
    console.show(summary, merge_summaries.merge_tables(summary), as_json=as_json)


def verify(
    merged: Annotated[Path, typer.Argument(metavar="MERGED", help="A checkpoint that wpmerge merge or fuse made.")],
    sample: Annotated[int, typer.Option(metavar="N", min=1, help="Tensors to recompute, drawn at random.")] = 16,
    everything: Annotated[bool, typer.Option("--all", help="Recompute every tensor. Default: off.")] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the draw.")] = 0,
    inputs: options.Inputs = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Make tensors of a merge again from its inputs, and compare them with what is stored and recorded.

    Ends with exit code 1 where something is wrong.
    """
    console.set_up(verbose=verbose)
    places = options.named("--model", inputs or [])
    from wpmerge import merge_summaries
    from wpmerge import verify as verifying

    with console.reporting() as report:
        found = verifying.verify(
            merged,
            models=places,
            sample=None if everything else sample,
            seed=seed,
            trust_remote_code=trust_remote_code,
            progress=lambda done, total: report("verifying", done, total),
        )
    summary = merge_summaries.verification_summary(merged, found)
    console.show(summary, merge_summaries.verification_tables(summary), as_json=as_json)
    if not found.passed:
        raise typer.Exit(1)
