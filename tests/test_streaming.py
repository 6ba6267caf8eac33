import math

import pytest
import torch
from checkpoints import write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

import wpmerge.jobs
from wpmerge.checkpoint import open_checkpoint
from wpmerge.dtypes import Dtype
from wpmerge.errors import CheckpointError, RecipeError
from wpmerge.jobs import Factor, Job, Term, blocks
from wpmerge.shards import OutputTensor, layout_shards
from wpmerge.streaming import job_dtype, merge_jobs, merge_tensor


@given(st.lists(st.integers(0, 2000), max_size=3))
def test_blocks_cover_a_tensor_once_and_stay_small(shape):
    shape = tuple(shape)
    ends = [0]
    for start, stop in blocks(shape):
        assert start == ends[-1] < stop
        assert stop - start <= wpmerge.jobs.BLOCK_ELEMENTS
        ends.append(stop)
    assert ends[-1] == math.prod(shape)


def job(base, others, coefficients, dtype, name="x"):
    shape = base.tensors[name].shape
    terms = tuple(
        Term(checkpoint=other, tensor=name, coefficient=coefficient)
        for other, coefficient in zip(others, coefficients, strict=True)
    )
    return Job(output=OutputTensor(name=name, shape=shape, dtype=Dtype.of(dtype)), base=(base, name), terms=terms)


@given(
    shape=st.lists(st.integers(1, 9), max_size=3),
    axes=st.lists(st.one_of(st.none(), st.integers(0, 2)), min_size=0, max_size=3),
    stored=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    out=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    block=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_any_coefficients_on_any_blocks_match_float64(tmp_path_factory, shape, axes, stored, out, block, seed):
    directory, generator = tmp_path_factory.mktemp("jobs"), torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator).to(stored) for _ in range(len(axes) + 1)]
    opened = [open_checkpoint(write_checkpoint(directory / str(i), {"x": tensor})) for i, tensor in enumerate(tensors)]
    exact, coefficients = tensors[0].double(), []
    for tensor, axis in zip(tensors[1:], axes, strict=True):
        vector = axis is not None and axis < len(shape)
        values = torch.rand(shape[axis] if vector else (), generator=generator)
        coefficients.append(Factor(values=values.numpy(), axis=axis if vector else None))
        wide = values.double().view([-1 if vector and i == axis else 1 for i in range(len(shape))])
        exact = exact + wide * (tensor.double() - tensors[0].double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wpmerge.jobs, "BLOCK_ELEMENTS", block)
        merged = merge_tensor(job(opened[0], opened[1:], coefficients, out))
    assert (merged.shape, merged.dtype) == (exact.shape, out)
    error = (merged.double() - exact).abs()
    scale = exact.abs() + sum(tensor.double().abs() for tensor in tensors)
    assert (error <= 2.0**-20 * scale + torch.finfo(out).eps / 2 * exact.abs() + 1e-7).all()


