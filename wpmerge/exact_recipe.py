"""A recipe that gives stock mergekit a merge with vector coefficients: one auxiliary checkpoint holds what they make.

mergekit takes one number per tensor. Tensors with a vector coefficient are computed here, in float32, and stored in
an auxiliary checkpoint; all its other tensors are holes of a sparse file, which read as zeros and take no disk. The
recipe gives the auxiliary model weight 1 on the first and 0 on the rest, the experts the reverse. What mergekit makes
of it, base + (auxiliary - base), is the merge but for the rounding of that one float32 sum: 6e-8 of the value.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from wpmerge.checkpoint import Checkpoint
from wpmerge.dtypes import Dtype
from wpmerge.errors import RecipeError
from wpmerge.merging import check_inputs, plan_jobs
from wpmerge.output import check_space, mark, output_directory, write_file
from wpmerge.plan import BASE, Operator, Plan
from wpmerge.recipe import main_dtype, model_reference, single_number, weight_setting, with_tied_names
from wpmerge.shards import OutputTensor, ShardWriter, layout_shards
from wpmerge.streaming import merge_stream

_HEADER = (
    "# Written by wpmerge; rule {rule}, granularity {granularity}. This recipe reproduces the merge exactly: the last\n"
    "# model, beside this file, holds the tensors whose coefficients are vectors, and nothing else.\n"
)


def check_exact(operator: Operator) -> None:
    """Refuse what no exact recipe can be written for.

    Raises:
        RecipeError: another operator than task arithmetic.
    """
    if operator.method != "task_arithmetic":
        raise RecipeError("an exact recipe is for task_arithmetic", got=operator.method)


def write_exact_recipe(
    plan: Plan, checkpoints: Mapping[str, Checkpoint], out: Path, *, overwrite: bool = False
) -> Path:
    """Write a directory with ``recipe.yml`` for stock mergekit and the auxiliary checkpoint that it names.

    Args:
        plan: task arithmetic, at any granularity.
        checkpoints: the base under ``base``, each expert under its name.
        out: the directory to be made; the recipe names it by its absolute path.
        overwrite: replace an output that is already there.

    Returns:
        The recipe's path.

    Raises:
        RecipeError: another operator than task arithmetic.
        OutputError: the output cannot be written there.
    """
    check_exact(plan.operator)
    check_inputs(plan, checkpoints)
    base = checkpoints[BASE]
    touched = {
        name
        for coefficients in plan.coefficients.values()
        for name, coefficient in coefficients.items()
        if single_number(coefficient) is None
    }
    jobs = {job.output.name: job for job in plan_jobs(plan, checkpoints, dtype=Dtype.F32)}
    stored = [OutputTensor(name=name, shape=info.shape, dtype=Dtype.F32) for name, info in base.tensors.items()]
    (shard,) = layout_shards(stored, sum(tensor.nbytes for tensor in stored))
    need = sum(tensor.nbytes for tensor in stored if tensor.name in touched)
    check_space(out, total=need, largest=shard.nbytes)
    inputs = [model.path for model in checkpoints.values()]
    with output_directory(out, inputs=inputs, overwrite=overwrite, total=need) as directory:
        config = {key: value for key, value in base.config.items() if key not in ("torch_dtype", "_name_or_path")}
        write_file(directory / "config.json", json.dumps(config | {"dtype": "float32"}, indent=2))
        writer = ShardWriter(directory, shard)
        try:
            for name in sorted(touched):
                for start, _, block in merge_stream(jobs[name]):
                    writer.write(name, start, block)
        except BaseException:
            writer.abandon()
            raise
        writer.close()
        mark(directory, "a recipe that reproduces a merge in mergekit, and its auxiliary checkpoint")
        write_file(directory / "recipe.yml", _recipe(plan, checkpoints, touched, out.absolute()))
    return out / "recipe.yml"


def _recipe(plan: Plan, checkpoints: Mapping[str, Checkpoint], touched: set[str], auxiliary: Path) -> str:
    models = []
    for expert, coefficients in plan.coefficients.items():
        numbers = {name: 0.0 if name in touched else single_number(c) or 0.0 for name, c in coefficients.items()}
        setting = weight_setting(with_tied_names(numbers, checkpoints.values()))
        models.append({"model": model_reference(plan, expert), "parameters": {"weight": setting}})
    numbers = {name: float(name in touched) for name in checkpoints[BASE].tensors}
    setting = weight_setting(with_tied_names(numbers, checkpoints.values()))
    models.append({"model": str(auxiliary), "parameters": {"weight": setting}})
    document = {
        "models": models,
        "merge_method": "task_arithmetic",
        "base_model": plan.base.source,
        "parameters": {"normalize": False},
        "dtype": "float32",
        "out_dtype": main_dtype(checkpoints[BASE]),
    }
    header = _HEADER.format(rule=plan.rule, granularity=plan.granularity)
    return header + yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=200)
