"""Compiled loops against the reference in plain tensor operations, to the bit."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

import wpmerge.fused
import wpmerge.jobs
import wpmerge.trims
from wpmerge import array_kernels, kernels
from wpmerge.blocks import TensorMerge
from wpmerge.checkpoint import open_checkpoint
from wpmerge.checksum import KEYS, PERIOD, Checksum, checksum, odd_numbers
from wpmerge.dtypes import Dtype
from wpmerge.errors import CheckpointError, RecipeError, WpmergeError
from wpmerge.fused import FusedMerge, can_fuse
from wpmerge.jobs import Factor, Job, Term, blocks
from wpmerge.merging import merge_recipe
from wpmerge.shards import OutputTensor, Place, layout_shards
from wpmerge.streaming import merge_jobs
from wpmerge.workspace import Workspace

# zeros of both signs, subnormals, neighbours of 1 that make rounding ties, magnitudes whose sums overflow
ODD = [0.0, -0.0, 1e-40, -1e-40, 9.2e-41, 1.0, 1.0078125, -0.99609375, 256.0, 3.3e38, -3.3e38, math.inf, math.nan]


def opened(place, tensors):
    return [open_checkpoint(write_checkpoint(place / str(i), {"x": tensor})) for i, tensor in enumerate(tensors)]


def job_of(models, coefficients, *, method="task_arithmetic", densities=None, normalize=False, scale=1.0):
    densities = densities or [1.0] * len(coefficients)
    terms = tuple(
        Term(checkpoint=model, tensor="x", coefficient=coefficient, density=density)
        for model, coefficient, density in zip(models[1:], coefficients, densities, strict=False)
    )
    output = OutputTensor(name="x", shape=models[0].tensors["x"].shape, dtype=Dtype.BF16)
    return Job(output=output, base=(models[0], "x"), terms=terms, method=method, normalize=normalize, scale=scale)


def by_plain(made, shape):
    """The bits of a tensor, or the error that its making ends in."""
    out = torch.empty(math.prod(shape), dtype=torch.bfloat16)
    try:
        for start, stop in blocks(shape):
            out[start:stop] = made.block(start, stop)
    except WpmergeError as error:
        return type(error), str(error)
    return out.view(torch.int16).tolist()


def by_loops(job, file, step, loops=kernels):
    """The same by compiled loops, or those in NumPy, ``step`` elements at a time; the plain way where they give up."""
    made, numel, total = FusedMerge(job, Workspace(), loops), math.prod(job.output.shape), Checksum()
    file.write_bytes(bytes(24))  # what stands before the tensor
    descriptor = os.open(file, os.O_RDWR)
    try:
        for start in range(0, numel, step):
            part = made.write(start, min(numel, start + step), Place(descriptor=descriptor, offset=24))
            if part is None:
                return by_plain(made.plain, job.output.shape)
            total.add_part(part)
    finally:
        os.close(descriptor)
    data = file.read_bytes()
    assert data[:24] == bytes(24)
    out = torch.frombuffer(bytearray(data[24:]), dtype=torch.bfloat16)
    assert total.text() == checksum(out)
    return out.view(torch.int16).tolist()


@given(
    method=st.sampled_from(["task_arithmetic", "ties"]),
    shape=st.sampled_from([(1,), (7,), (5000,), (3, 1700), (700, 7), (9, 20, 25), (2049, 2)]),
    axes=st.lists(st.sampled_from([None, 0, 1]), min_size=1, max_size=4),
    densities=st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.93, 1.0]), min_size=4, max_size=4),
    normalize=st.booleans(),
    scale=st.sampled_from([1.0, 0.7]),
    negative=st.booleans(),
    coarse=st.booleans(),
    odd=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 10**6), st.sampled_from(ODD)), max_size=6),
    zeros=st.booleans(),
    block=st.sampled_from([8, 1000, 2**18]),
    sample=st.sampled_from([512, 2048]),
    tile=st.sampled_from([64, 2**15]),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_fused_is_plain(
    tmp_path_factory,
    method,
    shape,
    axes,
    densities,
    normalize,
    scale,
    negative,
    coarse,
    odd,
    zeros,
    block,
    sample,
    tile,
    seed,
):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for _ in range(len(axes) + 1)]
    if coarse:  # many equal magnitudes
        tensors = [(tensor * 4).round() / 4 for tensor in tensors]
    if zeros:  # a vote between zeros of either sign
        tensors = [torch.where(torch.rand(shape, generator=generator) < 0.3, t.sign() * 0.0, t) for t in tensors]
    tensors = [tensor.bfloat16() for tensor in tensors]
    for which, place, value in odd:
        tensors[which % len(tensors)].view(-1)[place % math.prod(shape)] = value
    models = opened(tmp_path_factory.mktemp("fused"), tensors)
    coefficients = []
    for wanted in axes:
        axis = wanted if wanted is not None and wanted < len(shape) else None
        values = torch.rand(() if axis is None else shape[axis], generator=generator) - 0.5 * negative
        coefficients.append(Factor(values=values.numpy(), axis=axis))
    job = job_of(models, coefficients, method=method, densities=densities, normalize=normalize, scale=scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wpmerge.jobs, "BLOCK_ELEMENTS", block)
        patch.setattr(wpmerge.trims, "SAMPLE", sample)
        patch.setattr(wpmerge.trims, "_RUN", 256)
        assert can_fuse(job)
        plain = by_plain(TensorMerge(job, Workspace()), shape)
        file, step = tmp_path_factory.mktemp("out") / "x", block if method == "task_arithmetic" else 2**20
        assert by_loops(job, file, step) == plain
        if method == "task_arithmetic":
            patch.setattr(array_kernels, "TILE", tile)
            assert by_loops(job, file, step, array_kernels) == plain


def test_no_product_is_fused_with_a_sum(tmp_path):
    """A fused multiply-add would leave the rounding error of the first product."""
    term = torch.tensor([1.0078125]).bfloat16()
    number = 1 + 2.0**-20
    models = opened(tmp_path, [torch.zeros(1).bfloat16(), term, term])
    job = job_of(models, [Factor.of(number), Factor.of(-number)])
    for loops in (kernels, array_kernels):
        assert by_loops(job, tmp_path / "x", 8, loops) == [0]


NUMPY, COMPILED = 2**60, 0
"""WORTH_COMPILING that lets a merge of task arithmetic run in NumPy, or in compiled loops."""


@pytest.mark.parametrize("worth", [NUMPY, COMPILED])
def test_a_file_that_shrinks_is_refused(tmp_path, monkeypatch, worth):
    monkeypatch.setattr(wpmerge.fused, "WORTH_COMPILING", worth)
    models = opened(tmp_path, [torch.zeros(400).bfloat16(), torch.ones(400).bfloat16()])
    file = tmp_path / "1" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    for method in ("task_arithmetic", "ties"):
        job = job_of(models, [Factor.of(2.0)], method=method, densities=[0.5])
        (tmp_path / method).mkdir()
        with pytest.raises(CheckpointError, match="became shorter"):
            merge_jobs([job], layout_shards([job.output], 10**9), tmp_path / method)


@given(
    n=st.sampled_from([1, 40, 5000]),
    low=st.floats(0, 1, width=32),
    width=st.integers(0, 2**22),
    coarse=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_look_counts_and_collects(n, low, width, coarse, seed):
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randn(3, n, generator=generator)
    stored = ((stored * 4).round() / 4 if coarse else stored).bfloat16()
    lows = np.array([low, low / 2], np.float32).view(np.uint32)
    highs = lows + np.uint32(width)
    over, inside, kept = np.zeros(2, np.int64), np.zeros(2, np.int64), np.zeros((2, n), np.uint32)
    collect = np.array([True, False])
    kernels.look(stored.view(torch.uint16).numpy(), n, lows, highs, collect, over, inside, kept)
    bits = (stored[1:].float() - stored[0].float()).abs().numpy().view(np.uint32)
    within = (bits >= lows[:, None]) & (bits <= highs[:, None])
    assert over.tolist() == (bits > highs[:, None]).sum(1).tolist()
    assert inside.tolist() == within.sum(1).tolist()
    assert kept[0, : inside[0]].tolist() == bits[0][within[0]].tolist()


@pytest.mark.parametrize("n", [1, 3, 4, 1001, 3 * 4 * PERIOD + 6])
@pytest.mark.parametrize("step", [4, 4 * PERIOD - 8, 4 * PERIOD, 10**6])
def test_dot64_is_the_checksum(n, step):
    if step == 4 and n > 2000:
        pytest.skip("a hundred thousand calls say no more")
    numbers = np.random.default_rng(n).integers(0, 2**16, n, np.uint16)
    total = np.zeros(1, np.uint64)
    for start in range(0, n, step):
        kernels.dot64(numbers[start : start + step], start, KEYS, odd_numbers(2 * n), total)
    made = Checksum()
    made.add_part(int(total[0]))
    assert made.text() == checksum(torch.tensor(numbers.view(np.int16)))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_what_cannot_be_written_is_left_to_the_plain_way(tmp_path, method):
    models = opened(tmp_path, [torch.zeros(400).bfloat16(), torch.ones(400).bfloat16()])
    job = job_of(models, [Factor.of(2.0)], method=method, densities=[0.5])
    (tmp_path / "x").touch()
    with (tmp_path / "x").open("rb") as file:
        place = Place(descriptor=file.fileno(), offset=0)
        for loops in (kernels, array_kernels) if method == "task_arithmetic" else (kernels,):
            assert FusedMerge(job, Workspace(), loops).write(0, 400, place) is None


def family(place, shape=(300, 70)):
    generator = torch.Generator().manual_seed(0)
    names = ["a", "b", "c"]
    return [
        open_checkpoint(
            write_checkpoint(place / f"m{i}", {n: torch.randn(shape, generator=generator).bfloat16() for n in names})
        )
        for i in range(3)
    ], names


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_merges_on_disk_are_the_same_with_any_threads(tmp_path, monkeypatch, method):
    monkeypatch.setattr(wpmerge.jobs, "BLOCK_ELEMENTS", 1024)
    monkeypatch.setattr(wpmerge.trims, "SAMPLE", 2048)
    models, names = family(tmp_path)
    jobs = [
        Job(
            output=OutputTensor(name=name, shape=(300, 70), dtype=Dtype.BF16),
            base=(models[0], name),
            terms=tuple(
                Term(
                    checkpoint=model,
                    tensor=name,
                    coefficient=Factor(values=torch.rand(70).numpy(), axis=1),
                    density=0.4,
                )
                for model in models[1:]
            ),
            method=method,
            normalize=method == "ties",
        )
        for name in names
    ]
    shards = layout_shards([job.output for job in jobs], 10**5)
    found = []
    for number, (worth, threads) in enumerate([(None, 1), (NUMPY, 1), (NUMPY, 4), (COMPILED, 1), (COMPILED, 4)]):
        with monkeypatch.context() as patch:
            if worth is None:
                patch.setattr("wpmerge.streaming.load_kernels", lambda jobs: None)  # torch
            else:
                patch.setattr(wpmerge.fused, "WORTH_COMPILING", worth)
            out = tmp_path / str(number)
            out.mkdir()
            checksums = merge_jobs(jobs, shards, out, threads=threads)
        found.append((checksums, [(out / shard.name).read_bytes() for shard in shards]))
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("worth", [NUMPY, COMPILED])
def test_what_is_not_finite_is_refused_by_name(tmp_path, monkeypatch, method, culprit, value, worth):
    monkeypatch.setattr(wpmerge.fused, "WORTH_COMPILING", worth)
    tensors = [torch.zeros(30, 20).bfloat16(), torch.ones(30, 20).bfloat16()]
    tensors[culprit][13, 7] = value
    models = opened(tmp_path, tensors)
    job = job_of(models, [Factor.of(0.0)], method=method, densities=[0.5])
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="flat index 267") as caught:
        merge_jobs([job], layout_shards([job.output], 10**9), tmp_path / "out")
    assert caught.value.where == f"x in {tmp_path / str(culprit) / 'model.safetensors'}"


@pytest.mark.parametrize("worth", [NUMPY, COMPILED])
def test_overflow_is_refused(tmp_path, monkeypatch, worth):
    monkeypatch.setattr(wpmerge.fused, "WORTH_COMPILING", worth)
    models = opened(tmp_path, [torch.zeros(4).bfloat16(), torch.full((4,), 3e38).bfloat16()])
    job = job_of(models, [Factor.of(2.0)])
    (tmp_path / "out").mkdir()
    with pytest.raises(RecipeError, match="overflows bfloat16"):
        merge_jobs([job], layout_shards([job.output], 10**9), tmp_path / "out")


def test_numpy_serves_where_it_serves_for_the_whole_merge(tmp_path):
    half = torch.ones(4, 4).bfloat16()
    models = opened(tmp_path, [half, half, half.float()])
    one = job_of(models[:2], [Factor.of(1.0)])
    ties, mixed = job_of(models[:2], [Factor.of(1.0)], method="ties"), job_of([models[0], models[2]], [Factor.of(1.0)])
    assert wpmerge.fused.load_kernels([one, one]) is array_kernels
    for other in (ties, mixed):
        assert wpmerge.fused.load_kernels([one, other]) is None


@pytest.mark.parametrize("shape", [(4, 300, 7), (3, 2, 40_000), (70_000,)])
def test_coefficients_along_any_axis_in_numpy(tmp_path, shape):
    """Runs of one coefficient that begin before a tile and end after it, and vectors longer than one."""
    generator = torch.Generator().manual_seed(0)
    models = opened(tmp_path, [torch.randn(shape, generator=generator).bfloat16() for _ in range(3)])
    for axis in range(len(shape)):
        values = torch.rand(shape[axis], generator=generator).numpy()
        job = job_of(models, [Factor(values=values, axis=axis), Factor.of(0.5)])
        assert by_loops(job, tmp_path / "x", 2**20, array_kernels) == by_plain(TensorMerge(job, Workspace()), shape)


def test_only_jobs_that_are_bfloat16_throughout_are_fused(tmp_path):
    half = torch.ones(4, 4).bfloat16()
    models = opened(tmp_path, [half, half, half.float()])
    one = Factor.of(1.0)
    assert can_fuse(job_of(models[:2], [one]))
    assert not can_fuse(job_of([models[0], models[2]], [one]))
    assert not can_fuse(job_of([models[2], models[0]], [one]))
    assert not can_fuse(job_of(models[:2], [one], method="dare_ties"))
    assert not can_fuse(job_of(models[:1], []))


def imported_by_a_merge(place, recipe, worth, *options):
    """Which of torch and numba a merge by the command line imports, in a process of its own."""
    program = f"""
