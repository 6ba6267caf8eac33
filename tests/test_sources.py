"""What is known of a model before it is downloaded: from its files, its index, its configuration, the hub's cache."""

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import CONFIG, family, llama_shapes
from hubcache import hub_cache

from wpmerge.errors import CheckpointError
from wpmerge.sources import find_source, identity, itemsize, parameters, shapes_of


def test_a_directory_with_weights_is_sized_by_its_files(tmp_path: Path) -> None:
    made = family(tmp_path, experts=1, shards=2)
    base, expert = (find_source(str(made[name])) for name in ("base", "e0"))
    for source, files in ((base, made["base"]), (expert, made["e0"])):
        assert (source.place, source.complete, source.sized) == ("here", True, "files")
        assert source.nbytes == sum(file.stat().st_size for file in files.glob("*.safetensors"))


def test_a_configuration_alone_gives_the_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    source = find_source(str(tmp_path))
    shapes = llama_shapes()
    assert shapes_of(CONFIG) == shapes
    numbers = sum(a * b for a, b in ((shape[0], shape[1] if len(shape) > 1 else 1) for shape in shapes.values()))
    assert (parameters(CONFIG), source.nbytes, source.sized, source.complete) == (numbers, 2 * numbers, "config", False)
    assert [itemsize({"dtype": "float32"}), itemsize({"torch_dtype": "float16"}), itemsize({})] == [4, 2, 4]


def test_an_index_without_its_shards_gives_the_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    index = {"metadata": {"total_size": 123}, "weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    source = find_source(str(tmp_path))
    assert (source.nbytes, source.sized, source.complete) == (123, "index", False)


def test_the_cache_is_looked_into_and_the_network_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_cache(tmp_path, {"owner/known": CONFIG}, monkeypatch)
    known, unknown = find_source("owner/known"), find_source("owner/unknown@main")
    assert (known.place, known.sized, known.complete) == ("hub", "config", False)
    assert known.nbytes == 2 * parameters(CONFIG)
    assert (unknown.place, unknown.nbytes, unknown.config, unknown.path) == ("hub", None, None, None)
    for weights in family(tmp_path / "made", experts=0)["base"].glob("*.safetensors"):
        assert known.path is not None
        shutil.copy(weights, known.path)
    found = find_source("owner/known")
    assert (found.place, found.complete, found.sized) == ("cache", True, "files")


def test_what_is_neither_here_nor_a_hub_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        find_source(str(tmp_path / "a" / "b" / "c"))
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "auto_map": {"AutoModel": "x.y"}}))
    with pytest.raises(CheckpointError, match="run code of its own"):
        find_source(str(tmp_path))
    assert find_source(str(tmp_path), trust_remote_code=True).config


def test_an_identity_is_of_the_content(tmp_path: Path) -> None:
    made = family(tmp_path, experts=1)
    one = identity(made["base"])
    shutil.copytree(made["base"], tmp_path / "copy")
    assert identity(tmp_path / "copy") == one != identity(made["e0"])
    weights = tmp_path / "copy" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert identity(tmp_path / "copy") != one
