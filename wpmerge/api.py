"""The commands as functions: ``import wpmerge as wp``, then ``wp.score``, ``wp.fuse``, ``wp.merge``, ``wp.evaluate``.

Names and defaults are those of the command line, with mappings in place of ``NAME=VALUE``; docs/python.md has an
example. Errors that a user can mend are :class:`~wpmerge.errors.WpmergeError`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from wpmerge import options
from wpmerge.arch import COARSE_KINDS, KINDS
from wpmerge.checkers import read_checkers
from wpmerge.coefficients import RULES
from wpmerge.console import Report, say
from wpmerge.errors import WpmergeError
from wpmerge.estimators import EstimatorName
from wpmerge.evaluating import evaluate as run_evaluation
from wpmerge.evaluation import Evaluation, Skill
from wpmerge.fusing import FuseResult, FuseSettings
from wpmerge.fusing import fuse as run_fusion
from wpmerge.harness import HarnessSettings
from wpmerge.inmemory import models_to_evaluate
from wpmerge.merging import MergeSummary, merge_plan, merge_recipe
from wpmerge.plan import Granularity, Operator
from wpmerge.readings import ScoreSettings
from wpmerge.scores import DIRECTIONS, AskedReadout, Scores
from wpmerge.scoring import score as run_scoring

Place = str | Path
METHODS = ("task_arithmetic", "ties", "dare_linear", "dare_ties")


def score(
    *,
    base: Place,
    expert: Mapping[str, Place],
    capability: Mapping[str, Place],
    out: Place,
    retain: Mapping[str, Place] | None = None,
    readout: Sequence[str] = ("reference", "anchor"),
    prompts: int = 32,
    held_out: int = 16,
    reference_tokens: int = 96,
    top_k: int = 32,
    random_sample: int = 64,
    verify_prompts: int = 4,
    kind: Sequence[str] | None = None,
    cross: bool = True,
    estimator: Sequence[str] = ("linear",),
    direction: Sequence[str] = ("sufficiency",),
    integrated_points: int = 4,
    layer: int | None = None,
    accept_anchor: bool = False,
    tokens_per_row: int = 384,
    seed: int = 0,
    vocab: str | None = None,
    device: str = "cpu",
    stream: bool = False,
    max_memory: str | int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Report | None = None,
) -> Scores:
    """Score every unit of every expert: which modules carry which skill. As ``wpmerge score``.

    Args:
        base: a directory, or a hub id.
        expert: name → directory, hub id or LoRA adapter.
        capability: an expert's name → what it is good at: a built-in name, several joined by "+", or a JSONL file.
        out: the directory to be made.
        retain: name → prompts on which a merge must stay what the base is.
        readout: what is read; the first decides coefficients.
        prompts: per capability, to score on.
        held_out: more prompts per capability, to choose coefficients on.
        reference_tokens: longest reference, tokens.
        top_k: strongest units of each kind to verify by exact patching.
        random_sample: random others of each kind to verify.
        verify_prompts: prompts per capability to verify on.
        kind: kinds of unit; None for all that are not coarse.
        cross: score every expert on every capability, not on its own only.
        estimator: how every unit's score is found; ``linear`` always is one way.
        direction: ``sufficiency``, always, and ``necessity``.
        integrated_points: points of the integrated estimator.
        layer: to read every anchor after; None chooses it by reliability.
        accept_anchor: go on with an anchor or a gap that is not reliable.
        tokens_per_row: tokens packed into one row.
        seed: of prompt splits and random draws.
        vocab: ``base`` cuts an expert whose vocabulary is larger to the base's rows; None refuses it.
        device: where models run, as torch names it.
        stream: read each layer from disk when it runs.
        max_memory: memory to plan for, bytes or such as "4GB"; None for no limit.
        overwrite: replace scores that are already there, once the new ones are whole.
        trust_remote_code: accept checkpoints that bring code of their own.
        progress: called with what is being done, units of it done, and units in all.

    Returns:
        The scores; they are in ``out`` too, where :func:`fuse` finds them.

    Raises:
        WpmergeError: an input, capability, anchor or output cannot be used; nothing is written under ``out`` then.

    >>> import wpmerge as wp
    >>> wp.score(base="nowhere", expert={"maths": "m"}, capability={"maths": "sums.jsonl"}, out="scores")
    Traceback (most recent call last):
    wpmerge.errors.CapabilityError: the capability file cannot be read
      where: sums.jsonl
      ...
    """
    options.check_counts(
        prompts=prompts,
        held_out=held_out,
        reference_tokens=reference_tokens,
        top_k=top_k,
        random_sample=random_sample,
        verify_prompts=verify_prompts,
        integrated_points=integrated_points,
        layer=layer,
        tokens_per_row=tokens_per_row,
    )
    settings = ScoreSettings(
        readouts=options.all_of("readout", readout, get_args(AskedReadout)),
        prompts=prompts,
        held_out=held_out,
        reference_tokens=reference_tokens,
        top=top_k,
        sample=random_sample,
        verify_prompts=verify_prompts,
        kinds=options.all_of("kind", kind or KINDS, (*KINDS, *COARSE_KINDS)),
        cross=cross,
        estimators=options.all_of("estimator", ["linear", *estimator], get_args(EstimatorName)),
        directions=options.all_of("direction", ["sufficiency", *direction], DIRECTIONS),
        max_memory=None if max_memory is None else _size("max_memory", max_memory),
        integrated_points=integrated_points,
        layer=layer,
        accept_anchor=accept_anchor,
        tokens_per_row=tokens_per_row,
        seed=seed,
        vocab=None if vocab is None else options.one_of("vocab", vocab, ("base",)),
    )
    return run_scoring(
        base=str(base),
        experts=_texts(expert),
        capabilities=_texts(capability),
        retain=_texts(retain),
        out=Path(out),
        settings=settings,
        device=options.device(device),
        resident=not stream,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )


def fuse(
    scores: Place,
    *,
    out: Place,
    rule: str = "refine",
    granularity: str | None = None,
    scale: float | Mapping[str, float] | None = None,
    plan_only: bool = False,
    model: Mapping[str, Place] | None = None,
    power: float = 0.5,
    density: float = 0.2,
    floor: float = 0.3,
    max_coefficient: float = 1.5,
    mu: float = 1.0,
    steps: int = 16,
    batch: int = 8,
    ridge: float = 0.0,
    calibrate: bool = False,
    tolerance: float = 0.02,
    evaluations: int = 24,
    seed: int = 0,
    explain: Sequence[str] | None = None,
    method: str = "task_arithmetic",
    method_density: float = 1.0,
    exact_recipe: Place | None = None,
    allow_nan: bool = False,
    shard_size: str | int = "5GB",
    dtype: str | None = None,
    threads: int = 2,
    device: str = "cpu",
    stream: bool = False,
    max_memory: str | int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Report | None = None,
) -> FuseResult:
    """Turn scores into coefficients, a plan, a mergekit recipe and a merged checkpoint. As ``wpmerge fuse``.

    Args:
        scores: the directory that :func:`score` made.
        out: the directory to be made.
        rule: how scores become coefficients: refine, scaled, uniform, proportional, select, joint.
        granularity: what shares a coefficient: unit, block, tensor, expert. None takes expert for uniform and scaled,
            unit for the others.
        scale: every expert's scale, or each one's by name; None chooses on held-out prompts.
        plan_only: write plan and recipe, and stop before the weights.
        model: where inputs live now, by name, "base" for the base; None where they were.
        power: of proportional: exponent of the recovery, 0 to 4.
        density: of select: share of scored parameters that get the full scale, 0 to 1.
        floor: of select: what the rest gets, as a share of the scale, 0 to 1.
        max_coefficient: largest coefficient, 0 to 10.
        mu: of joint: what leaving the scales costs.
        steps: of refine, each a forward and backward run over its prompts.
        batch: of refine: prompts per capability and step.
        ridge: of refine: pull back to the start at each step, as a share, 0 to 1.
        calibrate: choose the rule's own numbers on held-out prompts too.
        tolerance: what a merge may lose on a retain set, nats per token below the base, a standard error included.
        evaluations: merges run on held-out prompts to choose the numbers.
        seed: of refine's draws of prompts, and of what dare drops.
        explain: units, tensors or blocks whose coefficients are explained in a sentence.
        method: what combines the weighted task vectors: task_arithmetic, ties, dare_linear, dare_ties.
        method_density: of ties and dare: the share of a task vector that is kept, 0 to 1.
        exact_recipe: a directory to be made with a recipe that reproduces the merge in stock mergekit.
        allow_nan: let numbers pass that are not finite.
        shard_size: most weights per file, bytes or such as "5GB".
        dtype: of the written weights; None keeps each tensor's in the base.
        threads: blocks merged at a time, a thread each.
        device: where models run, as torch names it.
        stream: read each layer from disk when it runs.
        max_memory: memory to plan for, bytes or such as "4GB"; None for no limit.
        overwrite: replace an output of wpmerge that is already there, once the new is whole.
        trust_remote_code: accept checkpoints that bring code of their own.
        progress: called with what is being done, units of it done, and units in all.

    Raises:
        WpmergeError: scores, models, settings or output cannot be used; nothing is written under ``out`` then.
    """
    options.check_counts(steps=steps, batch=batch, evaluations=evaluations, threads=threads)
    settings, operator = fuse_settings(
        rule=rule,
        granularity=granularity,
        scale=scale,
        power=power,
        density=density,
        floor=floor,
        mu=mu,
        steps=steps,
        batch=batch,
        ridge=ridge,
        calibrate=calibrate,
        tolerance=tolerance,
        max_coefficient=max_coefficient,
        max_memory=None if max_memory is None else _size("max_memory", max_memory),
        evaluations=evaluations,
        seed=seed,
        method=method,
        method_density=method_density,
    )
    return run_fusion(
        Path(scores),
        Path(out),
        settings=settings,
        models=_texts(model),
        explanations=tuple(explain or ()),
        operator=operator,
        plan_only=plan_only,
        exact_recipe=None if exact_recipe is None else Path(exact_recipe),
        allow_nan=allow_nan,
        dtype=options.stored_dtype("dtype", dtype),
        shard_bytes=_size("shard_size", shard_size),
        threads=threads,
        overwrite=overwrite,
        device=options.device(device),
        resident=not stream,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )


def fuse_settings(
    *,
    rule: str,
    granularity: str | None,
    scale: float | Mapping[str, float] | None,
    seed: int,
    method: str,
    method_density: float,
    **numbers: Any,
) -> tuple[FuseSettings, Operator]:
    """What :func:`fuse` is asked for, checked; ``numbers`` are further fields of ``FuseSettings``.

    Raises:
        RecipeError: a value that there is none of, or a number out of its range.
    """
    levels = get_args(Granularity)
    settings = FuseSettings(
        rule=options.one_of("rule", rule, RULES),
        granularity=None if granularity is None else options.one_of("granularity", granularity, levels),
        scales={} if scale is None else dict(scale) if isinstance(scale, Mapping) else {"": float(scale)},
        seed=seed,
        **numbers,
    )
    _ = settings.rule_settings, settings.refine_settings  # these know the ranges of their numbers
    return settings, Operator(method=options.one_of("method", method, METHODS), density=method_density, seed=seed)


def merge(
    recipe: Place,
    *,
    out: Place,
    engine: str = "wpmerge",
    parity: str | None = None,
    vocab: str | None = None,
    allow_nan: bool = False,
    seed: int = 0,
    model: Mapping[str, Place] | None = None,
    shard_size: str | int = "5GB",
    dtype: str | None = None,
    threads: int = 2,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Report | None = None,
) -> MergeSummary:
    """Carry out a mergekit recipe, or a plan that :func:`fuse` made. As ``wpmerge merge``.

    Args:
        recipe: a mergekit recipe's file, or a plan's directory.
        out: the directory to be made.
        engine: what carries a recipe out: wpmerge or mergekit.
        parity: ``mergekit`` computes task arithmetic in mergekit's own steps and dtype, to the bit.
        vocab: whose vocabulary is taken where they differ in size: base or largest. None refuses.
        allow_nan: let numbers pass that are not finite.
        seed: of what DARE drops; a plan has its own.
        model: of a plan: where inputs live now, by name, "base" for the base; None where they were.
        shard_size: most weights per file, bytes or such as "5GB".
        dtype: of the written weights; None takes the recipe's, or the base's.
        threads: blocks merged at a time, a thread each.
        overwrite: replace an output of wpmerge that is already there, once the new is whole.
        trust_remote_code: accept checkpoints that bring code of their own.
        progress: called with what is being done, units of it done, and units in all.

    Raises:
        WpmergeError: recipe, plan, models or output cannot be used; nothing is written under ``out`` then.
    """
    options.check_counts(threads=threads)
    path, places = Path(recipe), _texts(model)
    whose = None if vocab is None else options.one_of("vocab", vocab, ("base", "largest"))
    by = options.one_of("engine", engine, ("wpmerge", "mergekit"))
    common: dict[str, Any] = {
        "shard_bytes": _size("shard_size", shard_size),
        "dtype": options.stored_dtype("dtype", dtype),
        "threads": threads,
        "overwrite": overwrite,
        "allow_nan": allow_nan,
        "vocab": whose,
        "trust_remote_code": trust_remote_code,
        "progress": None if progress is None else lambda done, total: progress("merging", done, total),
    }
    if path.is_dir():
        if by != "wpmerge" or parity or seed:
            raise WpmergeError("a plan is carried out as it is", where=path, got="engine, parity or seed")
        return merge_plan(path, Path(out), models=places, **common)
    if places:
        raise WpmergeError("a recipe names its models itself", where=path, got="model")
    alike = None if parity is None else options.one_of("parity", parity, ("mergekit",))
    return merge_recipe(path, Path(out), seed=seed, parity=alike, engine=by, **common)


def evaluate(
    model: Mapping[str, Place] | None = None,
    *,
    out: Place | None,
    plan: Mapping[str, Place] | None = None,
    inputs: Mapping[str, Place] | None = None,
    tasks: Sequence[str] = ("ifeval",),
    task_data: Mapping[str, Place | Mapping[str, Place]] | None = None,
    checkers: Place | Sequence[Place] | None = None,
    base: str | None = None,
    reference: str | None = None,
    skill: Mapping[str, str] | None = None,
    backend: str = "hf",
    model_arg: Mapping[str, Any] | None = None,
    batch_size: int | str = 16,
    max_gen_tokens: int | None = None,
    limit: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    chat_template: bool | None = None,
    seed: int | None = None,
    confirm_unsafe_code: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Report | None = None,
) -> Evaluation:
    """Evaluate models and plans on the same tasks with lm-eval. As ``wpmerge eval``.

    Args:
        model: name → directory, hub id, or LoRA adapter on ``base``.
        out: the directory to be made; None writes nothing.
        plan: name → a plan's directory; merged in memory and not written.
        inputs: where the plans' inputs live now, by name, "base" for the base; the command's ``--model``.
        tasks: lm-eval tasks, local tasks of ``task_data``, or a preset: ifeval, instruct, full.
        task_data: task → its local documents, JSONL, or a file for each split.
        checkers: Python files with checkers of instructions that IFEval does not have, in ``INSTRUCTION_DICT``, such as
            IFBench's instructions_registry.py; their code is run.
        base: which model is the base of retention and of adapters; None takes ``reference``.
        reference: the model that differences are taken to; None takes ``base``.
        skill: an expert's name → its metric, for retention.
        backend: lm-eval's model class; hf runs transformers.
        model_arg: arguments of the backend.
        batch_size: prompts run together, or "auto".
        max_gen_tokens: longest response, tokens; None takes each task's own.
        limit: first documents of each task; None for all.
        device: where models run; None takes cuda where there is a GPU, else cpu.
        dtype: of the weights while they run; "auto" is the checkpoint's.
        chat_template: put prompts through the tokenizer's chat template; None where it has one.
        seed: of everything that lm-eval draws, in [0, 2³²); None is lm-eval's own.
        confirm_unsafe_code: let tasks run code that a model wrote, on this machine.
        overwrite: replace an evaluation that is already there.
        trust_remote_code: accept checkpoints that bring code of their own.
        progress: called with the model's name, finished requests, and all requests.

    Raises:
        WpmergeError: a model, task or output cannot be used; nothing is written under ``out`` then.
    """
    options.check_counts(max_gen_tokens=max_gen_tokens, limit=limit)
    models, plans, skills = _texts(model), _texts(plan), dict(skill or {})
    if unknown := [name for name in skills if name not in models and name not in plans]:
        raise WpmergeError("skill names no evaluated model", got=unknown[0], expected=", ".join(models))
    if skills and not (base or reference):
        raise WpmergeError("skill asks for retention, and no model is the base", mend="give base")
    settings = HarnessSettings(
        backend=backend,
        model_args={**(model_arg or {}), **({"trust_remote_code": True} if trust_remote_code else {})},
        batch_size=options.batch_size(str(batch_size)),
        max_gen_tokens=max_gen_tokens,
        limit=limit,
        device=None if device is None else options.device(device),
        dtype=options.one_of("dtype", dtype, ("auto", *options.DTYPES)),
        chat_template=chat_template,
        seed=seed,
        unsafe_code=confirm_unsafe_code,
    )
    files = [checkers] if isinstance(checkers, str | Path) else checkers or ()
    judges = read_checkers([Path(each) for each in files])
    found = models_to_evaluate(
        models,
        plans,
        base=base or reference,
        inputs=_texts(inputs),
        settings=settings,
        trust_remote_code=trust_remote_code,
    )
    return run_evaluation(
        found,
        out=None if out is None else Path(out),
        tasks=task_names(tasks),
        task_data=task_files(task_data or {}),
        checkers=judges,
        reference=reference,
        base=base,
        skills={name: Skill(expert=name, metric=metric) for name, metric in skills.items()},
        settings=settings,
        overwrite=overwrite,
        progress=progress,
        say=say,
    )


def task_names(tasks: Sequence[str]) -> tuple[str, ...]:
    """Tasks one by one; a text may hold several, with commas between."""
    return tuple(part for task in tasks for part in task.split(",") if part)


def task_files(task_data: Mapping[str, Place | Mapping[str, Place]]) -> dict[str, Path | dict[str, Path]]:
    """Task → its file, or a file per split."""
    return {
        task: {split: Path(file) for split, file in files.items()} if isinstance(files, Mapping) else Path(files)
        for task, files in task_data.items()
    }


def _texts(places: Mapping[str, Place] | None) -> dict[str, str]:
    return {name: str(place) for name, place in (places or {}).items()}


def _size(option: str, value: str | int) -> int:
    return options.byte_size(option, str(value))
