"""Source, aggregation or execution: what a head or neuron does for a capability, by a stated rule. Pure.

The paper's hierarchy (arXiv:2604.13694): where the weights carry the skill, where it passes through, where it is said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Role = Literal["source", "aggregation", "execution"]
ROLES: tuple[Role, ...] = ("source", "aggregation", "execution")
HIGH = 5.0
"""An effect is high from this many times the mean positive effect of its kind on."""
STRONGEST = 5
CARRIED = 0.5
"""A unit whose weights bring at least this share of what its activation brings is no mere relay."""


def high(values: Float[Tensor, "L U"]) -> Bool[Tensor, "L U"]:
    """Where an effect is at least :data:`HIGH` times the mean positive effect of its kind; False where unknown."""
    positive = values[values > 0]
    if not len(positive):
        return torch.zeros_like(values, dtype=torch.bool)
    return values.nan_to_num(-1.0) >= HIGH * positive.mean()


def roles_of(
    patched_weights: Float[Tensor, "L U"],
    patched_activations: Float[Tensor, "L U"],
    output: Float[Tensor, "L U"],
    *,
    layer: int,
) -> dict[Role, Bool[Tensor, "L U"]]:
    """Which units of a kind have which role.

    source: R high. aggregation: A high, R not high and below half of A. execution: after l*, high on the output.

    Args:
        patched_weights: R on the anchor, NaN after l*.
        patched_activations: A on the anchor, NaN after l*.
        output: A on the output's divergence, for every layer.
        layer: l*.
    """
    source = high(patched_weights)
    relay = high(patched_activations) & ~source & ~(patched_weights >= CARRIED * patched_activations)
    after = torch.arange(len(output))[:, None] > layer
    return {"source": source, "aggregation": relay, "execution": high(output) & after}


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleCount:
    """Units of a kind with a role, by thirds of the depth; ``members`` are all of them, the strongest first."""

    kind: str
    role: Role
    thirds: tuple[int, int, int]
    strongest: tuple[str, ...]
    members: tuple[str, ...]


def count_roles(kind: str, found: Mapping[Role, Bool[Tensor, "L U"]], by: Mapping[Role, Tensor]) -> list[RoleCount]:
    """How many units of a kind have each role in each third of the depth, and which.

    Args:
        kind: the kind.
        found: role → where.
        by: role → the effect that orders its units.
    """
    counts = []
    for role in ROLES:
        mask = found[role]
        parts: Sequence[Tensor] = mask.tensor_split(3)
        order = torch.where(mask, by[role].nan_to_num(-torch.inf), -torch.inf).flatten().argsort(descending=True)
        width = mask.shape[1]
        members = [f"{kind}.{int(i) // width}.{int(i) % width}" for i in order[: int(mask.sum())]]
        first, second, third = (int(part.sum()) for part in parts)
        counts.append(
            RoleCount(
                kind=kind,
                role=role,
                thirds=(first, second, third),
                strongest=tuple(members[:STRONGEST]),
                members=tuple(members),
            )
        )
    return counts
