"""What a bound on memory leaves for weights and residual streams."""

import pytest
from tiny import ModelWeights, tiny_model

import wpmerge.memory
from wpmerge.arch import Layout
from wpmerge.errors import WpmergeError
from wpmerge.memory import (
    HELD_BYTES,
    LEAST_HELD,
    Budget,
    budget,
    held_per_token,
    merging_budget,
    resident_bytes,
    stream_per_token,
)


@pytest.fixture(scope="module")
def layout() -> Layout:
    return ModelWeights.of(tiny_model("llama", seed=0, attention_bias=False, mlp_bias=False)).layout


def test_without_a_bound_nothing_is_cut(layout: Layout) -> None:
    assert budget(layout, 4, most=None) == Budget(resident=True, held_bytes=HELD_BYTES)
    assert budget(layout, 4, most=None, resident=False) == Budget(resident=False, held_bytes=HELD_BYTES)


def test_a_bound_decides_residence_and_the_rest_is_for_streams(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wpmerge.memory, "resident_bytes", lambda: 1000)
    # layer: q and o 16·16, k and v 8·16, MLP thrice 32·16, two norms of 16; outside: embedding and head 61·16, norm 16
    layer, outer, head = 4 * (512 + 256 + 1536 + 32), 4 * (61 * 16 + 16), 4 * 61 * 16
    streamed = max(3 * layer, outer + head // 2)
    whole = 3 * (3 * layer + outer)
    least = 1000 + streamed + LEAST_HELD
    tight = budget(layout, 3, most=least)
    assert tight == Budget(resident=False, held_bytes=LEAST_HELD // 2)
    roomy = budget(layout, 3, most=least + whole)
    assert roomy == Budget(resident=True, held_bytes=LEAST_HELD // 2)
    assert budget(layout, 3, most=least + whole, resident=False).resident is False
    assert budget(layout, 3, most=1 << 40).held_bytes == HELD_BYTES
    with pytest.raises(WpmergeError, match="does not fit"):
        budget(layout, 3, most=least, gradients=True)
    assert not budget(layout, 3, most=least + 8 * layer + 6 * outer, gradients=True).resident
    with pytest.raises(WpmergeError, match="does not fit") as caught:
        budget(layout, 3, most=least - 1)
    assert f"{least / 1e6:,.0f} MB" in str(caught.value.expected)


def test_a_merge_is_planned_with_all_experts_and_one_row(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two experts, rows of ten tokens; sizes in weights, as above."""
    monkeypatch.setattr(wpmerge.memory, "resident_bytes", lambda: 1000)
    layer, matrix = 512 + 256 + 1536 + 32, 61 * 16
    outer = matrix + 16
    row = 4 * 10 * (2 * (10 * 16 + 5 * 32) + 4 * 61 + 2 * layout.heads * 10)
    # base, experts and a merge of one layer and a difference; outside: three as stored, the merge, four in float32
    streamed = max(4 * 5 * layer, 2 * 3 * outer + 4 * (outer + 4 * matrix))
    whole = 4 * 4 * (3 * layer + outer) + 4 * 2 * matrix
    least = 1000 + streamed + row + LEAST_HELD
    assert merging_budget(layout, 2, most=None, longest=10) == Budget()
    assert merging_budget(layout, 2, most=least, longest=10) == Budget(resident=False, held_bytes=LEAST_HELD // 2)
    roomy = least - streamed + whole
    assert merging_budget(layout, 2, most=roomy, longest=10) == Budget(resident=True, held_bytes=LEAST_HELD // 2)
    assert not merging_budget(layout, 2, most=roomy - 1, longest=10).resident
    assert not merging_budget(layout, 2, most=roomy, longest=10, resident=False).resident
    assert merging_budget(layout, 2, most=1 << 40, longest=10).held_bytes == HELD_BYTES
    with pytest.raises(WpmergeError, match="fusing does not fit into --max-memory") as caught:
        merging_budget(layout, 2, most=least - 1, longest=10)
    assert f"{least / 1e6:,.0f} MB" in str(caught.value.expected) and "shorter prompts" in str(caught.value.mend)
    more = 4 * outer + 4 * max(7 * layer, (6 * outer + 4 * (outer + 4 * matrix)) // 4) - streamed
    units = sum(layers * count for layers, count in map(layout.shape, layout.counts))
    steps = least + more + 8 * 12 * units * 2
    assert not merging_budget(layout, 2, most=steps, longest=10, gradients=True).resident
    with pytest.raises(WpmergeError, match="does not fit"):
        merging_budget(layout, 2, most=steps - 1, longest=10, gradients=True)


def test_a_prompt_too_long_to_be_run_within_a_bound_is_refused(layout: Layout) -> None:
    """Its streams at every layer, and room as large again, whatever else there is to run."""
    most, longest = 1 << 30, 50_000
    assert 2 * longest * stream_per_token(layout, 5, longest) > most
    with pytest.raises(WpmergeError, match="fusing does not fit"):
        merging_budget(layout, 2, most=most, longest=longest, gradients=True)


def test_a_token_keeps_a_stream_for_every_layer(layout: Layout) -> None:
    assert held_per_token(layout, 2) - held_per_token(layout, 1) == 4 * 16


def test_the_process_knows_its_own_size() -> None:
    assert resident_bytes() > 50e6
