import torch
import yaml
from checkpoints import family

from wpmerge.card import front_matter, model_card, plan_summary
from wpmerge.checkpoint import open_checkpoint
from wpmerge.plan import Coefficient, InputModel, Plan


def card(base, models=("owner/base", "owner/e0")):
    return model_card(name="m", base=base, models=models, summary="What was done.", recipe="a: 1\n", version="9")


def test_front_matter_is_what_hubs_read(tmp_path):
    from huggingface_hub import ModelCard

    base = open_checkpoint(family(tmp_path, experts=0)["base"])
    text = card(base)
    read = ModelCard(text).data
    assert read.base_model == ["owner/base", "owner/e0"]
    assert read.tags == ["merge", "wpmerge"]
    assert read.library_name == "transformers"
    assert read.license is None
    assert "```yaml\na: 1\n```" in text
    assert "wpmerge 9" in text


def test_only_what_a_hub_knows_is_named_to_it(tmp_path, monkeypatch):
    """A hub refuses a card whose base_model is a path."""
    monkeypatch.chdir(tmp_path)
    base = open_checkpoint(family(tmp_path / "owner", experts=0)["base"])
    names = ["owner/base", "owner/base+other/adapter", "other/e0@v2", "./e1", str(tmp_path / "e2"), "other/e0"]
    made = yaml.safe_load(card(base, names).split("---\n")[1])
    assert made["base_model"] == ["other/adapter", "other/e0"]
    assert not {"base_model", "base_model_relation"} & set(yaml.safe_load(card(base, names[:1]).split("---\n")[1]))


def test_the_bases_license_is_kept(tmp_path):
    path = family(tmp_path, experts=0)["base"]
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    text = card(open_checkpoint(path))
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "apache-2.0"
    (path / "README.md").write_text("---\n: [broken\n---\n")
    assert front_matter(path) == {}
    (path / "README.md").write_text("no front matter")
    assert front_matter(path) == {}


def test_the_summary_gives_each_experts_range():
    model = InputModel(source="owner/e", content_hash="h")
    coefficients = {
        "x": Coefficient(values=torch.tensor([0.0, 1.0]), axis=0),
        "y": Coefficient(values=torch.tensor(0.25)),
    }
    plan = Plan(base=model, experts={"e": model}, coefficients={"e": coefficients}, rule="scaled", granularity="unit")
    assert "| e | `owner/e` | 0 | 0.375 | 1 |" in plan_summary(plan)
