"""Finished parts of a run: kept by name, computed once, and named where they are damaged."""

from pathlib import Path

import pytest
import torch

from wpmerge.errors import OutputError
from wpmerge.pieces import Pieces


def test_what_is_there_is_not_computed_again(tmp_path: Path) -> None:
    pieces = Pieces(tmp_path / "p")
    runs: list[int] = []

    def compute() -> dict[str, torch.Tensor]:
        runs.append(1)
        return {"x": torch.tensor([1 / 3], dtype=torch.float64)}

    first = pieces.tensors("a", compute)
    assert torch.equal(first["x"], Pieces(tmp_path / "p").tensors("a", compute)["x"]) and len(runs) == 1
    assert pieces.below("part").get("a") is None


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_part_is_named(tmp_path: Path, damage: bytes) -> None:
    pieces = Pieces(tmp_path / "p")
    pieces.put("a", {"x": torch.zeros(3)})
    pieces.record("b", lambda: {"x": 1})
    (tmp_path / "p" / "a.safetensors").write_bytes(damage)
    (tmp_path / "p" / "b.json").write_bytes(damage)
    with pytest.raises(OutputError, match=r"damaged[\s\S]*a\.safetensors"):
        pieces.get("a")
    with pytest.raises(OutputError, match=r"damaged[\s\S]*b\.json"):
        pieces.record("b", lambda: {})
