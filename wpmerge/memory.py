"""How much memory scoring may hold, and what that leaves for weights and for residual streams."""

import contextlib
import ctypes
import importlib
import os
from dataclasses import dataclass

import torch

from wpmerge.arch import Layout
from wpmerge.errors import WpmergeError

HELD_BYTES = 1 << 30
"""Residual streams and block inputs held by default, bytes."""
LEAST_HELD = 1 << 26
"""Below this, work is cut into pieces too small to be worth their overhead."""
FLOAT = 4
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
    if most is None:
        return Budget(resident=resident)
    room = most - resident_bytes()
    streamed = _streamed_bytes(layout, stored_bytes, gradients=gradients, teacher=teacher)
    if room < streamed + LEAST_HELD:
        raise WpmergeError(
            "scoring does not fit into --max-memory",
            got=f"{most / 1e6:,.0f} MB",
            expected=f"at least {(most - room + streamed + LEAST_HELD) / 1e6:,.0f} MB",
            mend="give more, or score a smaller model",
        )
    whole = resident_weights(layout, models)
    kept = resident and room >= whole + streamed + LEAST_HELD
    return Budget(resident=kept, held_bytes=min(HELD_BYTES, (room - streamed - (whole if kept else 0)) // 2))


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
    layer = sum(_size(layout.shapes[name]) for name in layout.layer_tensors(0))
    outer = sum(_size(layout.shapes[name]) for name in layout.outer_tensors())
    # outside the layers: two models as stored, and one matrix more while it is read or its parts are converted
    matrices = stored_bytes * (2 * outer + _size(layout.shapes[layout.head]))
    if gradients:  # the point and its gradient, a row's gradient, Δ and the product with it
        matrices, copies = matrices + 6 * FLOAT * outer, 8
    else:
        copies = 3
    held = stored_bytes * outer if teacher else 0
    return held + max(copies * FLOAT * layer, matrices)


def _size(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    judge = importlib.import_module("accelerate.utils.memory").should_reduce_batch_size  # knows the CPU's message too
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(judge(error))
