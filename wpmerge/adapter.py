"""A PEFT LoRA adapter as what it adds to its base: scaling · B A per touched tensor, computed block by block.

LoRA (Hu et al. 2021, section 4.1): W = W_base + (alpha / r) B A, with alpha / sqrt(r) under rank-stabilised scaling
(Kalajdzievski 2023). Anything that is not this sum is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float

from wpmerge.errors import CheckpointError
from wpmerge.tensorfile import TensorFile, TensorInfo, check_finite, open_tensor_file

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_NAME = "adapter_config.json"
TILE_ELEMENTS = 2**16

# Settings under which the weights are not base + scaling · B A on ordinary modules.
_REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "trainable_token_indices": "trainable tokens",
    "layer_replication": "layer replication",
    "target_parameters": "LoRA on bare parameters",
    "lora_bias": "a bias on B",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron layers",
}
# Initialisations that move part of the base's weights into the adapter, so that the base alone is no longer its base.
_REFUSED_INIT = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """The factors of one touched tensor: ``scaling * up @ down``, transposed where the module stores [in, out]."""

    down: Float[Tensor, "r columns"]
    up: Float[Tensor, "rows r"]
    scaling: float

    def block(self, start: int, stop: int) -> Float[Tensor, " n"]:
        """Elements ``start`` to ``stop`` of the product in row-major order, float32.

        Computed in row tiles that depend on the shape alone, so that a block's bits do not depend on its bounds.
        """
        import torch

        columns = self.down.shape[1]
        tile = max(1, TILE_ELEMENTS // columns)
        first = start // columns // tile * tile
        last = -(-stop // columns)
        parts = [
            (self.up[row : row + tile] @ self.down).mul_(self.scaling).reshape(-1) for row in range(first, last, tile)
        ]
        return torch.cat(parts)[start - first * columns : stop - first * columns]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What an adapter directory changes: tensors stored whole (``modules_to_save``, biases), and low-rank terms.

    A tensor may be both: peft stores the embedding beside the factors that adapt it.
    """

    path: Path
    file: TensorFile
    low_rank: Mapping[str, LowRank]
    replaced: Mapping[str, str]  # the base's tensor name -> the key in the adapter's file


def is_adapter(path: Path) -> bool:
    """Whether a directory holds a PEFT adapter."""
    return (path / CONFIG_NAME).is_file()


def read_adapter(path: Path, base: Mapping[str, TensorInfo]) -> Adapter:
    """Read an adapter directory and fit it to its base's tensors.

    Args:
        path: holds ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).
        base: the base's tensors by name.

    Raises:
        CheckpointError: no LoRA, a variant that is not base + scaling · B A, a key or shape that does not fit.
    """
    config = _read_config(path)
    names = [path / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    found = next((name for name in names if name.is_file()), None)
    if found is None:
        raise CheckpointError("an adapter directory holds no weights", where=path, expected=names[0].name)
    file = open_tensor_file(found)
    factors: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for key in file.tensors:
        module, part = _split_key(key)
        if part is None:
            replaced[module] = key
        else:
            factors.setdefault(module, {})[part] = key
    low_rank = {}
    for module, keys in factors.items():
        target = f"{module}.weight"
        low_rank[target] = _fit(module, keys, file, config, _in_base(base, target, found))
    for target, key in replaced.items():
        if _in_base(base, target, found).shape != file.tensors[key].shape:
            raise CheckpointError(
                f"the adapter's {key} does not fit the base",
                where=found,
                got=file.tensors[key].shape,
                expected=base[target].shape,
            )
    return Adapter(path=path, file=file, low_rank=low_rank, replaced=replaced)


def _read_config(path: Path) -> dict[str, Any]:
    where = path / CONFIG_NAME
    try:
        config = json.loads(where.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError("an adapter's configuration cannot be read", where=where, got=error) from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError("only LoRA adapters are supported", where=where, got=kind, expected="peft_type LORA")
    for setting, variant in _REFUSED.items():
        if config.get(setting):
            raise CheckpointError(
                f"{variant} is not base + scaling · B A and is not supported",
                where=where,
                got=f"{setting}: {config[setting]}",
                mend="merge the adapter into its base with peft and give the merged checkpoint",
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_REFUSED_INIT):
        raise CheckpointError(
            f"an adapter initialised with {start} belongs to a base changed at initialisation",
            where=where,
            mend="convert it to an ordinary LoRA with peft (path_initial_model_for_weight_conversion)",
        )
    return config


def _split_key(key: str) -> tuple[str, str | None]:
    """The base's module and the factor a key belongs to, or the base's tensor name and None for a stored tensor."""
    name = key.removeprefix("base_model.model.")
    for marker, part in (("lora_A", "down"), ("lora_B", "up")):
        if name.endswith(f".{marker}.weight"):
            return name.removesuffix(f".{marker}.weight"), part
    for marker, part in (("lora_embedding_A", "embedding_down"), ("lora_embedding_B", "embedding_up")):
        if name.endswith(f".{marker}"):
            return name.removesuffix(f".{marker}"), part
    return name.replace(".modules_to_save.", ".").replace(".base_layer.", "."), None


def _in_base(base: Mapping[str, TensorInfo], target: str, where: Path) -> TensorInfo:
    if target not in base:
        raise CheckpointError(
            f"the adapter changes {target}, which the base does not have as a tensor of its own",
            where=where,
            mend="check that this is the base the adapter was trained on (a tied lm_head has no tensor of its own)",
        )
    return base[target]


def _fit(module: str, keys: dict[str, str], file: TensorFile, config: dict[str, Any], target: TensorInfo) -> LowRank:
    embedding = "embedding_down" in keys
    wanted = ("embedding_down", "embedding_up") if embedding else ("down", "up")
    if set(keys) != set(wanted):
        raise CheckpointError(f"the adapter holds only part of the factors of {module}", where=file.path, got=[*keys])
    down, up = (_load(file, keys[part]) for part in wanted)
    rank = _setting(config, "rank_pattern", module, config.get("r"), file.path)
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or down.shape[0] != rank:
        raise CheckpointError(
            f"the adapter's factors of {module} do not fit each other",
            where=file.path,
            got=f"A {tuple(down.shape)}, B {tuple(up.shape)}",
            expected=f"rank {rank}",
        )
    alpha = _setting(config, "alpha_pattern", module, config.get("lora_alpha"), file.path)
    if embedding or config.get("fan_in_fan_out"):
        down, up = up.T.contiguous(), down.T.contiguous()
    if (up.shape[0], down.shape[1]) != target.shape:
        raise CheckpointError(
            f"the adapter's factors of {module} do not fit the base",
            where=file.path,
            got=f"{(up.shape[0], down.shape[1])}",
            expected=f"{target.shape}",
        )
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LowRank(down=down, up=up, scaling=scaling)


def _load(file: TensorFile, key: str) -> Float[Tensor, "..."]:
    """A factor in float32. Factors stay in memory: they are small, and every block needs all of one of them."""
    info = file.tensors[key]
    values = file.read(key, 0, info.numel).float()
    check_finite(values, where=f"{key} in {file.path}")
    return values.view(info.shape)


def _setting(config: dict[str, Any], patterns: str, module: str, default: Any, where: Path) -> float:
    """``rank_pattern`` and ``alpha_pattern``: the first pattern that matches the end of the module's name wins."""
    for pattern, number in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            default = number
            break
    if isinstance(default, bool) or not isinstance(default, int | float) or not 0 < default < math.inf:
        raise CheckpointError(f"an adapter's setting for {module} is no positive number", where=where, got=default)
    return float(default)
