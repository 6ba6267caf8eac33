"""mergekit's own merge methods on tensors in memory: no recipe, no files, nothing computed twice.

Every number comes from mergekit 0.1.5's functions; ``mergekit-yaml`` on the same numbers gives the same tensors
(tests/test_bench_mergekit.py). What makes a trial cheap: tensors are read once; sparsified task vectors are kept per
density, since weights and scale are applied after; tensors in which no expert differs from the base are not touched.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wpmerge.arch import Layout
from wpmerge.plan import Coefficient
from wpmerge.weights import StateWeights, WeightSource

EPSILON, GAMMA = 0.15, 0.01
"""mergekit's defaults: DELLA's spread of keep-probabilities, Breadcrumbs' share of outliers."""


def whole_state(layout: Layout, source: WeightSource) -> dict[str, Tensor]:
    """Every tensor of a source, canonical names; not copied."""
    found = dict(source.outer())
    for index in range(layout.layers):
        prefix = layout.layer_prefix(index)
        found |= {prefix + name: tensor for name, tensor in source.layer(index).items()}
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """What one trial merge is made with.

    Attributes:
        weights: expert → weight; ignored by methods without weights.
        density: share of a task vector's entries that is kept; None for methods without one.
        shared: mergekit's other parameters: lambda, normalize, select_topk, filter_wise, …
    """

    weights: Mapping[str, float]
    density: float | None = None
    shared: Mapping[str, Any] = field(default_factory=dict)


