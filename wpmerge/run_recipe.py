"""The recipe of ``wpmerge run``: one YAML file that says what is merged, how it is scored, and what it is judged by.

Its keys are the options of the commands that do the work, under the same names and with the same defaults. Code that a
checkpoint or a model brings is never allowed by a recipe: only the person at the command line can do that. Nor does a
recipe name code to be run, so ``eval --checkers`` has no key.
"""

import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from wpmerge.arch import Kind
from wpmerge.errors import RecipeError, describe
from wpmerge.options import LEAST, byte_size
from wpmerge.scores import AskedReadout
from wpmerge.yaml_recipe import read_mapping

RuleName = Literal["refine", "scaled", "uniform", "proportional", "select", "joint"]
MERGED = "merged"  # the merge's name among what is evaluated, and its directory's
EVALUATED = "evaluated"  # among a task's splits, the one that is judged


def _least(name: str) -> Any:
    return Field(ge=LEAST[name])


def _as_list(value: Any) -> Any:
    """One value where a list is meant."""
    return [value] if isinstance(value, str) else value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Scoring(_Section):
    """How units are scored: the options of ``wpmerge score``."""

    readout: Annotated[list[AskedReadout], BeforeValidator(_as_list)] = [
        "reference",
        "anchor",
    ]
    """What is read; the first decides coefficients."""
    prompts: Annotated[int, _least("prompts")] = 32
    """Prompts per capability to score on."""
    held_out: Annotated[int, _least("held_out")] = 16
    """More prompts per capability, to choose coefficients on."""
    reference_tokens: Annotated[int, _least("reference_tokens")] = 96
    """Longest reference, tokens."""
    top_k: Annotated[int, _least("top_k")] = 32
    """Strongest units of each kind to verify by exact patching."""
    random_sample: Annotated[int, _least("random_sample")] = 64
    """Random other units of each kind to verify."""
    verify_prompts: Annotated[int, _least("verify_prompts")] = 4
    """Prompts per capability to verify on."""
    kind: Annotated[list[Kind] | None, BeforeValidator(_as_list)] = None
    """Kinds of unit to score; none for all that are not coarse."""
    cross: bool = True
    """Score every expert on every capability, not on its own only."""
    estimator: Annotated[list[Literal["linear", "integrated", "exact"]], BeforeValidator(_as_list)] = ["linear"]
    """How every unit's score is found; linear always is one way."""
    direction: Annotated[list[Literal["sufficiency", "necessity"]], BeforeValidator(_as_list)] = ["sufficiency"]
    """Sufficiency, always; necessity puts units of the base into the expert."""
    integrated_points: Annotated[int, _least("integrated_points")] = 4
    """Points of the integrated estimator."""
    layer: Annotated[int, _least("layer")] | None = None
    """Layer to read every anchor after; none chooses it by reliability."""
    accept_anchor: bool = False
    """Go on with an anchor or a gap that is not reliable."""
    tokens_per_row: Annotated[int, _least("tokens_per_row")] = 384
    """Tokens packed into one row."""
    seed: int = 0
    """Of prompt splits and random draws."""
    max_memory: str | None = None
    """Memory to plan for, such as 4GB; none for no limit."""


class MergeRule(_Section):
    """How scores become coefficients: the options of ``wpmerge fuse``."""

    name: RuleName = "refine"
    """The rule."""
    granularity: Literal["unit", "block", "tensor", "expert"] | None = None
    """What shares a coefficient; none takes expert for uniform and scaled, unit for the others."""
    scale: float | dict[str, float] | None = None
    """Every expert's scale, or each one's; none chooses on held-out prompts."""
    power: float = 0.5
    """Of proportional: exponent of the recovery."""
    density: float = 0.2
    """Of select: share of the parameters that gets the full scale."""
    floor: float = 0.3
    """Of select: what the rest gets, as a share of the scale."""
    max_coefficient: float = 1.5
    """Largest coefficient."""
    mu: float = 1.0
    """Of joint: what leaving the scales costs."""
    steps: Annotated[int, _least("steps")] = 16
    """Of refine: steps, each a forward and backward run over its prompts."""
    batch: Annotated[int, _least("batch")] = 8
    """Of refine: prompts per capability and step."""
    ridge: float = 0.0
    """Of refine: pull back to the start at each step, as a share."""
    calibrate: bool = False
    """Choose the rule's own numbers on held-out prompts too."""
    tolerance: float = 0.02
    """What a merge may lose on a retain set, nats per token below the base, a standard error included."""
    evaluations: Annotated[int, _least("evaluations")] = 24
    """Merges run on held-out prompts to choose the numbers."""
    seed: int = 0
    """Of refine's draws of prompts, and of what dare drops."""
    max_memory: str | None = None
    """Memory to plan for, such as 4GB; none for no limit."""
    method: Literal["task_arithmetic", "ties", "dare_linear", "dare_ties"] = "task_arithmetic"
    """What combines the weighted task vectors."""
    method_density: float = 1.0
    """Of ties and dare: the share of a task vector that is kept."""


