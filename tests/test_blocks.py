"""The in-place blocks against the pure operators, to the bit, and whole merges against float64."""

import math

import pytest
import torch
from checkpoints import CONFIG, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import wpmerge.jobs
from wpmerge import operators
from wpmerge.checkpoint import open_checkpoint
from wpmerge.dtypes import Dtype
from wpmerge.jobs import Factor, Job, Term, blocks
from wpmerge.merging import merge
from wpmerge.plan import Coefficient, Operator, Plan, input_model
from wpmerge.shards import OutputTensor
from wpmerge.streaming import merge_tensor

METHODS = ["task_arithmetic", "ties", "dare_linear", "dare_ties"]


def pure(job, tensors, factors):
    """A job's result by the functions of ``operators`` on whole tensors."""
    base = tensors[0].float().reshape(-1)
    deltas = [tensor.float().reshape(-1) - base for tensor in tensors[1:]]
    factors = [(torch.ones(job.output.shape) * factor).reshape(-1) for factor in factors]
    if job.method == "ties":
        deltas = [operators.keep_largest(d, t.density) for d, t in zip(deltas, job.terms, strict=True)]
    if job.method.startswith("dare"):
        deltas = [
            operators.drop_and_rescale(d, t.density, seed=t.seed) if t.density < 1 else d
            for d, t in zip(deltas, job.terms, strict=True)
        ]
    if job.method in ("ties", "dare_ties"):
        change = operators.ties(deltas, factors, normalize=job.normalize)
    else:
        change = operators.weighted_sum(deltas, factors, like=base)
    return (base + (change * job.scale if job.scale != 1 else change)).to(job.output.dtype.torch).view(job.output.shape)


@given(
    method=st.sampled_from(METHODS),
    shape=st.sampled_from([(7,), (13, 11), (40, 6), (3, 5, 4), (90, 40)]),
    stored=st.sampled_from([torch.float32, torch.bfloat16]),
    axes=st.lists(st.sampled_from([None, 0, 1]), min_size=1, max_size=3),
    densities=st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.93, 1.0]), min_size=3, max_size=3),
    normalize=st.booleans(),
    scale=st.sampled_from([1.0, 0.7]),
    negative=st.booleans(),
    block=st.sampled_from([8, 100, 2**18]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_in_place_is_pure(
    tmp_path_factory, method, shape, stored, axes, densities, normalize, scale, negative, block, seed
):
    generator, place = torch.Generator().manual_seed(seed), tmp_path_factory.mktemp("blocks")
    tensors = [torch.randn(shape, generator=generator).to(stored) for _ in range(len(axes) + 1)]
    opened = [open_checkpoint(write_checkpoint(place / str(i), {"x": tensor})) for i, tensor in enumerate(tensors)]
    coefficients = []
    for wanted in axes:
        axis = wanted if wanted is not None and wanted < len(shape) else None
        values = torch.rand(() if axis is None else shape[axis], generator=generator) - 0.5 * negative
        coefficients.append(Coefficient(values=values, axis=axis))
    if method == "task_arithmetic":
        densities, scale = [1.0] * 3, 1.0
    if method.startswith("dare"):
        densities = [max(density, 0.1) for density in densities]
    terms = tuple(
        Term(
            checkpoint=model,
            tensor="x",
            coefficient=Factor(values=coefficient.values.numpy(), axis=coefficient.axis),
            density=density,
            seed=seed * 10 + i,
        )
        for i, (model, coefficient, density) in enumerate(zip(opened[1:], coefficients, densities, strict=False))
    )
    job = Job(
        output=OutputTensor(name="x", shape=shape, dtype=Dtype.F32),
        base=(opened[0], "x"),
        terms=terms,
        method=method,
        normalize=normalize and method in ("ties", "dare_ties"),
        scale=scale,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wpmerge.jobs, "BLOCK_ELEMENTS", block)
        patch.setattr(wpmerge.trims, "SAMPLE", 1024)
        patch.setattr(wpmerge.trims, "_RUN", 256)
        made = merge_tensor(job)
    assert torch.equal(made, pure(job, tensors, [c.expand(shape) for c in coefficients]))


@pytest.mark.parametrize("shape", [(0,), (5, 0), (), (1,), (2**18 + 3,), (3, 2**18 + 1), (700, 401)])
def test_blocks_start_at_whole_words(shape):
    bounds = list(blocks(shape))
    assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds)][: len(bounds)]
    assert sum(stop - start for start, stop in bounds) == math.prod(shape)
    assert all(start % 8 == 0 for start, _ in bounds)


