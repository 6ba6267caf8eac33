import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from wpmerge.dtypes import Dtype
from wpmerge.errors import CheckpointError
from wpmerge.tensorfile import MAX_HEADER_BYTES, SafetensorsFile, check_finite, open_tensor_file


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def test_reads_what_safetensors_wrote_in_every_dtype(file):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randn(2, 2, 2).half(),
        "d": torch.randn(4).double(),
        "e": torch.arange(6, dtype=torch.int64),
        "f": torch.tensor([True, False, True]),
        "g": torch.tensor(3.5),
        "h": torch.empty(0, 4),
    }
    safetensors.torch.save_file(tensors, file)
    opened = SafetensorsFile(file)
    assert set(opened.tensors) == set(tensors)
    for name, tensor in tensors.items():
        info = opened.tensors[name]
        assert (info.shape, info.dtype.torch, info.numel) == (tuple(tensor.shape), tensor.dtype, tensor.numel())
        assert torch.equal(opened.read(name, 0, info.numel), tensor.reshape(-1))
        if info.numel:
            with file.open("rb") as stream:
                stream.seek(info.offset)
                assert stream.read(info.nbytes) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@given(start=st.integers(0, 60), length=st.integers(0, 60))
def test_a_block_is_that_slice(tmp_path_factory, start, length):
    path = tmp_path_factory.getbasetemp() / "slices.safetensors"
    values = torch.arange(120).float().view(10, 12)
    if not path.exists():
        safetensors.torch.save_file({"x": values}, path)
    assert torch.equal(
        SafetensorsFile(path).read("x", start, start + length), values.reshape(-1)[start : start + length]
    )


@pytest.mark.parametrize(
    ("header", "data", "complaint"),
    [
        (b"not json", b"", "malformed header"),
        (b"[1]", b"", "malformed header"),
        (b"[" * 100000, b"", "malformed header"),
        (b'{"x": %s, "x": %s}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2), b"1234", "'x' occurs twice"),
        ({"x": entry([1], 0, 8)}, b"12345678", "contradicts itself"),
        ({"x": entry([2], 0, 8)}, b"1234", "ends before tensor x"),
        ({"x": entry([-1], 0, 4)}, b"1234", "malformed header entry"),
        ({"x": entry([True], 0, 4)}, b"1234", "malformed header entry"),
        ({"x": entry([1], 4, 0)}, b"1234", "malformed header entry"),
        ({"x": {"dtype": "F32"}}, b"1234", "malformed header entry"),
        ({"x": 3}, b"1234", "malformed header entry"),
        ({"x": entry([1], 0, 4, dtype="F8_E4M3")}, b"1234", "unsupported dtype"),
        ({"x": entry([1], 0, 4, dtype=["F32"])}, b"1234", "unsupported dtype"),
        ({"x": entry([1], 0, 4), "y": entry([1], 0, 4)}, b"1234", "overlaps"),
        ({"x": entry([1], 0, 4), "y": entry([1], 8, 12)}, b"123412341234", "gap"),
        ({"x": entry([1], 0, 4)}, b"12345678", "belong to no tensor"),
        ({"x": entry([10**30], 0, 4)}, b"1234", "contradicts itself"),
    ],
)
def test_a_header_that_lies_is_refused_with_its_file(file, header, data, complaint):
    with pytest.raises(CheckpointError, match=complaint) as caught:
        SafetensorsFile(raw(file, header, data))
    assert caught.value.where == file


@pytest.mark.parametrize("size", [0, 5, 8, 60])
def test_a_file_cut_anywhere_is_refused(file, size):
    safetensors.torch.save_file({"x": torch.ones(100)}, file)
    os.truncate(file, size)
    with pytest.raises(CheckpointError, match="ends inside its header"):
        SafetensorsFile(file)


def test_a_file_cut_in_its_data_names_the_tensor(file):
    safetensors.torch.save_file({"x": torch.ones(100)}, file)
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(CheckpointError, match="ends before tensor x does"):
        SafetensorsFile(file)


def test_a_huge_header_is_refused_without_reading_it(file):
    with file.open("wb") as stream:
        stream.write((100_000_000).to_bytes(8, "little"))
        stream.truncate(8 + 100_000_000)  # sparse: the header is there, all 100 MB of it
    with pytest.raises(CheckpointError, match="too large") as caught:
        SafetensorsFile(file)
    assert str(MAX_HEADER_BYTES) in str(caught.value)


def test_a_file_that_shrinks_under_us_is_noticed(file):
    safetensors.torch.save_file({"x": torch.ones(100)}, file)
    opened = SafetensorsFile(file)
    os.truncate(file, file.stat().st_size - 40)
    with pytest.raises(CheckpointError, match="became shorter"):
        opened.read("x", 0, 100)


def test_files_are_closed_with_their_object(file):
    safetensors.torch.save_file({"x": torch.ones(4)}, file)
    before = len(list(Path("/proc/self/fd").iterdir()))
    opened = [SafetensorsFile(file) for _ in range(20)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 20
    del opened
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_reads_a_legacy_pickle_and_its_views(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    values = torch.arange(12).float().view(3, 4)
    torch.save({"x": values, "t": values.T, "h": values.half()}, path)
    opened = open_tensor_file(path)
    assert torch.equal(opened.read("x", 2, 9), values.reshape(-1)[2:9])
    assert torch.equal(opened.read("t", 1, 5), values.T.reshape(-1)[1:5])
    assert opened.tensors["t"].shape == (4, 3)
    assert opened.tensors["h"].dtype is Dtype.F16


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(marker),))

    torch.save({"x": Evil()}, tmp_path / "pytorch_model.bin")
    with (tmp_path / "old.bin").open("wb") as stream:
        pickle.dump({"x": Evil()}, stream)
    for name in ("pytorch_model.bin", "old.bin"):
        with pytest.raises(CheckpointError, match="nothing in it was executed"):
            open_tensor_file(tmp_path / name)
    assert not marker.exists()


def test_finite_check_names_place_and_first_value():
    check_finite(torch.full((4,), 3e38), where="x")  # the sum overflows, the values are finite
    check_finite(torch.tensor([1, 2]), where="x")
    block = torch.tensor([0.0, 1.0, float("inf"), float("nan")]).bfloat16()
    with pytest.raises(CheckpointError) as caught:
        check_finite(block, where="w in f", start=100)
    assert "w in f" in str(caught.value)
    assert "2 such value(s), the first, inf, at flat index 102" in str(caught.value)


@given(position=st.integers(0, 999), value=st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_finite_check_misses_no_place(position, value):
    block = torch.ones(1000)
    block[position] = value
    with pytest.raises(CheckpointError, match=f"index {position}$|index {position}\\n"):
        check_finite(block, where="x")
