"""Run a causal LM layer by layer with weights that are handed in per call.

The layers are transformers' own, built without weights and called through ``torch.func.functional_call``: patching a
weight is changing a dict entry, and weights may come from disk one layer at a time.

Shape suffixes: U patched copies of the model (1 in a plain run), T tokens of a row, D residual width, H attention
inputs to the output projection, I neurons, N read positions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from wpmerge.arch import Layout
from wpmerge.errors import CheckpointError
from wpmerge.rows import Row
from wpmerge.weights import Weights

HEAD_ROWS = 8192
"""Rows of an output head that are converted to the compute dtype at a time."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


@dataclass(slots=True, kw_only=True)
class Taps:
    """What a layer's two blocks received and wrote in one run.

    Attributes:
        attention_call: how the layer called its attention module.
        z: heads' outputs, what enters attention's output projection.
        attention_out: what attention wrote, before any post-norm.
        mlp_in: what entered the MLP.
        n: neurons' activations, what enters the MLP's output projection.
        mlp_out: what the MLP wrote, before any post-norm.
    """

    attention_call: Call
    z: Float[Tensor, "U T H"]
    attention_out: Float[Tensor, "U T D"]
    mlp_in: Float[Tensor, "U T D"]
    n: Float[Tensor, "U T I"]
    mlp_out: Float[Tensor, "U T D"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entry:
    """A row at the entrance of layer 0: its residual stream, and how transformers calls each layer with it."""

    hidden: Float[Tensor, "1 T D"]
    calls: list[Call]


class _Recorder(nn.Module):
    """Stands where a decoder layer stood and keeps how it was called."""

    call: Call

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.call = (args, kwargs)
        return hidden


class Engine:
    """transformers' own layers of one model, without weights.

    Args:
        layout: units and names; its ``config`` is what the layers are built from.
        device: where to run.
        dtype: compute dtype of weights and residual stream. float32 whatever the checkpoint's dtype, because one
            neuron moves a readout by about 1e-4 of the residual and bfloat16 carries three digits.
        held_bytes: bound on the residual streams that a run over prompts holds at a time; None for none.

    Raises:
        CheckpointError: the layout's tensors are not those of the config's model: a bias too few or too many, which
            transformers would pass over in silence, or another shape.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        held_bytes: int | None = None,
    ) -> None:
        self.layout, self.device, self.dtype = layout, torch.device(device), dtype
        self.held_bytes = held_bytes
        arch = layout.arch
        model = empty_model(layout.config, device=self.device)
        _check_parameters(layout, model)
        self._body = model.get_submodule(arch.body)
        self._layers = list(self._body.get_submodule(arch.layers).children())
        self._norm = self._body.get_submodule(arch.final_norm)
        self._recorders = [_Recorder() for _ in self._layers]
        # only the rows in use are handed in, so that a padding row's number means nothing
        self._body.get_submodule(arch.embedding).padding_idx = None  # type: ignore[assignment]
        setattr(self._body, arch.layers, nn.ModuleList(self._recorders))
        setattr(self._body, arch.final_norm, nn.Identity())

    def embed(self, outer: Weights, row: Row) -> Entry:
        """Run what stands before layer 0, with the weights of :meth:`WeightSource.outer`."""
        prefix = self.layout.arch.body + "."
        names = [name for name in outer if name.endswith(f"{self.layout.arch.positions}.weight")]
        weights = {name.removeprefix(prefix): outer[name].to(self.dtype) for name in names}
        tokens, places = row.tokens.to(self.device).unique(return_inverse=True)
        rows = outer[self.layout.embedding][tokens].to(self.dtype)  # a vocabulary in float32 would be gigabytes
        weights[self.layout.embedding.removeprefix(prefix)] = rows
        inputs = {
            "input_ids": places,
            "position_ids": row.positions.to(self.device),
            "attention_mask": self._masks(row),
            "use_cache": False,
        }
        hidden = functional_call(self._body, weights, kwargs=inputs).last_hidden_state
        return Entry(hidden=hidden.to(self.dtype), calls=[recorder.call for recorder in self._recorders])

    def _masks(self, row: Row) -> Tensor | dict[str, Tensor]:
        """Additive masks in the form that the architecture's model passes on to its layers unchanged."""
        config, masks = self.layout.config, self.layout.arch.masks
        window = config.get("sliding_window")
        full = self._additive(row.visible)
        if masks == "full" or not window:
            near = full
        else:
            position = row.positions[0]
            near = self._additive(row.visible & (position[:, None] - position < window))
        if masks == "by_layer_type":
            return {"full_attention": full, "sliding_attention": near}
        return near if masks == "window" else full

    def _additive(self, visible: Tensor) -> Tensor:
        mask = torch.zeros(visible.shape, dtype=self.dtype).masked_fill(~visible, torch.finfo(self.dtype).min)
        return mask[None, None].to(self.device)

    def layer(
        self,
        index: int,
        weights: Weights,
        hidden: Float[Tensor, "U T D"],
        call: Call,
        *,
        attention_out: Float[Tensor, "#U T D"] | None = None,
        mlp_out: Float[Tensor, "#U T D"] | None = None,
        places: Int[Tensor, " N"] | None = None,
    ) -> Float[Tensor, "U T D"]:
        """Run one decoder layer.

        Args:
            index: which.
            weights: its weights, names relative to it.
            hidden: the residual stream that enters.
            call: how transformers calls it, from :class:`Entry`.
            attention_out: what attention writes, instead of running it.
            mlp_out: what the MLP writes, instead of running it.
            places: run the MLP on these tokens only, because nothing else of the output will be used.
        """
        module = self._layers[index]
        arch = self.layout.arch
        with ExitStack() as stack:
            if attention_out is not None:
                block = module.get_submodule(arch.attention)
                stack.enter_context(_forward_as(block, lambda *_, **__: (attention_out, None)))
            if mlp_out is not None:
                stack.enter_context(_forward_as(module.get_submodule(arch.mlp), lambda *_, **__: mlp_out))
            elif places is not None:
                mlp = module.get_submodule(arch.mlp)
                stack.enter_context(_forward_as(mlp, lambda rows: _on_places(mlp, rows, places)))
            return _first(functional_call(module, weights, (hidden, *call[0]), call[1]))

    def layer_with_taps(
        self, index: int, weights: Weights, hidden: Float[Tensor, "U T D"], call: Call
    ) -> tuple[Float[Tensor, "U T D"], Taps]:
        """Run one decoder layer and keep what its blocks received and wrote, with their autograd graph."""
        module, arch = self._layers[index], self.layout.arch
        seen: dict[str, Any] = {}

        def keep_call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen["attention_call"] = (args, kwargs)

        def keep_input(name: str) -> Callable[..., None]:
            return lambda _, args: seen.__setitem__(name, args[0])

        def keep_output(name: str) -> Callable[..., None]:
            return lambda _, __, output: seen.__setitem__(name, _first(output))

        attention, mlp = module.get_submodule(arch.attention), module.get_submodule(arch.mlp)
        hooks = [
            attention.register_forward_pre_hook(keep_call, with_kwargs=True),
            attention.register_forward_hook(keep_output("attention_out")),
            module.get_submodule(arch.attention_out).register_forward_pre_hook(keep_input("z")),
            mlp.register_forward_pre_hook(keep_input("mlp_in")),
            mlp.register_forward_hook(keep_output("mlp_out")),
            module.get_submodule(arch.mlp_out).register_forward_pre_hook(keep_input("n")),
        ]
        try:
            output = self.layer(index, weights, hidden, call)
        finally:
            for hook in hooks:
                hook.remove()
        return output, Taps(**seen)

    def attention(self, index: int, weights: Weights, call: Call) -> Float[Tensor, "U T D"]:
        """Run a layer's attention module on what it received in another run: the whole of what it writes."""
        return self._block(index, self.layout.arch.attention, weights, call)

    def heads(self, index: int, weights: Weights, call: Call) -> Float[Tensor, "U T H"]:
        """As :meth:`attention`, but stop before the output projection: z, all heads side by side."""
        with _forward_as(self._layers[index].get_submodule(self.layout.arch.attention_out), _identity):
            return self._block(index, self.layout.arch.attention, weights, call)

    def neurons(self, index: int, weights: Weights, mlp_in: Float[Tensor, "U T D"]) -> Float[Tensor, "U T I"]:
        """The neurons' activations n on a given MLP input."""
        with _forward_as(self._layers[index].get_submodule(self.layout.arch.mlp_out), _identity):
            return self._block(index, self.layout.arch.mlp, weights, ((mlp_in,), {}))

    def _block(self, index: int, block: str, weights: Weights, call: Call) -> Tensor:
        prefix = block + "."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        return _first(functional_call(self._layers[index].get_submodule(block), own, call[0], call[1]))

    def attention_projection(self, weights: Weights) -> Float[Tensor, "D H"]:
        """W_O, as [out, in] whatever the architecture stores."""
        return self._projection(weights, self.layout.arch.attention_out)

    def mlp_projection(self, weights: Weights) -> Float[Tensor, "D I"]:
        """W_down, as [out, in] whatever the architecture stores."""
        return self._projection(weights, self.layout.arch.mlp_out)

    def _projection(self, weights: Weights, module: str) -> Tensor:
        weight = weights[f"{module}.weight"]
        return weight.T if self.layout.arch.transposed else weight

    def logits(self, outer: Weights, hidden: Float[Tensor, "U N D"]) -> Float[Tensor, "U N V"]:
        """Final norm and output head on chosen positions of the residual stream after the last layer."""
        prefix = f"{self.layout.arch.body}.{self.layout.arch.final_norm}."
        own = {name.removeprefix(prefix): value for name, value in outer.items() if name.startswith(prefix)}
        normed = functional_call(self._norm, own, (hidden,))
        scores = self._head(normed, outer[self.layout.head])
        if (bias := outer.get("lm_head.bias")) is not None:
            scores = scores + bias
        cap = self.layout.config.get("final_logit_softcapping")
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def _head(self, normed: Float[Tensor, "U N D"], head: Float[Tensor, "V D"]) -> Float[Tensor, "U N V"]:
        """The head's product; one kept in another dtype is converted some rows at a time."""
        if head.dtype == self.dtype:
            return nn.functional.linear(normed, head)
        return torch.cat([_product(normed, part) for part in head.split(HEAD_ROWS)], dim=-1)


def empty_model(config: Mapping[str, Any], *, device: torch.device) -> nn.Module:
    """transformers' causal LM of a config, parameters on the meta device, buffers (rotary tables, scales) real."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in config.items() if key not in ("model_type", "dtype", "torch_dtype")}
    built = AutoConfig.for_model(str(config["model_type"]), **settings)
    built._attn_implementation = "softcapped" if config.get("attn_logit_softcapping") else "sdpa"
    register_softcapped_attention()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(built, attn_implementation=built._attn_implementation)
    for module in model.modules():
        owned = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in owned:
            module.register_buffer(name, torch.empty_like(getattr(module, name), device=device), persistent=False)
        if owned:
            model._init_weights(module)  # transformers fills buffers here when it loads a checkpoint, and so do we
    model.eval()
    model.requires_grad_(False)
    empty: nn.Module = model
    return empty


def _check_parameters(layout: Layout, model: nn.Module) -> None:
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if layout.tied:
        own.pop("lm_head.weight", None)
    for name in sorted(own.keys() | layout.shapes.keys()):
        if own.get(name) != layout.shapes.get(name):
            raise CheckpointError(
                "the checkpoint's tensors are not those of the model that config.json describes",
                where=layout.stored.get(name, name),
                got=layout.shapes.get(name, "no such tensor"),
                expected=own.get(name, "no such tensor"),
                mend="check that config.json belongs to these weights",
            )


def register_softcapped_attention() -> None:
    """Gemma 2 caps its attention logits, which SDPA cannot; transformers' eager version rounds to float32."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("softcapped", softcapped_attention)
    AttentionMaskInterface.register("softcapped", eager_mask)  # without one, transformers would make no mask at all


def softcapped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention with logits softcap · tanh(logits / softcap), in the inputs' own dtype; shapes as transformers'."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    logits = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if attention_mask is not None:
        logits = logits + attention_mask
    return (logits.softmax(dim=-1) @ value).transpose(1, 2).contiguous(), None


@contextmanager
def _forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else for a while."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _on_places(module: nn.Module, hidden: Float[Tensor, "U T D"], places: Tensor) -> Float[Tensor, "U T D"]:
    """A module that works token by token, on some tokens only; zero elsewhere."""
    written: Tensor = type(module).forward(module, hidden[:, places])
    return torch.zeros_like(hidden).index_copy(1, places.to(hidden.device), written)


def _product(normed: Float[Tensor, "U N D"], part: Float[Tensor, "_ D"]) -> Float[Tensor, "U N _"]:
    """A product with rows of a head; for a gradient they are converted again, rather than kept."""

    def multiply(hidden: Tensor) -> Tensor:
        return hidden @ part.to(hidden.dtype).T

    if not torch.is_grad_enabled():
        return multiply(normed)
    product: Tensor = checkpoint(multiply, normed, use_reentrant=False)
    return product


def _identity(value: Tensor) -> Tensor:
    return value


def _first(output: Any) -> Tensor:
    """Some modules return (hidden, attention weights), others hidden alone."""
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first
