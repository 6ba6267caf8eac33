import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wpmerge.operators import (
    drop_and_rescale,
    keep_largest,
    linear,
    random_mask,
    task_arithmetic,
    ties,
    weighted_sum,
)


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float32)


def test_task_arithmetic_by_hand():
    merged = task_arithmetic(vector(1, 2), [vector(3, 2), vector(1, 0)], [torch.tensor(0.5), torch.tensor(2.0)])
    assert merged.tolist() == [1 + 0.5 * 2, 2 + 2 * -2]


def test_coefficients_along_rows_and_columns():
    base, expert = torch.zeros(2, 3), torch.ones(2, 3)
    assert task_arithmetic(base, [expert], [vector(1, 2)[:, None]]).tolist() == [[1, 1, 1], [2, 2, 2]]
    assert task_arithmetic(base, [expert], [vector(1, 2, 3)]).tolist() == [[1, 2, 3], [1, 2, 3]]


def test_no_experts_leave_the_base_and_inputs_are_untouched():
    base, expert = vector(1, -0.0), vector(5, 6)
    assert torch.equal(task_arithmetic(base, [], []), base)
    task_arithmetic(base, [expert, expert], [torch.tensor(1.0)] * 2)
    weighted_sum([base, expert], [torch.tensor(2.0)] * 2, like=base)
    assert (base.tolist(), expert.tolist()) == ([1, 0], [5, 6])


def test_linear_by_hand():
    assert linear([vector(1, 2), vector(3, 4)], [torch.tensor(0.25), torch.tensor(0.75)]).tolist() == [2.5, 3.5]


@given(seed=st.integers(0, 2**32), experts=st.integers(1, 4))
def test_task_arithmetic_is_within_float32_of_float64(seed, experts):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(50, generator=generator)
    others = [base + 0.1 * torch.randn(50, generator=generator) for _ in range(experts)]
    weights = [torch.rand((), generator=generator) for _ in range(experts)]
    exact = base.double() + sum(w.double() * (x.double() - base.double()) for w, x in zip(weights, others, strict=True))
    error = (task_arithmetic(base, others, weights).double() - exact).abs()
    assert (error <= 2**-23 * (base.abs() + 2)).all()


def test_trim_keeps_the_largest_and_the_first_among_equals():
    delta = vector(1, -3, 2, -2, 2, 0.5)
    assert keep_largest(delta, 0.5).tolist() == [0, -3, 2, -2, 0, 0]
    assert keep_largest(delta, 0.0).tolist() == [0] * 6
    assert keep_largest(delta, 0.01).tolist() == [0, -3, 0, 0, 0, 0]  # at least one
    assert torch.equal(keep_largest(delta, 1.0), delta)
    assert keep_largest(torch.ones(4), 0.5).tolist() == [1, 1, 0, 0]


@given(values=st.lists(st.integers(-4, 4), min_size=1, max_size=40), density=st.floats(0.01, 1.0, allow_nan=False))
def test_trim_agrees_with_a_stable_sort(values, density):
    delta = vector(*values)
    keep = max(1, math.floor(density * len(values)))
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    expected = [value if i in order[:keep] else 0 for i, value in enumerate(values)]
    assert keep_largest(delta, density).tolist() == expected


def test_ties_elects_and_averages_by_hand():
    deltas = [vector(1, 1, 0, -1), vector(-3, 2, 4, 1)]
    weights = [torch.tensor(1.0), torch.tensor(0.5)]
    # weighted: (1, 1, 0, -1) and (-1.5, 1, 2, .5); elected signs: -, +, +, -
    assert ties(deltas, weights, normalize=False).tolist() == [-1.5, 2, 2, -1]
    assert ties(deltas, weights).tolist() == pytest.approx([-1.5 / 0.5, 2 / 1.5, 2 / 0.5, -1 / 1])


def test_ties_agrees_with_mergekit_without_equal_magnitudes():
    from mergekit.merge_methods.generalized_task_arithmetic import get_mask
    from mergekit.sparsify import SparsificationMethod, sparsify

    generator = torch.Generator().manual_seed(0)
    deltas = [torch.randn(1000, generator=generator) for _ in range(3)]
    weights = torch.tensor([0.7, 0.4, 1.1])
    theirs = torch.stack([sparsify(d, density=0.3, method=SparsificationMethod.magnitude) for d in deltas])
    ours = [keep_largest(d, 0.3) for d in deltas]
    assert torch.equal(torch.stack(ours), theirs)
    weighted = theirs * weights[:, None]
    mask = get_mask(weighted, method="sum")
    divisor = (weights[:, None] * mask).sum(0)
    expected = (weighted * mask).sum(0) / torch.where(divisor == 0, 1.0, divisor)
    torch.testing.assert_close(ties(ours, list(weights)), expected, rtol=1e-6, atol=1e-7)


def murmur_finaliser(x):
    """fmix32 of MurmurHash3, in plain integers."""
    x ^= x >> 16
    x = x * 0x85EBCA6B & 0xFFFFFFFF
    x ^= x >> 13
    x = x * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


@given(seed=st.integers(0, 2**63 - 1), start=st.integers(0, 2**40), density=st.floats(0, 1))
def test_mask_is_the_stated_hash(seed, start, density):
    expected = []
    for index in range(start, start + 5):
        state = murmur_finaliser((index ^ seed) & 0xFFFFFFFF)
        state = murmur_finaliser(state ^ (index >> 32) ^ (seed >> 32 & 0xFFFFFFFF) ^ 0x9E3779B9)
        expected.append(state < round(density * 2**32))
    assert random_mask(5, density, seed=seed, start=start).tolist() == expected


@given(cut=st.integers(0, 1000), seed=st.integers(0, 2**40))
def test_dropping_does_not_depend_on_the_blocks(cut, seed):
    delta = torch.linspace(-1, 1, 1000)
    parts = [
        drop_and_rescale(delta[:cut], 0.3, seed=seed),
        drop_and_rescale(delta[cut:], 0.3, seed=seed, start=cut),
    ]
    assert torch.equal(torch.cat(parts), drop_and_rescale(delta, 0.3, seed=seed))


@pytest.mark.parametrize("density", [0.05, 0.5, 0.9])
def test_dropping_keeps_share_and_expectation(density):
    n = 200_000
    kept = drop_and_rescale(torch.ones(n), density, seed=7)
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / density).item()}
    spread = 5 * math.sqrt(density * (1 - density) / n)
    assert abs(float((kept != 0).float().mean()) - density) < spread
    other = random_mask(n, density, seed=8)
    both = float((other & (kept != 0)).float().mean())
    assert abs(both - density**2) < 5 * math.sqrt(density**2 / n)  # other seeds are independent
