"""Whole checkpoints of several kinds pass, holes and wrong shapes do not, and errors say what they are."""

import json
from pathlib import Path

import pytest
import torch
from families import write_family
from safetensors.torch import load_file

from wpmerge.errors import EvaluationError
from wpmerge.loading import check_weights, loading
from wpmerge.memory import ran_out_of_memory


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox"])
def test_whole_checkpoints_pass(tmp_path: Path, kind: str) -> None:
    check_weights("m", write_family(tmp_path, (), kind=kind)["base"], {})


def test_holes_are_found_in_pickles_too(tmp_path: Path) -> None:
    folder = write_family(tmp_path, ())["base"]
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    lacking = [name for name in sorted(tensors) if "mlp.up_proj" in name]
    torch.save({name: each for name, each in tensors.items() if name not in lacking}, folder / "pytorch_model.bin")
    with pytest.raises(EvaluationError) as caught:
        check_weights("m", folder, {})
    assert caught.value.where == f"m: {folder}"
    assert caught.value.got == f"no {lacking[0]} and {len(lacking) - 1} more"


def test_a_configuration_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = write_family(tmp_path, ())["base"]
    config = json.loads((folder / "config.json").read_text())
    rows = config["intermediate_size"]
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 2 * rows}))
    with pytest.raises(EvaluationError, match=r"another shape(.|\n)*mlp.down_proj.weight \(\d+, \d+\) and \d+ more"):
        check_weights("m", folder, {})
    check_weights("m", folder, {"subfolder": "elsewhere"})  # other weights than these are loaded
    (folder / "config.json").write_text("{")
    with pytest.raises(EvaluationError, match="cannot be loaded"):
        check_weights("m", folder, {})


def test_memory_errors_are_told_from_others() -> None:
    assert ran_out_of_memory(torch.OutOfMemoryError("x")) and ran_out_of_memory(MemoryError())
    assert ran_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not ran_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_errors_that_are_clear_already_pass_unchanged() -> None:
    error = EvaluationError("clear")
    with pytest.raises(EvaluationError) as caught, loading("m", "path", "hf"):
        raise error
    assert caught.value is error
    with pytest.raises(ZeroDivisionError), loading("m", "path", "hf"):
        raise ZeroDivisionError
