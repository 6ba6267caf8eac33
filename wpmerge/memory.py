"""How much memory scoring and fusing may hold, and what that leaves for weights and for residual streams."""

import contextlib
import ctypes
import os
from dataclasses import dataclass

from wpmerge.arch import Layout
from wpmerge.errors import WpmergeError

HELD_BYTES = 1 << 30
"""Residual streams and block inputs held by default, bytes."""
LEAST_HELD = 1 << 26
"""Below this, work is cut into pieces too small to be worth their overhead."""
FLOAT, DOUBLE = 4, 8
FORWARD_STATES = 3
"""Residual streams that a forward run holds of each token: at the entrance, and before and after a layer."""
NUMBERS_PER_UNIT = 12
"""Arrays of a number per unit and expert that a merge's steps hold at once: gradients, directions, coefficients."""
M_MMAP_THRESHOLD = -3
"""glibc's name for it, malloc.h."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What may be held.

    Attributes:
        resident: keep all models' weights in memory, rather than reading each layer when it runs.
        held_bytes: for residual streams, and what one layer's blocks receive and write.
    """

    resident: bool = True
    held_bytes: int = HELD_BYTES


def budget(
    layout: Layout,
    models: int,
    *,
    most: int | None,
    resident: bool = True,
    stored_bytes: int = 2,
    gradients: bool = False,
    teacher: bool = False,
) -> Budget:
    """What a bound on the process's memory leaves. It plans; what Python and libraries hold beside it may grow.

    Args:
        layout: of the models.
        models: how many take part, the base among them.
        most: bound on the process's resident memory, bytes; None for none.
        resident: False to read weights from disk whatever there is room for.
        stored_bytes: per weight in the checkpoints, the most of any.
        gradients: whether weights' gradients are needed, as by the integrated estimator.
        teacher: whether a teacher's head is held beside the model's, as by the divergence readout.

    Raises:
        WpmergeError: not even one layer at a time fits.
    """
    streamed = _streamed_bytes(layout, stored_bytes, gradients=gradients, teacher=teacher)
    whole = resident_weights(layout, models) + streamed
    return _allowed(most, whole, streamed, resident=resident, what="scoring", mend="score a smaller model")


def merging_budget(
    layout: Layout,
    experts: int,
    *,
    most: int | None,
    longest: int,
    resident: bool = True,
    stored_bytes: int = 2,
    gradients: bool = False,
) -> Budget:
    """As :func:`budget`, where coefficients are chosen by running merges.

    Args:
        layout: of the models.
        experts: how many are merged.
        most: bound on the process's resident memory, bytes; None for none.
        longest: tokens of the longest row of prompts, which is never divided.
        resident: False to read weights from disk whatever there is room for.
        stored_bytes: per weight in the checkpoints, the most of any.
        gradients: whether steps are taken, by rule ``refine``.

    Raises:
        WpmergeError: not even one layer and one row at a time fit.
    """
    beside = _beside_merging(layout, experts, longest, gradients=gradients)
    whole, streamed = (
        beside + merging(layout, experts, stored_bytes, gradients=gradients)
        for merging in (_merged_resident, _merged_streamed)
    )
    states = layout.layers + 2 if gradients else FORWARD_STATES
    least = max(LEAST_HELD, 2 * longest * stream_per_token(layout, states, longest))
    mend = "score a smaller model, or on shorter prompts"
    return _allowed(most, whole, streamed, resident=resident, what="fusing", mend=mend, least=least)