def float64_merge(tensors, factors, method, density, normalize):
    """The definition in float64: base + Σ c·δ, or the disjoint mean of what agrees with the elected sign."""
    base = tensors[0].double()
    deltas = [tensor.double() - base for tensor in tensors[1:]]
    if method == "ties":
        for delta in deltas:
            flat = delta.reshape(-1)
            keep = max(1, math.floor(density * flat.numel())) if density > 0 else 0
            order = sorted(range(flat.numel()), key=lambda i: (-abs(float(flat[i])), i))
            flat[order[keep:]] = 0
    weighted = [delta * factor.double() for delta, factor in zip(deltas, factors, strict=True)]
    total = sum(weighted)
    if method == "task_arithmetic":
        return base + total, None
    sign = torch.where(total >= 0, 1.0, -1.0)
    agrees = [(w * sign > 0).double() for w in weighted]
    change = sum(w * a for w, a in zip(weighted, agrees, strict=True))
    if normalize:
        weight = sum(a * f.double() for a, f in zip(agrees, factors, strict=True))
        change = change / torch.where(weight == 0, 1.0, weight)
    return base + change, total


@given(
    method=st.sampled_from(["task_arithmetic", "ties"]),
    shapes=st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=2), min_size=1, max_size=4),
    experts=st.integers(1, 3),
    stored=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    out=st.sampled_from([None, torch.float32, torch.bfloat16]),
    vectors=st.booleans(),
    density=st.sampled_from([0.3, 0.8]),
    normalize=st.booleans(),
    shards=st.integers(1, 3),
    shard_bytes=st.sampled_from([1, 40, 10**9]),
    threads=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_merge_on_disk_is_its_definition_in_float64(
    tmp_path_factory,
    method,
    shapes,
    experts,
    stored,
    out,
    vectors,
    density,
    normalize,
    shards,
    shard_bytes,
    threads,
    seed,
):
    place, generator = tmp_path_factory.mktemp("merge"), torch.Generator().manual_seed(seed)
    names = [f"t{i}.weight" for i in range(len(shapes))]
    tensors = [
        {name: torch.randn(shape, generator=generator).to(stored) for name, shape in zip(names, shapes, strict=True)}
        for _ in range(experts + 1)
    ]
    models = {
        name: open_checkpoint(
            write_checkpoint(place / name, content, config=CONFIG, shards=1 if len(names) < shards else shards)
        )
        for name, content in zip(("base", "e0", "e1", "e2"), tensors, strict=False)
    }
    coefficients = {}
    for expert in list(models)[1:]:
        coefficients[expert] = {}
        for name, shape in zip(names, shapes, strict=True):
            axis = len(shape) - 1 if vectors else None
            values = torch.rand(() if axis is None else shape[axis], generator=generator) + 0.1
            coefficients[expert][name] = Coefficient(values=values, axis=axis)
    plan = Plan(
        base=input_model(models["base"]),
        experts={name: input_model(models[name]) for name in coefficients},
        coefficients=coefficients,
        rule="scaled",
        granularity="unit",
        operator=Operator(method=method, density=density if method == "ties" else 1.0, normalize=normalize),
    )
    merge(
        plan, models, place / "out", dtype=out and Dtype.of(out), shard_bytes=shard_bytes, threads=threads, sync=False
    )
    merged = open_checkpoint(place / "out")
    for name, shape in zip(names, shapes, strict=True):
        factors = [coefficients[expert][name].expand(tuple(shape)) for expert in coefficients]
        exact, votes = float64_merge([content[name] for content in tensors], factors, method, density, normalize)
        found = merged.load(name)
        assert found.dtype == (out or stored)
        error = (found.double() - exact).abs()
        if votes is not None:  # a vote of nothing but rounding may go either way
            error = torch.where(votes.abs() < 1e-5, 0.0, error)
        scale = exact.abs() + sum(content[name].double().abs() for content in tensors)
        assert (error <= 2.0**-19 * scale + torch.finfo(found.dtype).eps / 2 * exact.abs() + 1e-7).all()
