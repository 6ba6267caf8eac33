"""The Scores artifact: what is written is what is read, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wpmerge.errors import WpmergeError
from wpmerge.plan import InputModel
from wpmerge.scores import (
    SCHEMA_VERSION,
    AnchorCurvePoint,
    CapabilityRecord,
    HeldOut,
    ReadoutRecord,
    Scores,
    Verification,
    Verified,
    load_scores,
)


def example() -> Scores:
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(3, 4, generator=generator)
    heads[2] = torch.nan
    unit = Verified(unit="head.0.1", drawn="top", screen=0.1, exact=0.125, stderr=1e-17)
    verification = Verification(
        units=(unit,), spearman=None, spearman_random=0.5, recall=1.0, largest_error=None, missed_share=0.25
    )
    record = ReadoutRecord(
        capability="title",
        readout="anchor",
        anchor="pair",
        l_star=1,
        base=-1.5,
        expert=1 / 3,
        gap=1 / 3 + 1.5,
        gap_t=7.0,
        noise_floor=1e-7,
        prompts=8,
        accepted=True,
        curve=(AnchorCurvePoint(layer=0, cosine=0.5, gap=0.25, t=-2.0, carried=0.125),),
        integrated_residual=0.01,
        verification={"sufficiency": {"head": verification}},
    )
    held_out = HeldOut(prompts=("wie geht’s?",), sequences=((3, 4, 5),), starts=(2,))
    return Scores(
        base=InputModel(source="base", content_hash="sampled-sha256:00", adapter=False),
        experts={"title": InputModel(source="owner/title", content_hash="sampled-sha256:11", adapter=True)},
        model_type="llama",
        layers=3,
        counts={"head": 4, "embedding": 1},
        labels={"norm": ["one", "two"]},
        capabilities={
            "title": CapabilityRecord(
                source="title.jsonl", content_hash="22", scored=("a", "b"), references="expert", held_out=held_out
            )
        },
        readouts={"title": record},
        arrays={
            "linear/title/title/head": heads,
            "linear/title/title/embedding": torch.randn(1, 1, generator=generator),
        },
        provenance={"seconds": 1.5, "settings": {"seed": 0, "layer": None}},
    )


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    written = example()
    written.save(tmp_path / "deep/scores")
    found = load_scores(tmp_path / "deep/scores")
    for field in dataclasses.fields(Scores):
        if field.name != "arrays":
            assert getattr(found, field.name) == getattr(written, field.name), field.name
    assert found.arrays.keys() == written.arrays.keys()
    for key, array in written.arrays.items():
        assert found.arrays[key].dtype == torch.float32
        assert torch.equal(found.arrays[key].isnan(), array.isnan())
        assert torch.equal(found.arrays[key].nan_to_num(7), array.nan_to_num(7))


def test_loading_and_saving_again_gives_the_same_bytes(tmp_path: Path) -> None:
    example().save(tmp_path / "one")
    load_scores(tmp_path / "one").save(tmp_path / "two")
    for name in ("scores.safetensors", "scores.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_the_files_are_what_the_format_says(tmp_path: Path) -> None:
    example().save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.json", "scores.safetensors"]
    header = json.loads((tmp_path / "scores.json").read_text())
    assert header["schema_version"] == SCHEMA_VERSION == 2
    assert header["readouts"]["title"]["l_star"] == 1
    assert header["readouts"]["title"]["verification"]["sufficiency"]["head"]["units"][0]["unit"] == "head.0.1"
    arrays = load_file(tmp_path / "scores.safetensors")
    assert arrays["linear/title/title/head"].shape == (3, 4)
    assert bool(arrays["linear/title/title/head"][2].isnan().all())


def test_double_precision_is_rounded_once(tmp_path: Path) -> None:
    array = torch.tensor([[1 / 3]], dtype=torch.float64)
    dataclasses.replace(example(), arrays={"linear/title/title/embedding": array}).save(tmp_path)
    (found,) = load_scores(tmp_path).arrays.values()
    assert torch.equal(found, array.float())


def test_an_array_is_asked_for_by_its_parts() -> None:
    scores = example()
    assert scores.array("title", "title", "head") is scores.arrays["linear/title/title/head"]
    with pytest.raises(WpmergeError, match="no such score") as caught:
        scores.array("title", "title", "neuron")
    assert caught.value.got == "linear/title/title/neuron"
    assert "linear/title/title/head" in str(caught.value.expected)
    with pytest.raises(WpmergeError, match="no such score"):
        scores.array("title", "title", "head", estimator="integrated")


@pytest.mark.parametrize("version", [0, 1, "2", None])
def test_an_unknown_schema_version_is_refused(tmp_path: Path, version: object) -> None:
    example().save(tmp_path)
    header = json.loads((tmp_path / "scores.json").read_text())
    (tmp_path / "scores.json").write_text(json.dumps(header | {"schema_version": version}))
    with pytest.raises(WpmergeError, match="unknown schema version") as caught:
        load_scores(tmp_path)
    assert caught.value.got == version


def malformed(header: dict[str, object], how: str) -> object:
    if how == "missing":
        del header["readouts"]
    elif how == "extra":
        header["color"] = "blue"
    elif how == "type":
        header["layers"] = "many"
    elif how == "deep":
        header["readouts"]["title"]["readout"] = "guess"
    elif how == "list":
        return [header]
    return header


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("missing", "malformed"),
        ("extra", "malformed"),
        ("type", "malformed"),
        ("deep", "malformed"),
        ("list", "cannot be read"),
    ],
)
def test_malformed_headers_are_refused(tmp_path: Path, how: str, what: str) -> None:
    example().save(tmp_path)
    header = malformed(json.loads((tmp_path / "scores.json").read_text()), how)
    (tmp_path / "scores.json").write_text(json.dumps(header))
    with pytest.raises(WpmergeError, match=what) as caught:
        load_scores(tmp_path)
    assert caught.value.where == tmp_path / "scores.json"
    if how == "deep":
        assert "readouts.title.readout" in str(caught.value.got)


@pytest.mark.parametrize("name", ["scores.json", "scores.safetensors"])
def test_missing_and_truncated_files_are_refused(tmp_path: Path, name: str) -> None:
    example().save(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-3])
    with pytest.raises(WpmergeError, match="cannot be read") as caught:
        load_scores(tmp_path)
    assert caught.value.where == tmp_path / name
    (tmp_path / name).unlink()
    with pytest.raises(WpmergeError, match="cannot be read") as caught:
        load_scores(tmp_path)
    assert caught.value.where == tmp_path / name


def test_infinite_statistics_survive(tmp_path: Path) -> None:
    scores = example()
    record = scores.readouts["title"].model_copy(update={"gap_t": float("inf")})
    dataclasses.replace(scores, readouts={"title": record}).save(tmp_path)
    assert load_scores(tmp_path).readouts["title"].gap_t == float("inf")


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("experts",), {}, "no expert"),
        (("capabilities", "title", "held_out", "sequences"), [], "0 held-out prompts, 1 starts"),
        (("capabilities", "title", "held_out", "starts"), [], "1 held-out prompts, 0 starts"),
        (("capabilities", "title", "held_out", "starts"), [9999], "whose reference starts at 9999"),
        (("provenance", "settings"), "x", "provenance.settings"),
        (("layers",), 6, r"linear/title/title/head: shape \[3, 4\], of 6 layers with 4 units each"),
        (("counts", "head"), 5, "of 3 layers with 5 units each"),
    ],
)
def test_scores_that_do_not_fit_together_are_refused(
    tmp_path: Path, path: tuple[str, ...], value: object, complaint: str
) -> None:
    example().save(tmp_path)
    header = json.loads((tmp_path / "scores.json").read_text())
    place = header
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    (tmp_path / "scores.json").write_text(json.dumps(header))
    with pytest.raises(WpmergeError, match=f"do not fit together[\\s\\S]*{complaint}"):
        load_scores(tmp_path)
