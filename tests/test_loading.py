"""Whole checkpoints of several kinds pass, holes and wrong shapes do not, and errors say what they are."""

import errno
import json
from pathlib import Path

import pytest
import torch
from families import write_family
from safetensors.torch import load_file, save_file

from wpmerge.errors import EvaluationError, ran_out_of_memory
from wpmerge.loading import check_weights, loading


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


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"num_hidden_layers": "six"}, "num_hidden_layers(.|\n)*expected int, got str"),
        ({"rms_norm_eps": None}, "rms_norm_eps(.|\n)*expected float, got None"),
        ({"num_attention_heads": 7}, r"not a multiple of the number of attention heads \(7\)"),
    ],
)
def test_values_that_no_configuration_may_have_are_named(tmp_path: Path, entry: dict[str, object], said: str) -> None:
    folder = write_family(tmp_path, ())["base"]
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entry))
    with pytest.raises(EvaluationError, match=rf"cannot be loaded(.|\n)*m: (.|\n)*{said}"):
        check_weights("m", folder, {})


@pytest.mark.parametrize(
    ("kind", "first"), [("llama", "model.layers.1."), ("gpt_neox", "gpt_neox.layers.1."), ("gpt2", "transformer.h.1.")]
)
def test_layers_that_the_configuration_does_not_count_are_refused(tmp_path: Path, kind: str, first: str) -> None:
    folder = write_family(tmp_path, (), kind=kind)["base"]
    file = folder / "config.json"
    config = json.loads(file.read_text())
    key = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    for count in (1, 0):
        file.write_text(json.dumps({**config, key: count, "layer_types": None}))
        with pytest.raises(EvaluationError, match="more layers than its configuration says") as caught:
            check_weights("m", folder, {})
        assert str(caught.value.got).startswith(first.replace("1", str(count)))
        assert caught.value.expected == f"tensors of {count} layers"


def test_other_tensors_that_a_model_has_not_are_left_alone(tmp_path: Path) -> None:
    folder = write_family(tmp_path, ())["base"]
    weights = folder / "model.safetensors"
    beside = {name: torch.zeros(2) for name in ("extra.weight", "vision_tower.encoder.layers.40.mlp.weight")}
    save_file(load_file(weights) | beside, weights, metadata={"format": "pt"})
    check_weights("m", folder, {})


def test_memory_errors_are_told_from_others() -> None:
    assert ran_out_of_memory(torch.OutOfMemoryError("x")) and ran_out_of_memory(MemoryError())
    assert ran_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert ran_out_of_memory(caught.value) and ran_out_of_memory(OSError(errno.ENOMEM, "x"))
    assert not ran_out_of_memory(RuntimeError(5)) and not ran_out_of_memory(OSError(errno.ENOSPC, "x"))
    assert not ran_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_errors_that_are_clear_already_pass_unchanged() -> None:
    error = EvaluationError("clear")
    with pytest.raises(EvaluationError) as caught, loading("m", "path", "hf"):
        raise error
    assert caught.value is error
    for kind in (ZeroDivisionError, KeyboardInterrupt, SystemExit):
        with pytest.raises(kind), loading("m", "path", "hf"):
            raise kind
