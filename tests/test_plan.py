import json

import pytest
import safetensors.torch
import torch
from checkpoints import family

from wpmerge.checkpoint import open_checkpoint
from wpmerge.errors import RecipeError
from wpmerge.plan import Coefficient, InputModel, Plan, check_plan, load_plan

INPUT = InputModel(source="owner/base", content_hash="sha256:0")


def scalar(value):
    return Coefficient(values=torch.tensor(value, dtype=torch.float32))


def vector(values, axis):
    return Coefficient(values=torch.tensor(values, dtype=torch.float32), axis=axis)


def plan(**changes):
    settings = {
        "base": INPUT,
        "experts": {"a": INPUT, "b.2": InputModel(source="x", content_hash="h", adapter=True)},
        "coefficients": {
            "a": {"x.weight": vector([0.1, 0.2], 0), "y": scalar(0.3)},
            "b.2": {"x.weight": vector([1, 2, 3], 1), "y": scalar(0)},
        },
        "rule": "scaled",
        "granularity": "unit",
        "provenance": {"seed": 3, "versions": {"torch": "2"}},
    }
    return Plan(**(settings | changes))


def test_round_trip(tmp_path):
    plan().save(tmp_path / "p")
    loaded = load_plan(tmp_path / "p")
    assert (loaded.base, loaded.experts, loaded.rule, loaded.granularity, loaded.provenance) == (
        plan().base, plan().experts, "scaled", "unit", {"seed": 3, "versions": {"torch": "2"}},
    )  # fmt: skip
    for expert, tensors in plan().coefficients.items():
        for name, coefficient in tensors.items():
            found = loaded.coefficients[expert][name]
            assert found.axis == coefficient.axis
            assert torch.equal(found.values, coefficient.values)
            assert found.values.shape == coefficient.values.shape


def test_the_files_are_as_documented(tmp_path):
    plan().save(tmp_path)
    arrays = safetensors.torch.load_file(tmp_path / "plan.safetensors")
    assert set(arrays) == {"a/x.weight", "a/y", "b.2/x.weight", "b.2/y"}
    assert arrays["a/y"].shape == ()
    header = json.loads((tmp_path / "plan.json").read_text())
    assert header["schema_version"] == 4 and "steps" not in header
    assert header["axes"] == {"a/x.weight": 0, "b.2/x.weight": 1}
    assert header["experts"]["b.2"] == {"source": "x", "content_hash": "h", "adapter": True}
    assert (tmp_path / "plan.safetensors").stat().st_mode & 0o044 == 0o044


def test_expand_broadcasts_along_its_axis():
    assert scalar(2).expand((3, 4)).shape == ()
    assert vector([1, 2, 3], 0).expand((3, 4)).shape == (3, 1)
    assert vector([1, 2, 3], 1).expand((2, 3, 4)).shape == (1, 3, 1)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"experts": {}, "coefficients": {}}, "needs coefficients"),
        ({"coefficients": {"a": {}}}, "needs coefficients"),
        ({"coefficients": {"a": {"x": scalar(1)}, "b.2": {"y": scalar(1)}}}, "same tensors"),
        ({"experts": {"base": INPUT}, "coefficients": {"base": {"x": scalar(1)}}}, "not a name"),
        ({"experts": {"a/b": INPUT}, "coefficients": {"a/b": {"x": scalar(1)}}}, "not a name"),
        ({"experts": {"a": INPUT}, "coefficients": {"a": {"x": scalar(float("nan"))}}}, "not finite"),
        ({"experts": {"a": INPUT}, "coefficients": {"a": {"x": vector([1, float("inf")], 0)}}}, "not finite"),
        ({"granularity": "tensor"}, "holds a vector"),
    ],
)
def test_a_plan_that_makes_no_sense_cannot_be_made(change, complaint):
    with pytest.raises(RecipeError, match=complaint):
        plan(**change)


