"""Option values: what is taken, and how what is malformed is refused."""

from pathlib import Path

import pytest

from wpmerge import options
from wpmerge.dtypes import Dtype
from wpmerge.errors import WpmergeError


def test_named_keeps_order_and_what_follows_the_first_equals_sign() -> None:
    found = options.named("--expert", ["b=/x=y", " a = c "])
    assert list(found.items()) == [("b", "/x=y"), ("a", "c")]


@pytest.mark.parametrize("text", ["", "a", "a=", "=b", " =b", "="])
def test_a_malformed_name_is_refused_with_its_form(text: str) -> None:
    with pytest.raises(WpmergeError, match="--expert is malformed") as caught:
        options.named("--expert", ["ok=1", text])
    assert (caught.value.got, caught.value.expected) == (repr(text), "NAME=PATH")


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(WpmergeError, match="--expert names a twice") as caught:
        options.named("--expert", ["a=1", "a=2"])
    assert caught.value.got == "1 and 2"


@pytest.mark.parametrize("name", ["base", "a/b", ".a", "-a", "é", "a b"])
def test_names_that_no_expert_may_bear(name: str) -> None:
    with pytest.raises(WpmergeError, match="no expert may bear"):
        options.expert_names({name: "path"})
    assert options.expert_names({"a-1.b_c": "path"}) == {"a-1.b_c": "path"}


def test_models_are_named_by_their_last_part_or_as_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    found = options.models_by_name(["x/one", "owner/two@main", "m=x/three", "/with=sign/four/", "."], what="a model")
    assert found == {
        "one": "x/one",
        "two@main": "owner/two@main",
        "m": "x/three",
        "four": "/with=sign/four/",
        "here": ".",
    }
    with pytest.raises(WpmergeError, match="a model names one twice"):
        options.models_by_name(["x/one", "y/one"], what="a model")
    with pytest.raises(WpmergeError, match="malformed"):
        options.models_by_name([""], what="a model")


def test_scales() -> None:
    assert options.scales(["0.5", "a=1", "b=.25"]) == {"": 0.5, "a": 1.0, "b": 0.25}
    for text in ("a=x", "", "a=", "=1"):
        with pytest.raises(WpmergeError, match="--scale"):
            options.scales([text])
    with pytest.raises(WpmergeError, match="twice"):
        options.scales(["1", "0.5"])


def test_task_data() -> None:
    assert options.task_data(["t=f.jsonl", "u:train=g", "u:test=h"]) == {
        "t": {"": Path("f.jsonl")},
        "u": {"train": Path("g"), "test": Path("h")},
    }
    with pytest.raises(WpmergeError, match="twice"):
        options.task_data(["t=f", "t=g"])


def test_values_that_are_json_are_read_as_such() -> None:
    assert options.keyed_values("--model-arg", ["a=1", "b=true", "c=auto", 'd={"x": [1]}']) == {
        "a": 1,
        "b": True,
        "c": "auto",
        "d": {"x": [1]},
    }


def test_choices() -> None:
    assert options.all_of("--kind", ["b", "a", "b"], ("a", "b")) == ("b", "a")
    with pytest.raises(WpmergeError, match="--rule has no such value") as caught:
        options.one_of("--rule", "scald", ("scaled", "select"))
    assert caught.value.mend == "did you mean scaled?"
    with pytest.raises(WpmergeError) as caught:
        options.one_of("--rule", "?", ("scaled", "select"))
    assert caught.value.mend is None


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("512MiB", 512 * 2**20), ("100", 100), ("7B", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert options.byte_size("--shard-size", text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "0", "-5GB", "1e9", "0.1B"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(WpmergeError, match="--shard-size is no size"):
        options.byte_size("--shard-size", text)


def test_dtypes() -> None:
    assert options.stored_dtype("--dtype", None) is None
    assert options.stored_dtype("--dtype", "bfloat16") is Dtype.BF16
    with pytest.raises(WpmergeError, match="--dtype"):
        options.stored_dtype("--dtype", "int8")


def test_devices() -> None:
    assert options.device("cpu") == "cpu"
    for text in ("tpu9000", "cuda:99", ""):
        with pytest.raises(WpmergeError, match="--device cannot be used"):
            options.device(text)


def test_batch_sizes() -> None:
    assert [options.batch_size(text) for text in ("1", "16", "auto", "auto:4")] == [1, 16, "auto", "auto:4"]
    for text in ("0", "-1", "many", "1.5", ""):
        with pytest.raises(WpmergeError, match="--batch-size"):
            options.batch_size(text)


def test_skills_name_evaluated_models() -> None:
    assert options.skills(["a=t/acc/x"], {"a": "path"}) == {"a": "t/acc/x"}
    with pytest.raises(WpmergeError, match="--skill names no evaluated model"):
        options.skills(["c=t/acc"], {"a": "path"})