def test_almost_every_element_is_correctly_rounded(tmp_path):
    """Against float64 rounded once: only values next to a rounding boundary may differ, and by one place."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(400, 500, generator=generator).bfloat16()
    others = [(base.float() + 0.05 * torch.randn(400, 500, generator=generator)).bfloat16() for _ in range(3)]
    opened = [open_checkpoint(write_checkpoint(tmp_path / str(i), {"x": t})) for i, t in enumerate([base, *others])]
    numbers = [0.7, 0.9, 0.33]
    coefficients = [Factor.of(number) for number in numbers]
    merged = merge_tensor(job(opened[0], opened[1:], coefficients, torch.bfloat16))
    exact = base.double() + sum(
        float(torch.tensor(number)) * (other.double() - base.double())
        for number, other in zip(numbers, others, strict=True)
    )
    wrong = int((merged != exact.float().bfloat16()).sum())
    assert wrong <= 20  # of 200,000


def test_threads_and_shards_do_not_change_a_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(wpmerge.jobs, "BLOCK_ELEMENTS", 64)
    generator = torch.Generator().manual_seed(0)
    names = [f"x{i}" for i in range(6)]
    opened = [
        open_checkpoint(
            write_checkpoint(tmp_path / f"m{i}", {n: torch.randn(33, 21, generator=generator) for n in names})
        )
        for i in range(3)
    ]
    values = Factor(values=torch.rand(21, generator=generator).numpy(), axis=1)
    jobs = [job(opened[0], opened[1:], [values, values], torch.bfloat16, name=name) for name in names]
    results = []
    for threads, limit in [(1, 10**9), (4, 10**9), (3, 3000), (1, 1)]:
        out = tmp_path / f"out-{threads}-{limit}"
        out.mkdir()
        seen = []
        before = torch.get_num_threads()
        shards = layout_shards([job.output for job in jobs], limit)
        merge_jobs(
            jobs, shards, out, threads=threads, progress=lambda done, total, seen=seen: seen.append((done, total))
        )
        assert torch.get_num_threads() == before
        assert seen[-1] == (6 * 33 * 21 * 2, 6 * 33 * 21 * 2)
        assert seen == sorted(seen)
        import safetensors.torch

        results.append({k: v for shard in shards for k, v in safetensors.torch.load_file(out / shard.name).items()})
    for name in names:
        assert all(torch.equal(result[name], results[0][name]) for result in results)
        assert torch.equal(results[0][name], merge_tensor(jobs[names.index(name)]))


def test_finished_shards_are_not_made_again(tmp_path):
    opened = open_checkpoint(write_checkpoint(tmp_path / "m", {"a": torch.ones(8), "b": torch.ones(8)}))
    jobs = [job(opened, [], [], torch.float32, name=name) for name in ("a", "b")]
    shards = layout_shards([job.output for job in jobs], 32)
    out = tmp_path / "out"
    out.mkdir()
    merge_jobs(jobs, shards, out)
    first, second = (out / shard.name for shard in shards)
    times = first.stat().st_mtime_ns
    second.write_bytes(second.read_bytes()[:-1])  # not whole
    merge_jobs(jobs, shards, out)
    assert first.stat().st_mtime_ns == times
    assert second.stat().st_size == shards[1].nbytes


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_even_at_weight_zero(tmp_path, culprit, value, threads):
    tensors = [torch.zeros(30, 20), torch.ones(30, 20)]
    tensors[culprit][13, 7] = value
    opened = [open_checkpoint(write_checkpoint(tmp_path / f"m{i}", {"x": t})) for i, t in enumerate(tensors)]
    jobs = [job(opened[0], opened[1:], [Factor.of(0.0)], torch.bfloat16)]
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="flat index 267") as caught:
        merge_jobs(jobs, layout_shards([jobs[0].output], 10**9), tmp_path / "out", threads=threads)
    assert caught.value.where == f"x in {tmp_path / f'm{culprit}' / 'model.safetensors'}"


def test_overflow_of_the_output_dtype_is_refused(tmp_path):
    opened = [open_checkpoint(write_checkpoint(tmp_path / str(i), {"x": torch.full((4,), 4e4 * i)})) for i in (0, 1)]
    coefficient = Factor.of(2.0)
    assert merge_tensor(job(opened[0], opened[1:], [coefficient], torch.float32)).tolist() == [8e4] * 4
    with pytest.raises(RecipeError, match="overflows float16"):
        merge_tensor(job(opened[0], opened[1:], [coefficient], torch.float16))


def test_integers_keep_their_dtype():
    assert job_dtype(Dtype.I64, Dtype.BF16) is Dtype.I64
    assert job_dtype(Dtype.F32, Dtype.BF16) is Dtype.BF16
    assert job_dtype(Dtype.F32, None) is Dtype.F32
    with pytest.raises(CheckpointError, match="cannot be stored"):
        job_dtype(Dtype.F32, Dtype.I8)
