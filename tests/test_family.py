"""Score and fuse on a real family: SmolLM2-135M-Instruct with a format and a JSON expert.

It is built by ``make test`` where ``../shared/family`` is there; WPMERGE_FAMILY names one that is built elsewhere.
"""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr

from wpmerge.fusing import FuseResult, FuseSettings, fuse
from wpmerge.readings import ScoreSettings
from wpmerge.scores import Scores
from wpmerge.scoring import score

ROOT = Path(__file__).parents[1]
SOURCES = ROOT.parent / "shared" / "family"
EXPERTS = ("format", "json")
SCALES = {"format": 0.9, "json": 0.4}
SETTINGS = ScoreSettings(
    readouts=("reference",), prompts=4, held_out=4, reference_tokens=16, top=2, sample=2, verify_prompts=2, cross=False
)

pytestmark = [pytest.mark.family, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def family() -> Path:
    path = Path(os.environ.get("WPMERGE_FAMILY") or ROOT / ".family")
    absent = [name for name in ("base", *EXPERTS) if not (path / name / "config.json").is_file()]
    if absent:
        pytest.skip(f"the SmolLM2 family is not built: no {path / absent[0]}")
    if not SOURCES.is_dir():
        pytest.skip(f"the family's prompts are not there: no {SOURCES}")
    return path


def run(family: Path, experts: dict[str, Path], out: Path, settings: ScoreSettings = SETTINGS) -> Scores:
    return score(
        base=str(family / "base"),
        experts={name: str(path) for name, path in experts.items()},
        capabilities={name: str(SOURCES / "prompts" / f"{name}.jsonl") for name in experts},
        out=out,
        settings=settings,
    )


@pytest.fixture(scope="module")
def scores_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("family") / "scores"


@pytest.fixture(scope="module")
def scores(family: Path, scores_dir: Path) -> Scores:
    return run(family, {name: family / name for name in EXPERTS}, scores_dir)


@pytest.fixture(scope="module")
def fused(scores: Scores, scores_dir: Path) -> FuseResult:
    settings = FuseSettings(rule="proportional", scales=SCALES)
    return fuse(scores_dir, scores_dir.parent / "merged", settings=settings)


def test_every_head_and_neuron_has_a_score(scores: Scores) -> None:
    sizes = {"head": 30 * 9, "neuron": 46_080, "kv_group": 30 * 3, "norm": 60, "embedding": 1, "final_norm": 1}
    assert {kind: scores.array("json", "json", kind).numel() for kind in scores.counts} == sizes
    for name in EXPERTS:
        for kind in sizes:
            array = scores.array(name, name, kind)
            assert array.isfinite().all(), (name, kind)
            # the experts are adapters on the seven projections: what they do not touch recovers nothing
            assert bool((array == 0).all()) is (kind in ("norm", "embedding", "final_norm")), (name, kind)


def test_experts_are_better_and_the_screen_is_close_to_exact_patching(scores: Scores) -> None:
    for name in EXPERTS:
        record = scores.readouts[name]
        assert record.gap > 0.2  # nats per token
        assert record.gap_t > 2
        for kind in ("head", "neuron"):
            units = record.verification["sufficiency"][kind].units
            assert len(units) == 4
            for unit in units:
                assert unit.screen == pytest.approx(unit.exact, rel=0.2, abs=0.008), unit


def test_the_merged_checkpoint_is_base_plus_scaled_deltas(family: Path, fused: FuseResult) -> None:
    merged, base = (load_file(path / "model.safetensors") for path in (fused.out, family / "base"))
    experts = {name: load_file(family / name / "model.safetensors") for name in EXPERTS}
    assert merged.keys() == base.keys()
    for name in ("model.layers.7.mlp.down_proj.weight", "model.layers.20.self_attn.q_proj.weight"):
        expected = base[name].double()
        for expert in EXPERTS:
            coefficient = fused.plan.coefficients[expert][name]
            assert coefficient.axis == (1 if "down" in name else 0)
            assert len(coefficient.values.unique()) > 5
            factor = coefficient.values.double()
            factor = factor[None, :] if coefficient.axis == 1 else factor[:, None]
            expected += factor * (experts[expert][name].double() - base[name].double())
        error = (merged[name].double() - expected).abs()
        assert (error <= expected.abs() * 2**-8 + 1e-9).all()
        assert not torch.equal(merged[name], base[name])
    assert torch.equal(merged["model.norm.weight"], base["model.norm.weight"])


def test_the_merged_checkpoint_loads_and_generates_text(fused: FuseResult) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(fused.out)
    tokenizer = AutoTokenizer.from_pretrained(fused.out)
    prompt = "Return name, age, job, city from the text in JSON format.\n\nText: Ada, 36, is a nurse in Oslo."
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    reply = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Ada" in reply, reply


def test_an_adapter_scores_as_its_merged_checkpoint(family: Path, scores: Scores, tmp_path: Path) -> None:
    """They differ by the checkpoint's rounding to bfloat16 only."""
    quick = ScoreSettings(**{name: getattr(SETTINGS, name) for name in SETTINGS.__slots__} | {"top": 0, "sample": 0})
    adapter = run(family, {"json": SOURCES / "adapters" / "json"}, tmp_path / "adapter", quick)
    assert adapter.experts["json"].adapter
    assert adapter.readouts["json"].gap == pytest.approx(scores.readouts["json"].gap, rel=0.02)
    for kind in ("head", "neuron"):
        ours, theirs = (found.array("json", "json", kind).flatten() for found in (adapter, scores))
        assert spearmanr(ours, theirs).statistic > 0.99, kind
        assert float((ours - theirs).norm() / theirs.norm()) < 0.1, kind
