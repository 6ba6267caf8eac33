"""A model's config → its units, and each unit → slices of named tensors.

Architectures are data: one :class:`Architecture` each in :data:`ARCHITECTURES`, built from :class:`Rule` rows that say
which unit kinds lie along which axis of which tensor. Everything else here derives from those rows. Definitions of the
units: docs/method.md, section "Units" (arXiv:2604.13694 for heads and neurons; the rest is this project's).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

from wpmerge.errors import CheckpointError

Kind = Literal[
    "head",
    "neuron",
    "kv_group",
    "norm",
    "output_bias",
    "embedding",
    "positions",
    "final_norm",
    "lm_head",
    "attention",
    "mlp",
    "layer",
    "tensor",
]
LAYER_KINDS: tuple[Kind, ...] = ("head", "neuron", "kv_group", "norm", "output_bias")
MODEL_KINDS: tuple[Kind, ...] = ("embedding", "positions", "final_norm", "lm_head")
KINDS: tuple[Kind, ...] = LAYER_KINDS + MODEL_KINDS
"""The finest units: every parameter belongs to exactly one."""
COARSE_KINDS: tuple[Kind, ...] = ("attention", "mlp", "layer", "tensor")
"""For coarse scans: a layer's attention module, its MLP module, the whole layer, one tensor of it."""

BUFFERS = re.compile(
    r"(^|\.)(attn\.bias|attn\.masked_bias|attention\.bias|attention\.masked_bias|rotary_emb\.inv_freq)$"
)
"""Constants that old checkpoints store beside their parameters: kept from the base, never scored."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Unit:
    """A set of weight slices that is replaced as one.

    Attributes:
        kind: one of :data:`KINDS` or :data:`COARSE_KINDS`.
        layer: the decoder layer, from 0; 0 for a unit of the whole model.
        index: which of the layer's units of this kind.
    """

    kind: Kind
    layer: int
    index: int

    def __str__(self) -> str:
        return self.kind if self.kind in MODEL_KINDS else f"{self.kind}.{self.layer}.{self.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Entries ``start:stop`` of one axis of a tensor; ``axis=None`` is the whole tensor."""

    tensor: str
    axis: int | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A run along an axis: ``count`` units of one kind in order, ``width`` entries each, from ``start``."""

    kind: Kind
    start: int
    first: int
    count: int
    width: int

    @property
    def stop(self) -> int:
        """One past the last entry."""
        return self.start + self.count * self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorUnits:
    """Which units a tensor's entries belong to: runs along ``axis``, or (``axis=None``) one unit for the whole."""

    layer: int
    axis: int | None
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One projection of a layer.

    Attributes:
        module: its name inside the layer.
        side: "out" if units are output features (rows of a Linear, and the bias with them), "in" if input features
            (columns; the bias is then an output bias, a unit of its own).
        parts: the unit kinds stacked along that side, each as long as all its units together.
        interleaved: the parts repeat per head (GPT-NeoX) instead of following one another.
    """

    module: str
    side: Literal["out", "in"]
    parts: tuple[Kind, ...]
    interleaved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Where a family of models keeps its parts. Names below ``layers`` are relative to a layer, the rest are whole."""

    rules: tuple[Rule, ...]
    norms: tuple[str, ...]
    attention: str = "self_attn"
    mlp: str = "mlp"
    body: str = "model"  # the module that holds embedding, layers and final norm
    layers: str = "layers"
    embedding: str = "embed_tokens"
    positions: str | None = None
    final_norm: str = "norm"
    stored_head: str = "lm_head"  # what checkpoints call the output head, where it is not lm_head
    transposed: bool = False  # GPT-2's Conv1D stores [in, out]
    masks: Literal["full", "window", "by_layer_type"] = "full"
    norm_spans_heads: bool = False  # OLMo 2 normalises all queries of a layer together

    @property
    def attention_out(self) -> str:
        """The projection that heads write into the residual stream through, relative to the layer."""
        return next(rule.module for rule in self.rules if rule.side == "in" and rule.parts == ("head",))

    @property
    def mlp_out(self) -> str:
        """The projection that neurons write into the residual stream through, relative to the layer."""
        return next(rule.module for rule in self.rules if rule.side == "in" and rule.parts == ("neuron",))