class MergekitInMemory:
    """A family's tensors, and mergekit's methods on them.

    Args:
        layout: names the tensors.
        base: the base's weights, float32.
        experts: each expert's weights, float32.

    The task vectors are held (four bytes a parameter and expert, where it moved), and one sparsified copy of them.
    """

    def __init__(self, layout: Layout, base: WeightSource, experts: Mapping[str, WeightSource]) -> None:
        self.layout = layout
        self.base = whole_state(layout, base)
        self.experts = {name: whole_state(layout, source) for name, source in experts.items()}
        self.deltas: dict[str, dict[str, Tensor]] = {}
        for name, tensors in self.experts.items():
            deltas = {tensor: value - self.base[tensor] for tensor, value in tensors.items()}
            self.deltas[name] = {tensor: delta for tensor, delta in deltas.items() if bool(delta.any())}
        self._sparse: dict[str, tuple[Any, dict[str, Tensor]]] = {}
        self._masks: dict[Any, dict[str, np.ndarray[Any, Any]]] = {}

    def merge(self, method: str, subset: Sequence[str], numbers: Numbers, *, seed: int = 0) -> StateWeights:
        """The merged model, float32.

        Args:
            method: as mergekit's recipes name it.
            subset: the experts, in the order of the recipe.
            numbers: its parameters.
            seed: of DARE's and DELLA's draws.
        """
        from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
        from mergekit.merge_methods.registry import get

        found = get(method)
        summing = None
        if isinstance(found, GeneralizedTaskArithmeticMerge):
            summing = replace(found, sparsification_method=None)  # made once: its parameter checks are slow to build
        merged = dict(self.base)
        for name in self.base:
            if not any(name in self.deltas[expert] for expert in subset):
                continue  # the base is every method's answer where nobody moved
            if summing is None:
                merged[name] = self._whole(found, name, subset, numbers)
                continue
            sparse = {expert: self._sparsified(found, expert, name, numbers, seed) for expert in subset}
            merged[name] = self.base[name] + self._mixed_delta(summing, name, sparse, numbers)
        return StateWeights(layout=self.layout, tensors=merged)

    def with_coefficients(self, coefficients: Mapping[str, Mapping[str, Coefficient]]) -> StateWeights:
        """base + Σ_e coefficient · (expert − base): what ``wpmerge merge`` makes of a plan, float32.

        Args:
            coefficients: expert → tensor name as the checkpoint stores it → coefficient.
        """
        merged = dict(self.base)
        for expert, own in coefficients.items():
            for name, delta in self.deltas[expert].items():
                added = own[self.layout.stored[name]].expand(delta.shape).to(delta) * delta
                merged[name] = merged[name] + added
        return StateWeights(layout=self.layout, tensors=merged)

    def _mixed_delta(self, summing: Any, name: str, sparse: Mapping[str, Tensor], numbers: Numbers) -> Tensor:
        """What a task-arithmetic method adds to the base: its own code, on a base of zeros and finished task vectors.

        Subtracting and adding zeros changes no bit, so this is what the whole method would add.
        """
        from mergekit.merge_methods.base import TensorEntry, TensorGroup

        zeros = self.base[name].new_zeros(()).expand(self.base[name].shape)
        entries = [TensorEntry(id="", tensor=zeros, is_base=True)]
        entries += [TensorEntry(id=expert, tensor=tensor) for expert, tensor in sparse.items()]
        shared = {key: value for key, value in numbers.shared.items() if key not in ("rescale", "epsilon", "gamma")}
        weights = {expert: numbers.weights[expert] for expert in sparse}
        (mixed,) = summing([TensorGroup(entries=tuple(entries))], parameters={"weight": weights, **shared})
        return mixed  # type: ignore[no-any-return]

    def _whole(self, method: Any, name: str, subset: Sequence[str], numbers: Numbers) -> Tensor:
        from mergekit.merge_methods.base import BasePolicy, TensorEntry, TensorGroup

        entries = [TensorEntry(id=expert, tensor=self.experts[expert][name]) for expert in subset]
        if method.spec.contract.base != BasePolicy.IGNORED:
            entries.insert(0, TensorEntry(id="", tensor=self.base[name], is_base=True))
        parameters: dict[str, Any] = dict(numbers.shared)
        if any(parameter.name == "weight" for parameter in method.spec.parameters):
            parameters["weight"] = {expert: numbers.weights[expert] for expert in subset}
        (merged,) = method([TensorGroup(entries=tuple(entries))], parameters=parameters)
        return merged  # type: ignore[no-any-return]

    def _sparsified(self, method: Any, expert: str, name: str, numbers: Numbers, seed: int) -> Tensor:
        """An expert's sparsified task vector, kept until another density, method or draw is asked for."""
        delta = self.deltas[expert].get(name)
        if delta is None:
            return self.base[name].new_zeros(()).expand(self.base[name].shape)
        kind, density = method.sparsification_method, numbers.density
        if kind is None or density is None or density >= 1:
            return delta
        drawn = kind.value in ("random", "della_magprune")
        extra = {key: numbers.shared[key] for key in ("epsilon", "gamma") if key in numbers.shared}
        rescale = bool(numbers.shared.get("rescale", method.default_rescale))
        key = (kind.value, density, tuple(sorted(extra.items())), seed if drawn else None)
        if self._sparse.get(expert, (None,))[0] != (key, rescale):
            self._sparse[expert] = ((key, rescale), {})
            self._forget_other_draws(seed)
        kept = self._sparse[expert][1]
        if name not in kept:
            kept[name] = self._sparsify(delta, (expert, *key), name, kind, density, extra, rescale)
        return kept[name]

    def _sparsify(
        self, delta: Tensor, key: tuple[Any, ...], name: str, kind: Any, density: float, extra: Any, rescale: bool
    ) -> Tensor:
        """mergekit's sparsification; which entries it kept is remembered, a bit each, for it sorts to find them."""
        from mergekit.sparsify import RescaleNorm, rescaled_masked_tensor, sparsify

        norm = RescaleNorm.l1 if rescale else None
        masks = self._masks.setdefault(key, {})
        if name in masks:
            bits = torch.from_numpy(np.unpackbits(masks[name], count=delta.numel())).view(delta.shape)
            return rescaled_masked_tensor(delta, bits.to(delta), norm)  # type: ignore[no-any-return]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw_seed(key[-1] or 0, key[0], name))
            # drawn on the CPU wherever the models run, so that a seed means the same draw
            sparse: Tensor = sparsify(delta.cpu(), density=density, method=kind, rescale_norm=norm, **extra)
        masks[name] = np.packbits(sparse.ne(0).flatten().numpy())
        return sparse.to(delta.device)

    def _forget_other_draws(self, seed: int) -> None:
        for key in [key for key in self._masks if key[-1] not in (None, seed)]:
            del self._masks[key]


def draw_seed(seed: int, expert: str, tensor: str) -> int:
    """The seed of one expert's draw for one tensor: the same whatever else is merged, and in whatever order."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{expert}/{tensor}".encode()).digest()[:7], "little")