@pytest.mark.parametrize(
    ("values", "axis"), [(torch.ones(2), None), (torch.ones(()), 0), (torch.ones(2, 2), 0), (torch.ones(2).double(), 0)]
)
def test_a_malformed_coefficient_cannot_be_made(values, axis):
    with pytest.raises(RecipeError, match="malformed"):
        Coefficient(values=values, axis=axis)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda h: h.update(schema_version=5), "unknown schema version"),
        (lambda h: h.pop("schema_version"), "unknown schema version"),
        (lambda h: h.pop("rule"), "rule: Field required"),
        (lambda h: h.update(extra=1), "extra: Extra inputs"),
        (lambda h: h.update(granularity="atom"), "granularity"),
        (lambda h: h["base"].pop("source"), r"base\.source"),
        (lambda h: h["experts"].pop("a"), "unknown expert"),
        (lambda h: h["experts"].update(c=h["base"]), "not have coefficients for the same tensors"),
        (lambda h: h["axes"].pop("a/x.weight"), "malformed"),
        (lambda h: h["axes"].update({"a/z": 0}), "that it does not hold"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, change, complaint):
    plan().save(tmp_path)
    header = json.loads((tmp_path / "plan.json").read_text())
    change(header)
    (tmp_path / "plan.json").write_text(json.dumps(header))
    with pytest.raises(RecipeError, match=complaint):
        load_plan(tmp_path)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_plans_of_earlier_versions_are_read_without_their_steps(tmp_path, version):
    """The second and third kept what rule refine had added level by level, under keys of their own."""
    plan().save(tmp_path)
    header = json.loads((tmp_path / "plan.json").read_text()) | {"schema_version": version}
    if version > 1:
        arrays = safetensors.torch.load_file(tmp_path / "plan.safetensors")
        safetensors.torch.save_file(arrays | {"@steps/a/group": torch.ones(3)}, tmp_path / "plan.safetensors")
        header["steps"] = {"step": 12, "averaged": True, "expert": {"a": 0.25, "b.2": 1.25}}
        header["provenance"]["factors"] = {"a": 0.5, "b.2": 1.0}  # more was added after them: they explain nothing
    (tmp_path / "plan.json").write_text(json.dumps(header))
    found = load_plan(tmp_path)
    assert found.provenance == plan().provenance
    assert {name: set(found.coefficients[name]) for name in found.coefficients} == {
        "a": {"x.weight", "y"}, "b.2": {"x.weight", "y"},
    }  # fmt: skip
    header["steps"] = None
    (tmp_path / "plan.json").write_text(json.dumps(header))
    if version > 1:
        with pytest.raises(RecipeError, match="unknown expert"):
            load_plan(tmp_path)


@pytest.mark.parametrize("name", ["plan.json", "plan.safetensors"])
def test_a_missing_or_broken_file_is_refused(tmp_path, name):
    plan().save(tmp_path)
    (tmp_path / name).write_bytes(b"{")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_plan(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(RecipeError, match="cannot be read"):
        load_plan(tmp_path)


def test_a_plan_must_fit_its_base(tmp_path):
    base = open_checkpoint(family(tmp_path, experts=0)["base"])
    good = {name: scalar(0.5) for name in base.tensors}

    def check(**changes):
        coefficients = {"a": {**good, **changes}}
        check_plan(plan(experts={"a": INPUT}, coefficients=coefficients), base)

    check(**{"lm_head.weight": vector([1.0] * 37, 0)})
    for coefficient in (vector([1.0] * 36, 0), vector([1.0] * 37, 1), vector([1.0] * 37, 2), vector([1.0] * 37, -2)):
        with pytest.raises(RecipeError, match=r"does not fit tensor lm_head\.weight"):
            check(**{"lm_head.weight": coefficient})
    with pytest.raises(RecipeError, match=r"unknown tensor z\.weight"):
        check(**{"z.weight": scalar(1)})
    del good["lm_head.weight"]
    with pytest.raises(RecipeError, match=r"no coefficient for tensor lm_head\.weight"):
        check()