_ATTENTION = (
    Rule(module="self_attn.q_proj", side="out", parts=("head",)),
    Rule(module="self_attn.k_proj", side="out", parts=("kv_group",)),
    Rule(module="self_attn.v_proj", side="out", parts=("kv_group",)),
    Rule(module="self_attn.o_proj", side="in", parts=("head",)),
)
_GATED_MLP = (
    Rule(module="mlp.gate_proj", side="out", parts=("neuron",)),
    Rule(module="mlp.up_proj", side="out", parts=("neuron",)),
    Rule(module="mlp.down_proj", side="in", parts=("neuron",)),
)
_LLAMA = _ATTENTION + _GATED_MLP
_PRE = ("input_layernorm", "post_attention_layernorm")
_QK = ("self_attn.q_norm", "self_attn.k_norm")
_SANDWICH = (*_PRE, "pre_feedforward_layernorm", "post_feedforward_layernorm")

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture(rules=_LLAMA, norms=_PRE),
        "mistral": Architecture(rules=_LLAMA, norms=_PRE, masks="window"),
        "qwen2": Architecture(rules=_LLAMA, norms=_PRE, masks="by_layer_type"),
        "qwen3": Architecture(rules=_LLAMA, norms=_PRE + _QK, masks="by_layer_type"),
        "gemma2": Architecture(rules=_LLAMA, norms=_SANDWICH, masks="by_layer_type"),
        "gemma3_text": Architecture(rules=_LLAMA, norms=_SANDWICH + _QK, masks="by_layer_type"),
        "phi3": Architecture(
            rules=(
                Rule(module="self_attn.qkv_proj", side="out", parts=("head", "kv_group", "kv_group")),
                Rule(module="self_attn.o_proj", side="in", parts=("head",)),
                Rule(module="mlp.gate_up_proj", side="out", parts=("neuron", "neuron")),
                Rule(module="mlp.down_proj", side="in", parts=("neuron",)),
            ),
            norms=_PRE,
            masks="window",
        ),
        "olmo2": Architecture(
            rules=_LLAMA,
            norms=("post_attention_layernorm", "post_feedforward_layernorm", *_QK),
            norm_spans_heads=True,
        ),
        "gpt_neox": Architecture(
            rules=(
                Rule(
                    module="attention.query_key_value",
                    side="out",
                    parts=("head", "kv_group", "kv_group"),
                    interleaved=True,
                ),
                Rule(module="attention.dense", side="in", parts=("head",)),
                Rule(module="mlp.dense_h_to_4h", side="out", parts=("neuron",)),
                Rule(module="mlp.dense_4h_to_h", side="in", parts=("neuron",)),
            ),
            norms=_PRE,
            attention="attention",
            body="gpt_neox",
            embedding="embed_in",
            final_norm="final_layer_norm",
            stored_head="embed_out",
        ),
        "gpt2": Architecture(
            rules=(
                Rule(module="attn.c_attn", side="out", parts=("head", "kv_group", "kv_group")),
                Rule(module="attn.c_proj", side="in", parts=("head",)),
                Rule(module="mlp.c_fc", side="out", parts=("neuron",)),
                Rule(module="mlp.c_proj", side="in", parts=("neuron",)),
            ),
            norms=("ln_1", "ln_2"),
            attention="attn",
            body="transformer",
            layers="h",
            embedding="wte",
            positions="wpe",
            final_norm="ln_f",
            transposed=True,
        ),
    }
)
"""``config.model_type`` → where its parts are."""


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a ``config.json``.

    Raises:
        CheckpointError: for a model type that has no entry in :data:`ARCHITECTURES`.
    """
    model_type = str(config.get("model_type"))
    if model_type not in ARCHITECTURES:
        raise CheckpointError(
            "this architecture is not supported",
            where="config.json, model_type",
            got=model_type,
            expected="one of " + ", ".join(ARCHITECTURES),
            mend="merge it with mergekit, or add its row to wpmerge/arch.py",
        )
    if config.get("use_bidirectional_attention"):
        raise CheckpointError(
            "bidirectional attention is not supported", where="config.json, use_bidirectional_attention", got=True
        )
    return ARCHITECTURES[model_type]


class Layout:
    """Every unit of one model, from its config and its tensors' shapes.

    Args:
        config: the model's ``config.json``.
        shapes: tensor name → shape, as stored. Names may lack the body's prefix (old GPT-2 checkpoints).

    Attributes:
        arch: its row of :data:`ARCHITECTURES`.
        layers: number of decoder layers.
        tied: the output head is the embedding.
        tensors: canonical name → which units it holds; buffers and a stored copy of a tied head are left out.
        stored: canonical name → name in the checkpoint.
        counts: kind → units in a layer (or in the model), kinds without units left out.

    Raises:
        CheckpointError: unsupported architecture, or a tensor that no rule covers or that is missing.
    """

    def __init__(self, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.config = dict(config)
        self.arch = architecture_of(config)
        self.heads = int(_first(config, "num_attention_heads", "n_head"))
        self.layers = int(_first(config, "num_hidden_layers", "n_layer"))
        self.hidden = int(_first(config, "hidden_size", "n_embd"))
        self.kv_groups = int(config.get("num_key_value_heads") or self.heads)
        self.head_dim = int(config.get("head_dim") or self.hidden // self.heads)
        self._canonical = self._canonical_names(shapes)
        self.stored = {canonical: stored for stored, canonical in self._canonical.items()}
        head = "lm_head.weight"
        # A head that is neither stored nor said to be tied is missing, and refused below.
        self.tied = bool(config.get("tie_word_embeddings", self.arch.transposed or head not in self.stored))
        if self.tied:
            self.stored.pop(head, None)
        self.shapes = {name: tuple(shapes[stored]) for name, stored in self.stored.items()}
        self.neurons = self._neuron_count()
        self.tensors = {name: self._units_of(name) for name in self.stored}
        self._check_complete()

    def _canonical_names(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        prefix = self.arch.body + "."
        bare = not any(name.startswith(prefix) for name in shapes)
        names = {}
        for name in shapes:
            if BUFFERS.search(name):
                continue
            if name.startswith((f"{self.arch.stored_head}.", "lm_head.")):
                names[name] = "lm_head." + name.split(".", 1)[1]
            else:
                names[name] = prefix + name if bare else name
        return names

    @cached_property
    def counts(self) -> dict[Kind, int]:
        """Kind → number of units in each layer (layer kinds) or in the model (model kinds)."""
        found: dict[Kind, int] = {}
        for units in self.tensors.values():
            for segment in units.segments:
                found[segment.kind] = max(found.get(segment.kind, 0), segment.first + segment.count)
        return {kind: found[kind] for kind in KINDS if kind in found}

    def shape(self, kind: Kind) -> tuple[int, int]:
        """The shape of an array of one number per unit of ``kind``: [layers or 1, units]."""
        if kind in COARSE_KINDS:
            return (self.layers, len(self.layer_tensors(0)) if kind == "tensor" else 1)
        return (1 if kind in MODEL_KINDS else self.layers, self.counts[kind])

    def units(self, kind: Kind) -> Iterator[Unit]:
        """All units of a kind, layer by layer."""
        layers, count = self.shape(kind)
        for layer in range(layers):
            for index in range(count):
                yield Unit(kind=kind, layer=layer, index=index)

    def slices(self, unit: Unit) -> tuple[Slice, ...]:
        """The weight slices that ``unit`` replaces, canonical names."""
        if unit.kind not in COARSE_KINDS:
            return self._slices[unit]
        names = self.layer_tensors(unit.layer)
        if unit.kind == "tensor":
            names = names[unit.index : unit.index + 1]
        elif unit.kind != "layer":
            module = self.arch.attention if unit.kind == "attention" else self.arch.mlp
            names = tuple(name for name in names if name.startswith(f"{self.layer_prefix(unit.layer)}{module}."))
        return tuple(Slice(tensor=name, axis=None, start=0, stop=1) for name in names)

    @cached_property
    def _slices(self) -> dict[Unit, tuple[Slice, ...]]:
        found: dict[Unit, list[Slice]] = {}
        for name, units in self.tensors.items():
            for segment in units.segments:
                for i in range(segment.count):
                    start = segment.start + i * segment.width
                    unit = Unit(kind=segment.kind, layer=units.layer, index=segment.first + i)
                    piece = Slice(tensor=name, axis=units.axis, start=start, stop=start + segment.width)
                    found.setdefault(unit, []).append(piece)
        return {unit: tuple(pieces) for unit, pieces in found.items()}

    def coarse_units(self, kind: Kind, name: str) -> tuple[int, ...]:
        """Which coarse units of a layer hold a tensor, whose name is relative to the layer."""
        module = {"attention": f"{self.arch.attention}.", "mlp": f"{self.arch.mlp}.", "layer": ""}
        if kind == "tensor":
            prefix = self.layer_prefix(0)
            return (self.layer_tensors(0).index(prefix + name),)
        return (0,) if name.startswith(module[kind]) else ()

    @staticmethod
    def is_outer(unit: Unit) -> bool:
        """Whether the unit stands outside the decoder layers."""
        return unit.kind in MODEL_KINDS

    def parameters(self, unit: Unit) -> int:
        """|u|: how many numbers the unit holds."""
        return sum(self._size(piece) for piece in self.slices(unit))

    def _size(self, piece: Slice) -> int:
        shape = self.shapes[piece.tensor]
        total = 1
        for size in shape:
            total *= size
        return total if piece.axis is None else total // shape[piece.axis] * (piece.stop - piece.start)

    def layer_prefix(self, layer: int) -> str:
        """What every tensor name of a layer starts with."""
        return f"{self.arch.body}.{self.arch.layers}.{layer}."

    def layer_tensors(self, layer: int) -> tuple[str, ...]:
        """The canonical names of a layer's tensors."""
        prefix = self.layer_prefix(layer)
        return tuple(name for name in self.tensors if name.startswith(prefix))

    def outer_tensors(self) -> tuple[str, ...]:
        """The canonical names of the tensors outside the layers."""
        prefix = f"{self.arch.body}.{self.arch.layers}."
        return tuple(name for name in self.tensors if not name.startswith(prefix))

    def input_tensors(self) -> tuple[str, ...]:
        """The canonical names of what stands before layer 0: embedding and positions."""
        ends = (f"{self.arch.embedding}.weight", f"{self.arch.positions}.weight")
        return tuple(name for name in self.outer_tensors() if name.endswith(ends))

    def output_tensors(self) -> tuple[str, ...]:
        """The canonical names of what stands behind the last layer: final norm and output head."""
        final = f"{self.arch.body}.{self.arch.final_norm}."
        return tuple(name for name in self.outer_tensors() if name == self.head or name.startswith((final, "lm_head.")))

    @property
    def embedding(self) -> str:
        """Canonical name of the token embedding."""
        return f"{self.arch.body}.{self.arch.embedding}.weight"

    @property
    def head(self) -> str:
        """Canonical name of the output head: the embedding, where they are tied."""
        return self.embedding if self.tied else "lm_head.weight"

    def labels(self, kind: Kind) -> list[str] | None:
        """Names for units that numbers say little about: the norms and the output biases of a layer."""
        if kind == "norm":
            return list(self.arch.norms)
        if kind == "output_bias":
            return [module for module in (self.arch.attention_out, self.arch.mlp_out) if self._has_bias(module)]
        if kind == "tensor":
            return [name.removeprefix(self.layer_prefix(0)) for name in self.layer_tensors(0)]
        return None

    def _has_bias(self, module: str) -> bool:
        return f"{self.layer_prefix(0)}{module}.bias" in self.stored

    def _neuron_count(self) -> int:
        rule = next(rule for rule in self.arch.rules if rule.module == self.arch.mlp_out)
        name = f"{self.layer_prefix(0)}{rule.module}.weight"
        if name not in self.shapes:
            raise self._missing(name)
        return self.shapes[name][0 if self.arch.transposed else 1]

    def _units_of(self, name: str) -> TensorUnits:
        body = self.arch.body + "."
        layer_name = re.fullmatch(re.escape(f"{body}{self.arch.layers}.") + r"(\d+)\.(.+)\.(weight|bias)", name)
        if layer_name:
            layer, module, leaf = int(layer_name[1]), layer_name[2], layer_name[3]
            if layer < self.layers and module in self.arch.norms:
                return _whole("norm", layer, self.arch.norms.index(module))
            rule = next((rule for rule in self.arch.rules if rule.module == module), None)
            if layer < self.layers and rule is not None:
                return self._rule_units(rule, layer, leaf)
        whole: dict[str, Kind] = {
            f"{body}{self.arch.embedding}.weight": "embedding",
            f"{body}{self.arch.final_norm}.weight": "final_norm",
            f"{body}{self.arch.final_norm}.bias": "final_norm",
            "lm_head.weight": "lm_head",
            "lm_head.bias": "lm_head",
        }
        if self.arch.positions:
            whole[f"{body}{self.arch.positions}.weight"] = "positions"
        if name in whole:
            return _whole(whole[name], 0, 0)
        raise CheckpointError(
            f"the checkpoint holds a tensor that a {self.config['model_type']} model does not have.",
            where=name,
            expected=f"{self.layers} layers of the tensors in wpmerge/arch.py",
            mend="remove the tensor, or check that config.json belongs to these weights",
        )

    def _rule_units(self, rule: Rule, layer: int, leaf: str) -> TensorUnits:
        if rule.side == "in" and leaf == "bias":
            labels = self.labels("output_bias") or []
            return _whole("output_bias", layer, labels.index(rule.module))
        axis = 0 if leaf == "bias" else int((rule.side == "in") != self.arch.transposed)
        sizes = {"head": (self.heads, self.head_dim), "kv_group": (self.kv_groups, self.head_dim)}
        sizes["neuron"] = (self.neurons, 1)
        segments, start = [], 0
        # Interleaved parts come once per head, one unit at a time; otherwise each part comes once with all its units.
        for repeat in range(self.heads if rule.interleaved else 1):
            for kind in rule.parts:
                count, width = sizes[kind]
                if rule.interleaved:
                    count = 1
                segments.append(Segment(kind=kind, start=start, first=repeat, count=count, width=width))
                start += count * width
        units = TensorUnits(layer=layer, axis=axis, segments=tuple(segments))
        name = f"{self.layer_prefix(layer)}{rule.module}.{leaf}"
        if self.shapes[name][axis] != start:
            raise CheckpointError(
                "a tensor does not have the size that config.json says",
                where=name,
                got=f"{self.shapes[name]}",
                expected=f"{start} along axis {axis}",
                mend="check that config.json belongs to these weights",
            )
        return units

    def _check_complete(self) -> None:
        expected = [self.embedding, f"{self.arch.body}.{self.arch.final_norm}.weight", self.head]
        if self.arch.positions:
            expected.append(f"{self.arch.body}.{self.arch.positions}.weight")
        modules = [rule.module for rule in self.arch.rules] + list(self.arch.norms)
        for layer in range(self.layers):
            expected += [f"{self.layer_prefix(layer)}{module}.weight" for module in modules]
        for name in expected:
            if name not in self.stored:
                raise self._missing(name)

    def _missing(self, name: str) -> CheckpointError:
        return CheckpointError(
            "the checkpoint lacks a tensor",
            where=name,
            mend="check that all shards and the right config.json are there",
        )


def _first(config: Mapping[str, Any], *keys: str) -> Any:
    for key in keys:
        if config.get(key) is not None:
            return config[key]
    raise CheckpointError("config.json lacks a size.", where="config.json", expected=" or ".join(keys))


def _whole(kind: Kind, layer: int, index: int) -> TensorUnits:
    segment = Segment(kind=kind, start=0, first=index, count=1, width=1)
    return TensorUnits(layer=layer, axis=None, segments=(segment,))
