"""One thread, since machines that run tests are shared; and the jaxtyping signatures of the maths are checked."""

import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
MATHS = ("arch", "weights", "rows", "engine", "readouts", "anchor", "attribution", "patching", "gradients")
CHOICES = ("screening", "coefficients", "calibration", "operators")
install_import_hook([f"wpmerge.{module}" for module in MATHS + CHOICES], "shapecheck.checked")