import sys
import wpmerge.fused
from wpmerge.cli import main
wpmerge.fused.WORTH_COMPILING = {worth}
try:
    main()
finally:
    print("imported", *(name for name in ("torch", "numba") if name in sys.modules))
"""
    command = [sys.executable, "-c", program, "merge", str(recipe), "--out", str(place), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def two_expert_recipe(file, models, method):
    density = ", density: 0.5" if method == "ties" else ""
    listed = "".join(f"  - {{model: {m.path}, parameters: {{weight: 0.5{density}}}}}\n" for m in models[1:])
    file.write_text(f"merge_method: {method}\nbase_model: {models[0].path}\nmodels:\n{listed}dtype: bfloat16\n")
    return file


@pytest.mark.parametrize(("method", "expected"), [("task_arithmetic", set()), ("ties", {"torch"})])
def test_small_merges_import_neither_numba_nor_torch_without_need(tmp_path, monkeypatch, method, expected):
    models, _ = family(tmp_path)
    recipe, out = two_expert_recipe(tmp_path / "recipe.yml", models, method), tmp_path / "out"
    assert imported_by_a_merge(out, recipe, wpmerge.fused.WORTH_COMPILING) == expected
    monkeypatch.setattr("wpmerge.streaming.load_kernels", lambda jobs: None)
    merge_recipe(recipe, tmp_path / "plain")
    for file in ("model.safetensors", "merge.json"):
        assert (out / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("threads", ["1", "2"])
def test_compiled_merges_do_not_import_torch(tmp_path, monkeypatch, method, threads):
    """A small tensor, whose magnitudes are all held, and one of which TIES takes a sample."""
    generator = torch.Generator().manual_seed(0)
    names = {"a": (300, 70), "b": (400, 300)}
    tensors = [{n: torch.randn(s, generator=generator).bfloat16() for n, s in names.items()} for _ in range(3)]
    models = [open_checkpoint(write_checkpoint(tmp_path / str(i), t)) for i, t in enumerate(tensors)]
    recipe, out = two_expert_recipe(tmp_path / "recipe.yml", models, method), tmp_path / "out"
    assert imported_by_a_merge(out, recipe, 0, "--threads", threads) == {"numba"}
    monkeypatch.setattr("wpmerge.streaming.load_kernels", lambda jobs: None)
    merge_recipe(recipe, tmp_path / "plain")
    for file in ("model.safetensors", "merge.json"):
        assert (out / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_machine_code_that_cannot_be_kept_is_used_all_the_same(tmp_path):
    """The kernel's limit on a file's size stands for a full disk."""
    program = """
import resource, signal
from wpmerge import kernels
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))
kernels.prepare(ties=False)
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert not [file for file in (tmp_path / "cache").rglob("*.nbc") if file.stat().st_size]


def test_without_numba_a_large_merge_says_so_and_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wpmerge.fused, "WORTH_COMPILING", 0)
    monkeypatch.setitem(sys.modules, "wpmerge.kernels", None)
    monkeypatch.delattr("wpmerge.kernels")
    models = opened(tmp_path, [torch.zeros(4).bfloat16(), torch.ones(4).bfloat16()])
    job = job_of(models, [Factor.of(2.0)])
    assert wpmerge.fused.load_kernels([job]) is None
    assert "numba cannot be used" in caplog.text
