"""One thread, since machines that run tests are shared; and every jaxtyping signature of the package is checked."""

import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
install_import_hook("wpmerge", "beartype.beartype")