class Output(_Section):
    """Where results go, and as what."""

    directory: str
    """The directory of the run; relative to where the command is given."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of the written weights; none keeps each tensor's in the base."""
    shard_size: str = "5GB"
    """Most weights per file."""
    threads: Annotated[int, _least("threads")] = 2
    """Blocks merged at a time, a thread each."""
    allow_nan: bool = False
    """Let numbers pass that are not finite."""


class Judging(_Section):
    """What base, experts and merge are judged by: the options of ``wpmerge eval``."""

    tasks: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)] = ["ifeval"]
    """lm-eval tasks, local tasks of task_data, or presets."""
    task_data: dict[str, str | dict[str, str]] = {}
    """Local documents of a task, JSONL; or a file for each split, that which is judged under evaluated."""
    skill: dict[str, str] = {}
    """An expert's metric, for retention, such as math: gsm8k/exact_match."""
    batch_size: Annotated[int, Field(ge=1)] | str = 16
    """Prompts run together, or auto."""
    max_gen_tokens: Annotated[int, _least("max_gen_tokens")] | None = None
    """Longest response, tokens; none takes each task's own."""
    limit: Annotated[int, _least("limit")] | None = None
    """First documents of each task; none for all."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the weights while they run; auto is the checkpoint's."""
    chat_template: bool | None = None
    """Put prompts through the tokenizer's chat template; none where it has one."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Of everything that lm-eval draws; none for lm-eval's own."""


class RunRecipe(_Section):
    """A whole run: from a base and its experts to a merge that has been judged."""

    base: str
    """The base: a directory, or a hub id with an optional @revision."""
    experts: Annotated[dict[str, str], Field(min_length=1)]
    """Name to directory, hub id or LoRA adapter."""
    capabilities: dict[str, str]
    """What each expert is good at, under its name: a built-in name, several joined by +, or a JSONL file."""
    retain: dict[str, str] = {}
    """Prompts on which a merge must stay what the base is, under names of their own."""
    vocab: Literal["base"] | None = None
    """Where an expert's vocabulary is larger: base cuts it to the base's rows; none refuses."""
    device: str = "cpu"
    """Where models run, as torch names it."""
    stream: bool = False
    """Read each layer from disk when it runs, instead of keeping weights in memory."""
    scoring: Scoring = Scoring()
    """How units are scored."""
    rule: MergeRule = MergeRule()
    """How scores become coefficients."""
    output: Output
    """Where results go."""
    evaluation: Judging | None = None
    """What base, experts and merge are judged by; none skips it."""


def json_schema() -> dict[str, Any]:
    """The recipe's JSON Schema, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunRecipe.model_json_schema()}


def read_run_recipe(path: Path) -> RunRecipe:
    """Read and check a recipe.

    Raises:
        RecipeError: no such file, not YAML, an unknown key (with the nearest that there is), a wrong value.
    """
    raw = read_mapping(path)
    if "merge_method" in raw:
        raise RecipeError(
            "this is a recipe for mergekit, not for a whole run",
            where=path,
            got="merge_method",
            mend=f"wpmerge merge {path} --out MERGED",
        )
    try:
        recipe = RunRecipe.model_validate(raw)
    except (ValidationError, RecursionError) as error:
        raise _refusal(error, path) from None
    byte_size(f"{path}: output.shard_size", recipe.output.shard_size)
    for name, most in (("scoring", recipe.scoring.max_memory), ("rule", recipe.rule.max_memory)):
        if most is not None:
            byte_size(f"{path}: {name}.max_memory", most)
    if MERGED in recipe.experts:
        raise RecipeError("no expert may bear the merge's name", where=path, got=MERGED, mend="rename the expert")
    return recipe


def _refusal(error: ValidationError | RecursionError, path: Path) -> RecipeError:
    """An unknown key with its nearest; otherwise the first fault."""
    if not isinstance(error, ValidationError):
        return RecipeError("a recipe is malformed", where=path, got=error)
    for fault in error.errors(include_url=False):
        if fault["type"] == "extra_forbidden":
            *above, key = (str(part) for part in fault["loc"])
            known = list(_section(above).model_fields)
            near = difflib.get_close_matches(key, known, n=1)
            return RecipeError(
                "a recipe has a key that there is none of",
                where=f"{path}: {'.'.join(above) or 'top level'}",
                got=key,
                expected=", ".join(known),
                mend=f"did you mean {near[0]}?" if near else "leave it out",
            )
    return RecipeError("a recipe is malformed", where=path, got=describe(error))


def _section(keys: Sequence[str]) -> type[BaseModel]:
    """The section at some keys."""
    found: type[BaseModel] = RunRecipe
    for key in keys:
        annotation = found.model_fields[key].annotation
        options = typing.get_args(annotation) or (annotation,)
        found = next(each for each in options if isinstance(each, type) and issubclass(each, BaseModel))
    return found


def settings_of(section: BaseModel, *but: str) -> Mapping[str, Any]:
    """A section's values as keyword arguments, without some of them."""
    return {name: value for name, value in section.model_dump().items() if name not in but}
