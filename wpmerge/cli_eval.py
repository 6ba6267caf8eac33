"""``wpmerge eval``: models and plans on the same tasks."""

from pathlib import Path
from typing import Annotated

import typer

from wpmerge import console, options
from wpmerge.errors import WpmergeError


def evaluate(
    out: Annotated[Path, typer.Option(metavar="EVAL", help="The directory to be made.")],
    model: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]PATH...",
            help="Models: directories, hub ids, or LoRA adapters on --base. A bare path's name is its last part.",
        ),
    ] = None,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PLAN", help="A plan, merged in memory and not written. Repeat for more. Default: none."
        ),
    ] = None,
    inputs: options.Inputs = None,
    tasks: Annotated[
        list[str],
        typer.Option(
            metavar="TASK",
            help="lm-eval tasks, local tasks of --task-data, or a preset: ifeval, instruct, full. "
            "Repeat, or part with commas.",
        ),
    ] = ["ifeval"],  # noqa: B006 - typer reads it, nothing changes it
    task_data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK[:SPLIT]=FILE",
            help="Local documents of a task, JSONL. Repeat for more. Default: the task's data set on the hub.",
        ),
    ] = None,
    checkers: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A Python file with checkers of instructions that IFEval does not have, in INSTRUCTION_DICT, such as "
            "IFBench's instructions_registry.py. Its code is run, on this machine. Repeat for more. Default: none.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Which model is the base of retention and of adapters. Default: --reference's."
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model differences are taken to. Default: --base's.")
    ] = None,
    skill: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=METRIC",
            help="The metric that the model NAME is the expert of, for retention. Repeat for more. Default: none.",
        ),
    ] = None,
    backend: Annotated[str, typer.Option(metavar="NAME", help="lm-eval's model class; hf runs transformers.")] = "hf",
    model_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An argument of the backend. Repeat for more. Default: none."),
    ] = None,
    batch_size: Annotated[str, typer.Option(metavar="N", help="Prompts run together, or auto.")] = "16",
    max_gen_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=options.LEAST["max_gen_tokens"], help="Longest response, tokens. Default: each task's own."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=options.LEAST["limit"], help="First documents of each task. Default: all."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE", help="Where models run, as torch names it. Default: cuda where there is a GPU, else cpu."
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help=f"Of the weights while they run: auto (the checkpoint's), {', '.join(options.DTYPES)}.",
        ),
    ] = "auto",
    chat_template: Annotated[
        bool | None,
        typer.Option(
            "--chat-template/--no-chat-template",
            help="Put prompts through the tokenizer's chat template, or not. Default: where it has one.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Of everything that lm-eval draws. Default: lm-eval's own.")
    ] = None,
    confirm_unsafe_code: options.ConfirmUnsafeCode = False,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Evaluate models and plans on the same tasks with lm-eval."""
    console.set_up(verbose=verbose)
    models = options.models_by_name(model or [], what="a model")
    plans = options.models_by_name(plan or [], what="--plan")
    skills = options.skills(skill or [], {**models, **plans})
    if skills and not (base or reference):
        raise WpmergeError("--skill asks for retention, and no model is the base", mend="name it with --base NAME")
    arguments = options.keyed_values("--model-arg", model_arg or [])
    size = options.batch_size(batch_size)
    options.one_of("--dtype", dtype, ("auto", *options.DTYPES))
    data = options.task_data(task_data or [])
    places = options.named("--model", inputs or [])
    from wpmerge import api, summaries

    with console.reporting() as report:
        result = api.evaluate(
            models,
            out=out,
            plan=plans,
            inputs=places,
            tasks=tasks,
            task_data=data,
            checkers=checkers,
            base=base,
            reference=reference,
            skill=skills,
            backend=backend,
            model_arg=arguments,
            batch_size=size,
            max_gen_tokens=max_gen_tokens,
            limit=limit,
            device=device,
            dtype=dtype,
            chat_template=chat_template,
            seed=seed,
            confirm_unsafe_code=confirm_unsafe_code,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=lambda name, done, total: report(f"evaluating {name}", done, total),
        )
    summary = {"out": str(out), **summaries.evaluation_summary(result)}
    console.show(summary, summaries.evaluation_tables(summary), as_json=as_json)
