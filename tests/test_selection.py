import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wpmerge import selection
from wpmerge.selection import Selector, Threshold, kept_count, threshold_of


def exact(values, keep):
    ordered = sorted(values, reverse=True)
    value = ordered[keep - 1]
    return Threshold(value=value, ties=keep - sum(other > value for other in values))


def search(values, keep, sample, block=37):
    """Run a selector over a stream and count its passes."""
    stream = np.array(values, np.float32)
    selector = Selector(keep, np.array(sample, np.float32), len(stream))
    for passes in range(1, 200):
        for start in range(0, len(stream), block):
            part = stream[start : start + block]
            selector.see(part, np.empty(len(part), np.bool_), np.empty(len(part), np.uint32))
        if (found := selector.end_pass()) is not None:
            return found, passes
    raise AssertionError("no end")


def test_kept_count_by_hand():
    assert [kept_count(d, 10) for d in (0.0, 0.01, 0.25, 0.5, 1.0)] == [0, 1, 2, 5, 10]
    assert kept_count(0.5, 0) == 0


def test_threshold_by_hand():
    values = np.array([3, 1, 2, 2, 2, 0], np.float32)
    assert threshold_of(values, 1) == Threshold(value=3.0, ties=1)
    assert threshold_of(values, 3) == Threshold(value=2.0, ties=2)
    assert threshold_of(values, 6) == Threshold(value=0.0, ties=1)


@given(
    values=st.lists(
        st.integers(0, 30).map(lambda n: n / 8) | st.floats(0, 2.0**99, width=32), min_size=1, max_size=120
    ),
    data=st.data(),
    room=st.sampled_from([0, 3, 1000]),
)
@settings(deadline=None)
def test_any_stream_from_any_sample(values, data, room):
    keep = data.draw(st.integers(1, len(values)))
    sample = data.draw(st.lists(st.sampled_from(values) | st.floats(0, 2.0**99, width=32), min_size=1, max_size=20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "KEPT_INSIDE", room)
        found, passes = search(values, keep, sample)
    assert found == exact(values, keep)
    assert passes <= 70


@pytest.mark.parametrize("share", [0.001, 0.5, 0.99])
def test_a_fair_sample_needs_one_pass_and_little_room(share, monkeypatch):
    values = np.abs(np.random.default_rng(0).standard_normal(400_000, dtype=np.float32))
    keep = int(share * len(values))
    monkeypatch.setattr(selection, "KEPT_INSIDE", 40_000)
    found, passes = search(values, keep, values[:: len(values) // 2**15], block=50_000)
    assert found == threshold_of(values, keep)
    assert passes == 1


def test_what_is_nan_ends_the_search():
    found, _ = search([float("nan")] * 50 + [1.0, 2.0], 30, [1.0, 2.0])
    assert found.value == 0
