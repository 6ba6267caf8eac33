"""What can go wrong when transformers or lm-eval opens a model, said before anything is run or as what it was."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from wpmerge.errors import EvaluationError, ran_out_of_memory, reason_of

_OTHER_WEIGHTS = frozenset({"gguf_file", "subfolder", "autogptq", "gptqmodel", "quantization_config"})
_LAYER = re.compile(r"((?:.*?\.)?(?:layers|h))\.(\d+)\.")  # the list that a tensor's layer is in, and its number there
_KINDS = ("SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM")  # in the order in which lm-eval looks a model up


@contextmanager
def loading(name: str, model: object, backend: str) -> Iterator[None]:
    """Turn what a model's loader raises into one clear error.

    Args:
        name: what messages call the model.
        model: where it lies, or anything else for one that lies nowhere.
        backend: lm-eval's name of the model class that loads it.

    Raises:
        EvaluationError: memory ran out, or the model cannot be loaded.
    """
    from huggingface_hub.errors import StrictDataclassError  # a configuration's values are of the wrong kind
    from safetensors import SafetensorError

    where = where_from(name, model)
    try:
        yield
    except (
        OSError,
        ValueError,
        LookupError,
        ImportError,
        RuntimeError,
        TypeError,
        AttributeError,
        AssertionError,
        MemoryError,
        SafetensorError,
        StrictDataclassError,
    ) as error:
        reason = reason_of(error, lines=3 if isinstance(error, StrictDataclassError) else 1)
        if ran_out_of_memory(error):
            raise EvaluationError(
                "memory ran out while a model was loaded",
                where=where,
                got=reason,
                mend="a smaller --dtype, another --device, or a backend that splits the model",
            ) from error
        raise EvaluationError(
            "a model cannot be loaded",
            where=where,
            got=reason,
            expected=f"what lm-eval's {backend!r} model class can load",
            mend="check the checkpoint with wpmerge inspect, the backend's name, and --model-arg",
        ) from error


def where_from(name: str, model: object) -> str:
    """A model's name and where it lies, for messages."""
    return f"{name}: {model if isinstance(model, str | Path) else 'loaded model'}"


def check_weights(name: str, folder: Path, arguments: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose tensors are not the model's: transformers would fill what is missing with random
    numbers. Only names and shapes are read.

    Quantised checkpoints, adapters, and models whose code comes with them are left to their own loaders.

    Args:
        name: what messages call the model.
        folder: a directory with a config.json.
        arguments: of lm-eval's model class.

    Raises:
        EvaluationError: a tensor is missing, has another shape or is of a layer too many, or transformers cannot read
            the checkpoint.
    """
    import transformers

    if any(arguments.get(each) for each in _OTHER_WEIGHTS) or (folder / "adapter_config.json").is_file():
        return
    trusted = bool(arguments.get("trust_remote_code"))
    with loading(name, folder, "hf"), _silent_transformers():
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted)
        kinds: list[Any] = [
            getattr(transformers, f"MODEL_FOR_{each}_MAPPING").get(type(config), None) for each in _KINDS
        ]
        kind = next((each for each in kinds if each is not None), None)
        if kind is None or getattr(config, "quantization_config", None):
            return
        model, found = kind.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    refuse_unfit(model, found, f"{name}: {folder}")


def refuse_unfit(model: Any, found: Mapping[str, Any], where: object) -> None:
    """Refuse a model by the loading info that transformers gives with it.

    Args:
        model: what transformers made.
        found: the loading info.
        where: the checkpoint, for messages.

    Raises:
        EvaluationError: names the first tensor that is missing, has another shape, or is of a layer that the
            configuration does not count, and how many there are.
    """
    if missing := sorted(found["missing_keys"]):
        raise EvaluationError(
            "a checkpoint lacks tensors of its model",
            where=where,
            got=f"no {missing[0]}{_and_more(missing)}",
            expected="every tensor that the configuration asks for",
            mend="take a complete checkpoint; transformers would fill the gap with random numbers",
        )
    if unfit := sorted(found["mismatched_keys"]):
        tensor, stored, asked = unfit[0]
        raise EvaluationError(
            "a tensor has another shape than the configuration says",
            where=where,
            got=f"{tensor} {tuple(stored)}{_and_more(unfit)}",
            expected=tuple(asked),
            mend="put weights and config.json of the same model together",
        )
    lists = {name: len(each) for name, each in model.named_modules() if isinstance(each, torch.nn.ModuleList)}
    beside = int(getattr(model.config, "num_nextn_predict_layers", None) or 0)  # heads that guess tokens ahead
    beyond = {name: n for name in found["unexpected_keys"] if (n := _exceeded(name, lists, beside)) is not None}
    if more := sorted(beyond):
        raise EvaluationError(
            "a checkpoint has more layers than its configuration says",
            where=where,
            got=f"{more[0]}{_and_more(more)}",
            expected=f"tensors of {beyond[more[0]]} layers",
            mend="put weights and config.json of the same model together; transformers would leave layers out",
        )


def _exceeded(tensor: str, lists: Mapping[str, int], beside: int) -> int | None:
    """How many layers the model's list has that a tensor's layer lies beyond, by more than ``beside``.

    None for a tensor of no such layer, and for one of a part that the model lacks as a whole, such as a vision tower.
    """
    match = _LAYER.match(tensor)
    counts = [count for name, count in lists.items() if match and f".{name}".endswith(f".{match[1]}")]
    return max(counts) if match and counts and int(match[2]) >= max(counts) + beside else None


def _and_more(names: list[Any]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Without transformers' report of what it loaded and its progress bars."""
    from transformers.utils import logging as own

    logger = logging.getLogger("transformers")
    level, bars = logger.level, own.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    own.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            own.enable_progress_bar()
