"""One thread and no deadlines, since machines that run tests are shared; jaxtyping's signatures of the maths hold."""

import os

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes that tests start
MATHS = ("arch", "weights", "rows", "engine", "readouts", "anchor", "attribution", "patching", "gradients")
CHOICES = ("screening", "coefficients", "calibration", "operators")
install_import_hook([f"wpmerge.{module}" for module in MATHS + CHOICES], "shapecheck.checked")

LONGEST = (
    "demo",
    "family",
    "scoring",
    "patching",
    "refining",
    "proving",
    "faults",
    "bench",
    "kernels",
    "docs",
    "cli",
    "cli_report",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that two workers, a file at a time, end together."""
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
