"""Models that exist on no disk, for evaluation: a plan carried out in memory, a LoRA adapter applied to its base."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wpmerge.adapter import is_adapter
from wpmerge.checkpoint import Checkpoint, open_checkpoint
from wpmerge.directory import locate
from wpmerge.errors import EvaluationError
from wpmerge.harness import HarnessSettings, InMemory, Loaded, Model
from wpmerge.loading import refuse_unfit
from wpmerge.merging import check_inputs, merged_state_dict, open_inputs
from wpmerge.models import load_tokenizer
from wpmerge.plan import BASE, load_plan
from wpmerge.vocabulary import match_vocabulary


def models_to_evaluate(
    models: Mapping[str, str],
    plans: Mapping[str, str],
    *,
    base: str | None,
    inputs: Mapping[str, str],
    settings: HarnessSettings,
    trust_remote_code: bool = False,
) -> dict[str, Model]:
    """What :func:`wpmerge.evaluating.evaluate` takes, in order: checkpoints as they lie; adapters and plans
    as functions that know what they read.

    Args:
        models: name → directory, hub id or LoRA adapter.
        plans: name → directory of a plan.
        base: which of ``models`` adapters belong to.
        inputs: where inputs of the plans live now, by name; those that a plan does not have are not its own.
        settings: backend, device and dtype.
        trust_remote_code: see :func:`~wpmerge.checkpoint.open_checkpoint`.

    Raises:
        WpmergeError: a plan or one of its inputs cannot be opened, an adapter without a base, another backend than
            transformers for what is on no disk.
    """
    if twice := sorted(set(models) & set(plans)):
        raise EvaluationError("a model and a plan have the same name", got=twice[0], mend="name one NAME=PATH")
    found: dict[str, Model] = {}
    for name, source in models.items():
        folder = locate(source) if settings.backend == "hf" else None
        if folder is None or not is_adapter(folder):
            found[name] = source
        elif base is None or base not in models or base == name:
            raise EvaluationError(
                "a LoRA adapter alone is no model",
                where=f"{name}: {source}",
                mend="evaluate its base too, and name that with --base NAME",
            )
        else:
            found[name] = _adapter_loader(models[base], source, settings, trust_remote_code)
    if plans and settings.backend != "hf":
        raise EvaluationError(
            "a plan is evaluated in memory, which this backend cannot",
            got=settings.backend,
            expected="hf",
            mend="write the merge with wpmerge fuse, and evaluate that",
        )
    check_plan_inputs(inputs, [Path(path) for path in plans.values()])
    opened = {name: _plan_loader(Path(path), inputs, settings, trust_remote_code) for name, path in plans.items()}
    return found | opened


def _plan_loader(
    directory: Path, inputs: Mapping[str, str], settings: HarnessSettings, trust_remote_code: bool
) -> InMemory:
    """Checks the plan and its inputs now, merges when called."""
    plan = load_plan(directory)
    own = {name: path for name, path in inputs.items() if name in (BASE, *plan.experts)}
    opened = open_inputs(plan, own, trust_remote_code=trust_remote_code)
    checkpoints = match_vocabulary(opened, BASE, "base")  # where scoring cut a larger one, so does the plan
    check_inputs(plan, checkpoints)
    return InMemory(
        load=lambda: load_model(checkpoints[BASE], merged_state_dict(plan, checkpoints), settings),
        inputs=(directory, *(each.path for each in checkpoints.values())),
    )


def _adapter_loader(base: str, adapter: str, settings: HarnessSettings, trust_remote_code: bool) -> InMemory:
    """Checks the adapter now, applies it when called; touched tensors are rounded to the base's dtype."""
    whole = open_checkpoint(base, trust_remote_code=trust_remote_code)
    adapted = open_checkpoint(adapter, base=whole, trust_remote_code=trust_remote_code)

    def load() -> Loaded:
        state = {name: adapted.load(name).to(info.dtype.torch) for name, info in whole.tensors.items()}
        return load_model(whole, state, settings)

    return InMemory(load=load, inputs=(whole.path, adapted.path))


def load_model(base: Checkpoint, state: Mapping[str, Tensor], settings: HarnessSettings) -> Loaded:
    """transformers' own model with the given weights, as if they had been read from disk, and the base's tokenizer.

    Args:
        base: whose configuration, generation settings and tokenizer are taken.
        state: every tensor under the name the checkpoint stores it by; a tied head may be left out.
        settings: device and dtype.

    Raises:
        EvaluationError: transformers has no causal language model for the configuration, or a tensor is missing or of a
            layer too many.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(base.path, local_files_only=True)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None:
        raise EvaluationError(
            "transformers has no language model of its own for this configuration",
            where=base.path,
            got=config.model_type,
            mend="write the merge with wpmerge fuse, and evaluate that",
        )
    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    model, found = kind.from_pretrained(
        None, config=config, state_dict=dict(state), dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    refuse_unfit(model, found, base.path)
    if (base.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(base.path, local_files_only=True)
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), load_tokenizer(base.path)


def check_plan_inputs(inputs: Mapping[str, str], plans: Sequence[Path]) -> None:
    """Refuse a place given for an input that no plan has.

    Raises:
        EvaluationError: names it, and the inputs that there are.
    """
    known = {BASE} | {name for plan in plans for name in load_plan(plan).experts} if plans else set()
    if unknown := sorted(set(inputs) - known):
        raise EvaluationError("no plan has such an input", got=unknown[0], expected=", ".join(sorted(known)) or "none")
