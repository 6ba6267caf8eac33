"""Plan or recipe -> merged checkpoint, streamed block by block into a directory that appears only when it is whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxtyping import Shaped

import wpmerge
from wpmerge.card import model_card, plan_summary
from wpmerge.checkpoint import Checkpoint, check_same_family, open_checkpoint
from wpmerge.dtypes import Dtype
from wpmerge.errors import RecipeError
from wpmerge.handover import merge_with_mergekit
from wpmerge.jobs import Factor, Job, Term
from wpmerge.output import check_output, write_file
from wpmerge.plan import BASE, Coefficient, Plan, check_plan, load_plan
from wpmerge.recipe import recipe_text
from wpmerge.recipe_jobs import RecipeJobs, recipe_jobs, tensor_seed
from wpmerge.shards import OutputTensor
from wpmerge.streaming import Progress, job_dtype, merge_tensor
from wpmerge.vocabulary import Vocabulary, match_vocabulary
from wpmerge.writing import MergeSummary, Writing, write_model
from wpmerge.yaml_recipe import YamlRecipe, read_yaml_recipe

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "SHARD_BYTES",
    "MergeSummary",
    "check_inputs",
    "merge",
    "merge_recipe",
    "merged_state_dict",
    "merged_tensor",
    "open_inputs",
    "open_recipe",
    "plan_jobs",
]

SHARD_BYTES = 5 * 10**9


def open_inputs(
    plan: Plan, models: Mapping[str, str | Path] | None = None, *, trust_remote_code: bool = False
) -> dict[str, Checkpoint]:
    """Open a plan's base, under ``base``, and its experts, under their names, where they live now.

    Args:
        plan: names the inputs.
        models: other places, by name (``base`` for the base).
        trust_remote_code: see :func:`~wpmerge.checkpoint.open_checkpoint`.

    Raises:
        RecipeError: a name that the plan does not have.
        CheckpointError: an input cannot be opened.
    """
    models = models or {}
    if unknown := sorted(set(models) - {BASE, *plan.experts}):
        raise RecipeError("the plan has no such model", got=unknown[0], expected=[BASE, *plan.experts])
    base = open_checkpoint(models.get(BASE, plan.base.source), trust_remote_code=trust_remote_code)
    return {BASE: base} | {
        name: open_checkpoint(models.get(name, expert.source), base=base, trust_remote_code=trust_remote_code)
        for name, expert in plan.experts.items()
    }


def check_inputs(plan: Plan, checkpoints: Mapping[str, Checkpoint]) -> None:
    """Refuse checkpoints that are not those the plan was made from, or not of one family.

    Raises:
        CheckpointError: an expert does not fit the base.
        RecipeError: a coefficient does not fit, or another checkpoint is meant.
    """
    base = checkpoints[BASE]
    for name in plan.experts:
        check_same_family(base, checkpoints[name], name=name)
    check_plan(plan, base)
    for name, model in {BASE: plan.base, **plan.experts}.items():
        if (found := checkpoints[name].content_hash()) != model.content_hash:
            raise RecipeError(
                f"{name} is not the checkpoint that the plan was made from",
                where=checkpoints[name].path,
                got=found,
                expected=model.content_hash,
                mend="give the original, or score and fuse again",
            )


def plan_jobs(plan: Plan, checkpoints: Mapping[str, Checkpoint], *, dtype: Dtype | None = None) -> list[Job]:
    """How each tensor of the output is made. Integers and booleans are the base's.

    Args:
        plan: fits the checkpoints.
        checkpoints: the base under ``base``, each expert under its name.
        dtype: of the output; None keeps that of each of the base's tensors.
    """
    base, jobs, operator = checkpoints[BASE], [], plan.operator
    for name, info in base.tensors.items():
        terms = tuple(
            Term(
                checkpoint=checkpoints[expert],
                tensor=name,
                coefficient=_factor(plan.coefficients[expert][name]),
                density=operator.density,
                seed=tensor_seed(operator.seed, i, name) if operator.method.startswith("dare") else 0,
            )
            for i, expert in enumerate(plan.experts)
            if info.dtype.is_floating_point
        )
        output = OutputTensor(name=name, shape=info.shape, dtype=job_dtype(info.dtype, dtype))
        jobs.append(
            Job(output=output, base=(base, name), terms=terms, method=operator.method, normalize=operator.normalize)
        )
    return jobs


def _factor(coefficient: Coefficient) -> Factor:
    return Factor(values=coefficient.values.numpy(), axis=coefficient.axis)


def merged_tensor(
    plan: Plan, checkpoints: Mapping[str, Checkpoint], name: str, *, dtype: Dtype | None = None
) -> Shaped[Tensor, "..."]:
    """One tensor of the merge in memory, bit for bit as :func:`merge` writes it."""
    jobs = {job.output.name: job for job in plan_jobs(plan, checkpoints, dtype=dtype)}
    return merge_tensor(jobs[name])


def merged_state_dict(
    plan: Plan, checkpoints: Mapping[str, Checkpoint], *, dtype: Dtype | None = None
) -> dict[str, Tensor]:
    """The whole merge in memory, bit for bit as :func:`merge` writes it. A tied head is left out, as on disk."""
    check_inputs(plan, checkpoints)
    return {job.output.name: merge_tensor(job) for job in plan_jobs(plan, checkpoints, dtype=dtype)}


def merge(
    plan: Plan,
    checkpoints: Mapping[str, Checkpoint],
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    dtype: Dtype | None = None,
    threads: int = 2,
    overwrite: bool = False,
    sync: bool = True,
    allow_nan: bool = False,
    vocab: Vocabulary | None = None,
    progress: Progress | None = None,
) -> MergeSummary:
    """Carry out a plan and write the merged checkpoint with plan, recipe, record and card.

    Args:
        plan: what to do.
        checkpoints: the base under ``base``, each expert under its name; see :func:`open_inputs`.
        out: the directory to be made.
        shard_bytes: most bytes of weights per file.
        dtype: of the output; None keeps that of each of the base's tensors.
        threads: blocks worked on at a time; the result is the same for any number.
        overwrite: replace an output that is already there, once the new one is whole.
        sync: bring the weights to disk before the directory takes its name.
        allow_nan: let values pass that are not finite.
        vocab: what to do where an expert's vocabulary is larger; see :func:`~wpmerge.vocabulary.match_vocabulary`.
        progress: called with bytes of weights written and in all.

    Raises:
        OutputError: the output cannot be written there; nothing was.
        CheckpointError: an input is damaged, not finite, or of another family.
        RecipeError: the plan does not fit its inputs.
    """
    check_output(out, inputs=[model.path for model in checkpoints.values()], overwrite=overwrite)
    checkpoints = match_vocabulary(checkpoints, BASE, vocab)
    inputs = list(checkpoints.values())
    check_inputs(plan, checkpoints)
    recipe = recipe_text(plan, checkpoints)
    models = [plan.base.source, *(expert.source for expert in plan.experts.values())]

    def papers(directory: Path, record: str) -> None:
        plan.save(directory)
        write_file(directory / "recipe.yml", recipe)
        card = model_card(
            name=out.name,
            base=checkpoints[BASE],
            models=models,
            summary=plan_summary(plan),
            recipe=recipe,
            version=wpmerge.__version__,
            record=record,
        )
        write_file(directory / "README.md", card)

    writing = Writing(
        shard_bytes=shard_bytes,
        dtype=dtype,
        threads=threads,
        overwrite=overwrite,
        sync=sync,
        allow_nan=allow_nan,
        progress=progress,
        record={"from": "plan", "vocab": vocab},
    )
    jobs = plan_jobs(plan, checkpoints, dtype=dtype)
    return write_model(out, jobs, donor=checkpoints[BASE], inputs=inputs, papers=papers, writing=writing)


def merge_plan(
    directory: Path,
    out: Path,
    *,
    models: Mapping[str, str | Path] | None = None,
    shard_bytes: int = SHARD_BYTES,
    dtype: Dtype | None = None,
    threads: int = 2,
    overwrite: bool = False,
    allow_nan: bool = False,
    vocab: Vocabulary | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> MergeSummary:
    """Carry out a plan that lies on disk, unit by unit as it says.

    Args:
        directory: holds plan.json and plan.safetensors.
        models: where inputs live now, by name, ``base`` for the base.
        trust_remote_code: see :func:`~wpmerge.checkpoint.open_checkpoint`.

    The other arguments and errors are those of :func:`merge`.
    """
    plan = load_plan(directory)
    checkpoints = open_inputs(plan, models, trust_remote_code=trust_remote_code)
    check_output(out, inputs=[directory, *(model.path for model in checkpoints.values())], overwrite=overwrite)
    return merge(
        plan,
        checkpoints,
        out,
        shard_bytes=shard_bytes,
        dtype=dtype,
        threads=threads,
        overwrite=overwrite,
        allow_nan=allow_nan,
        vocab=vocab,
        progress=progress,
    )


def merge_recipe(
    path: Path,
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    dtype: Dtype | None = None,
    threads: int = 2,
    overwrite: bool = False,
    sync: bool = True,
    allow_nan: bool = False,
    vocab: Vocabulary | None = None,
    seed: int = 0,
    parity: Literal["mergekit"] | None = None,
    engine: Literal["wpmerge", "mergekit"] = "wpmerge",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> MergeSummary:
    """Carry out a mergekit recipe; mergekit itself is not used, unless it is asked for.

    Args:
        path: the recipe's file.
        seed: of DARE.
        parity: ``mergekit`` computes task arithmetic in mergekit's own steps and dtype, to the bit.
        engine: ``mergekit`` hands the recipe over to it, whatever the recipe asks for; of the other arguments
            ``shard_bytes``, ``overwrite``, ``seed`` and ``trust_remote_code`` are then used.
        trust_remote_code: see :func:`~wpmerge.checkpoint.open_checkpoint`.

    The other arguments and errors are those of :func:`merge`.
    """
    if engine == "mergekit":
        if dtype is not None or vocab is not None or allow_nan or parity is not None:
            raise RecipeError("mergekit takes its settings from the recipe", got="dtype, vocab, allow_nan or parity")
        return merge_with_mergekit(
            path,
            out,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
    recipe = read_yaml_recipe(path)
    names = recipe.model_names()
    checkpoints = open_recipe(recipe, trust_remote_code=trust_remote_code)
    check_output(out, inputs=[path, *(model.path for model in checkpoints.values())], overwrite=overwrite)
    made = jobs_of_recipe(recipe, checkpoints, path, dtype=dtype, vocab=vocab, seed=seed, parity=parity)
    text = path.read_text(encoding="utf-8")

    def papers(directory: Path, record: str) -> None:
        write_file(directory / "recipe.yml", text)
        card = model_card(
            name=out.name,
            base=made.donor,
            models=names,
            summary=f"A merge of {len(names)} models by `{recipe.merge_method}`.",
            recipe=text if text.endswith("\n") else text + "\n",
            version=wpmerge.__version__,
            record=record,
        )
        write_file(directory / "README.md", card)

    writing = Writing(
        shard_bytes=shard_bytes,
        dtype=made.dtype,
        threads=threads,
        overwrite=overwrite,
        sync=sync,
        allow_nan=allow_nan,
        progress=progress,
        config=made.config,
        record={"from": "recipe", "vocab": vocab, "seed": seed, "parity": parity},
    )
    inputs = list(checkpoints.values())
    return write_model(out, made.jobs, donor=made.donor, inputs=inputs, papers=papers, writing=writing)


def open_recipe(
    recipe: YamlRecipe, models: Mapping[str, str | Path] | None = None, *, trust_remote_code: bool = False
) -> dict[str, Checkpoint]:
    """Open every model of a recipe, by the name it uses, the base first; ``base+adapter`` opens both.

    Args:
        recipe: names the models.
        models: other places, by the recipe's name.
        trust_remote_code: see :func:`~wpmerge.checkpoint.open_checkpoint`.
    """
    checkpoints: dict[str, Checkpoint] = {}
    models = models or {}
    for name in recipe.model_names():
        whole, _, adapter = name.partition("+")
        if whole not in checkpoints:
            checkpoints[whole] = open_checkpoint(models.get(whole, whole), trust_remote_code=trust_remote_code)
        if adapter:
            checkpoints[name] = open_checkpoint(
                models.get(name, adapter), base=checkpoints[whole], trust_remote_code=trust_remote_code
            )
    return checkpoints


def jobs_of_recipe(
    recipe: YamlRecipe,
    checkpoints: Mapping[str, Checkpoint],
    path: Path,
    *,
    dtype: Dtype | None = None,
    vocab: Vocabulary | None = None,
    seed: int = 0,
    parity: Literal["mergekit"] | None = None,
) -> RecipeJobs:
    """A recipe's jobs on checkpoints that were checked to be of one family; arguments as :func:`merge_recipe`."""
    first = next(iter(checkpoints))
    checkpoints = match_vocabulary(checkpoints, first, vocab)
    for name, model in checkpoints.items():
        check_same_family(checkpoints[first], model, name=name)
    return recipe_jobs(recipe, checkpoints, dtype=dtype, where=path, seed=seed, parity=parity is not None)
