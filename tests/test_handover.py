import pytest
import yaml
from checkpoints import family

from wpmerge.checkpoint import open_checkpoint
from wpmerge.dtypes import Dtype
from wpmerge.errors import OutputError, RecipeError
from wpmerge.merging import merge_recipe


@pytest.fixture
def recipe(tmp_path):
    """A method that only mergekit has."""
    made = family(tmp_path / "models", experts=1)
    document = {
        "models": [{"model": str(made["base"])}, {"model": str(made["e0"])}],
        "merge_method": "slerp",
        "base_model": str(made["base"]),
        "parameters": {"t": 0.5},
        "dtype": "float32",
    }
    (tmp_path / "r.yml").write_text(yaml.safe_dump(document))
    return tmp_path / "r.yml"


def test_mergekit_does_what_is_not_done_here(recipe, tmp_path):
    with pytest.raises(RecipeError, match="merge_method slerp is not supported") as caught:
        merge_recipe(recipe, tmp_path / "out")
    assert "--engine mergekit" in caught.value.mend
    summary = merge_recipe(recipe, tmp_path / "out", engine="mergekit")
    merged = open_checkpoint(tmp_path / "out")
    assert summary.tensors == len(merged.tensors) == 21
    assert {info.dtype for info in merged.tensors.values()} == {Dtype.F32}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "out", "r.yml"]


def test_its_failure_leaves_nothing(recipe, tmp_path):
    recipe.write_text(recipe.read_text().replace("slerp", "no_such_method"))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RecipeError, match="mergekit failed") as caught:
        merge_recipe(recipe, tmp_path / "out", engine="mergekit")
    assert "no_such_method" in caught.value.got
    assert sorted(tmp_path.iterdir()) == before


def test_an_input_is_never_its_output(recipe, tmp_path):
    with pytest.raises(OutputError, match="an input"):
        merge_recipe(recipe, tmp_path / "models" / "e0", engine="mergekit", overwrite=True)


def test_settings_it_would_ignore_are_refused(recipe, tmp_path):
    with pytest.raises(RecipeError, match="settings from the recipe"):
        merge_recipe(recipe, tmp_path / "out", engine="mergekit", dtype=Dtype.F16)
