import json

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from wpmerge.dtypes import Dtype
from wpmerge.shards import OutputTensor, ShardWriter, index_json, layout_shards

DTYPES = [Dtype.F32, Dtype.BF16, Dtype.F16, Dtype.F64, Dtype.I64, Dtype.BOOL]


def outputs(shapes, dtypes):
    return [
        OutputTensor(name=f"t{i}", shape=tuple(shape), dtype=dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
    limit=st.integers(1, 400),
    step=st.integers(1, 7),
)
def test_safetensors_reads_what_was_written_in_pieces(tmp_path_factory, shapes, dtypes, limit, step):
    directory = tmp_path_factory.mktemp("shards")
    tensors = outputs(shapes, dtypes[: len(shapes)])
    values = {t.name: (torch.randn(t.shape) * 3).to(t.dtype.torch) for t in tensors}
    shards = layout_shards(tensors, limit)
    for shard in shards:
        writer = ShardWriter(directory, shard)
        for tensor in reversed(shard.tensors):
            flat = values[tensor.name].reshape(-1)
            for start in reversed(range(0, flat.numel(), step)):
                writer.write(tensor.name, start, flat[start : start + step])
        assert not (directory / shard.name).exists()
        writer.close()
        assert (directory / shard.name).stat().st_size == shard.nbytes
        assert len(shard.tensors) == 1 or sum(t.nbytes for t in shard.tensors) <= limit
    found = {k: v for shard in shards for k, v in safetensors.torch.load_file(directory / shard.name).items()}
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {k: (v.shape, v.dtype) for k, v in values.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in values.items())


def test_the_header_is_the_one_safetensors_writes(tmp_path):
    values = {"b": torch.ones(3, dtype=torch.bfloat16), "a": torch.ones(2, 2), "c": torch.ones(1)}
    safetensors.torch.save_file(values, tmp_path / "theirs", metadata={"format": "pt"})
    tensors = [OutputTensor(name=name, shape=tuple(v.shape), dtype=Dtype.of(v.dtype)) for name, v in values.items()]
    (shard,) = layout_shards(tensors, 10**9)
    writer = ShardWriter(tmp_path, shard)
    for name, value in values.items():
        writer.write(name, 0, value.reshape(-1))
    writer.close()
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_names_and_index_are_transformers(tmp_path):
    shards = layout_shards(outputs([[4], [4], [4]], [Dtype.F32] * 3), 20)
    assert [shard.name for shard in shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads(index_json(shards))
    assert index["metadata"]["total_size"] == 48
    assert index["weight_map"]["t1"] == "model-00002-of-00003.safetensors"


def test_a_block_of_another_dtype_is_a_bug(tmp_path):
    (shard,) = layout_shards(outputs([[4]], [Dtype.F32]), 100)
    writer = ShardWriter(tmp_path, shard)
    with pytest.raises(ValueError, match="stored as"):
        writer.write("t0", 0, torch.ones(4).half())
    writer.abandon()
