"""One thread and no deadlines, since machines that run tests are shared; jaxtyping's signatures of the maths hold."""

import hypothesis
import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")
MATHS = ("arch", "weights", "rows", "engine", "readouts", "anchor", "attribution", "patching", "gradients")
CHOICES = ("screening", "coefficients", "calibration", "operators")
install_import_hook([f"wpmerge.{module}" for module in MATHS + CHOICES], "shapecheck.checked")
