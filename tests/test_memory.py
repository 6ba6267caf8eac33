"""What a bound on memory leaves for weights and residual streams."""

import pytest
from tiny import ModelWeights, tiny_model

import wpmerge.memory
from wpmerge.arch import Layout
from wpmerge.errors import WpmergeError
from wpmerge.memory import HELD_BYTES, LEAST_HELD, Budget, budget, held_per_token, resident_bytes


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


def test_a_token_keeps_a_stream_for_every_layer(layout: Layout) -> None:
    assert held_per_token(layout, 2) - held_per_token(layout, 1) == 4 * 16


def test_the_process_knows_its_own_size() -> None:
    assert resident_bytes() > 50e6