def _allowed(
    most: int | None,
    whole: int,
    streamed: int,
    *,
    resident: bool,
    what: str,
    mend: str,
    least: int = LEAST_HELD,
) -> Budget:
    """The budget, given what is held beside residual streams where weights are resident and where they are streamed."""
    if most is None:
        return Budget(resident=resident)
    room = most - resident_bytes()
    kept = resident and room >= whole + least
    if not kept and room < streamed + least:
        raise WpmergeError(
            f"{what} does not fit into --max-memory",
            got=f"{most / 1e6:,.0f} MB",
            expected=f"at least {(most - room + streamed + least) / 1e6:,.0f} MB",
            mend=f"give more, or {mend}",
        )
    return Budget(resident=kept, held_bytes=min(HELD_BYTES, (room - (whole if kept else streamed)) // 2))


def resident_weights(layout: Layout, models: int) -> int:
    """Bytes of that many models' weights in memory, as they are run: in float32."""
    return models * FLOAT * sum(_size(shape) for shape in layout.shapes.values())


def least_memory(
    layout: Layout,
    models: int,
    *,
    resident: bool,
    stored_bytes: int = 2,
    gradients: bool = False,
    teacher: bool = False,
) -> int:
    """Bytes that scoring needs beside Python and its libraries; arguments as :func:`budget`'s."""
    whole = resident_weights(layout, models) if resident else 0
    return whole + _streamed_bytes(layout, stored_bytes, gradients=gradients, teacher=teacher) + LEAST_HELD


def least_merging_memory(
    layout: Layout,
    experts: int,
    *,
    longest: int,
    resident: bool,
    stored_bytes: int = 2,
    gradients: bool = False,
) -> int:
    """Bytes that fusing needs beside Python and its libraries; arguments as :func:`merging_budget`'s."""
    weights = _merged_resident if resident else _merged_streamed
    held = weights(layout, experts, stored_bytes, gradients=gradients)
    return held + _beside_merging(layout, experts, longest, gradients=gradients) + LEAST_HELD


def stream_per_token(layout: Layout, states: int, longest: int) -> int:
    """What one token keeps in memory of so many residual streams and of its row's attention masks, bytes.

    Args:
        layout: of the model.
        states: residual streams.
        longest: tokens of its row.
    """
    return FLOAT * (layout.hidden * states + 2 * longest)


def reply_per_token(layout: Layout) -> int:
    """What one token keeps in memory while a batch of replies is written: keys, values, a layer's blocks; bytes."""
    return held_per_token(layout, 0) + FLOAT * 2 * layout.layers * layout.kv_groups * layout.head_dim


def held_per_token(layout: Layout, layer: int) -> int:
    """What one token keeps in memory while layers up to ``layer`` are scored, bytes: streams and one layer's blocks."""
    neurons = layout.counts.get("neuron", 0)
    return FLOAT * (layout.hidden * (layer + 10) + 4 * neurons)


def resident_bytes() -> int:
    """The process's resident memory now, bytes; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - not a file of ours
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def return_freed_memory() -> None:
    """Let glibc give freed tensors back at once: its growing threshold leaves holes between what is kept of each layer.

    Without it a streamed model of 22 layers leaves 1 GB of holes. Elsewhere than on glibc nothing is done.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 18)


def _streamed_bytes(layout: Layout, stored_bytes: int, *, gradients: bool, teacher: bool) -> int:
    """Most that weights take when they are read layer by layer: a layer of base and expert, or what is outside them."""
    layer, outer, _ = _parts(layout)
    # outside the layers: two models as stored, and one matrix more while it is read or its parts are converted
    matrices = stored_bytes * (2 * outer + _size(layout.shapes[layout.head]))
    if gradients:  # the point and its gradient, a row's gradient, Δ and the product with it
        matrices, copies = matrices + 6 * FLOAT * outer, 8
    else:
        copies = 3
    held = stored_bytes * outer if teacher else 0
    return held + max(copies * FLOAT * layer, matrices)


def _merged_streamed(layout: Layout, experts: int, stored_bytes: int, *, gradients: bool) -> int:
    """Most that weights take where a merge is formed layer by layer: all models' parts, and the merge's own."""
    layer, outer, largest = _parts(layout)
    # outside the layers: every model as stored, each matrix of them in float32 while it is mixed, and one difference
    wide = experts + 1 if stored_bytes < FLOAT else 0
    matrices = stored_bytes * (experts + 1) * outer + FLOAT * (outer + (wide + 1) * largest)
    if gradients:  # in a layer: the merge, a gradient and a row's, base, expert, and the product of two of them
        return FLOAT * outer + max(max(experts + 3, 7) * FLOAT * layer, matrices)
    return max((experts + 3) * FLOAT * layer, matrices)


def _merged_resident(layout: Layout, experts: int, stored_bytes: int, *, gradients: bool) -> int:
    """Most that weights take where all models and the merge of the moment are held."""
    layer, outer, largest = _parts(layout)
    working = 2 * largest
    if gradients:  # their sum, and a row's
        working = outer + 3 * largest + 3 * layer
    return resident_weights(layout, experts + 2) + FLOAT * working


def _beside_merging(layout: Layout, experts: int, longest: int, *, gradients: bool) -> int:
    """What merges take beside weights and residual streams: one row's blocks and logits, and numbers per unit."""
    vocabulary = layout.shapes[layout.head][0]
    numbers = 2 * (10 * layout.hidden + 5 * layout.neurons) + 4 * vocabulary + 2 * layout.heads * longest
    units = sum(layout.shape(kind)[0] * layout.shape(kind)[1] for kind in layout.counts) if gradients else 0
    return FLOAT * longest * numbers + DOUBLE * NUMBERS_PER_UNIT * units * experts


def _parts(layout: Layout) -> tuple[int, int, int]:
    """Weights of a layer, of what is outside the layers, and of the largest matrix there."""
    layer = sum(_size(layout.shapes[name]) for name in layout.layer_tensors(0))
    outer = [_size(layout.shapes[name]) for name in layout.outer_tensors()]
    return layer, sum(outer), max(outer)


def _size(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
