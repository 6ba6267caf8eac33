"""``score`` from files to files: what is in the artifact, that it does not depend on packing, and that runs survive."""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tinydisk import save_family, save_model

from wpmerge.arch import KINDS
from wpmerge.attribution import linear
from wpmerge.errors import AnchorError, CapabilityError, CheckpointError, OutputError, WpmergeError
from wpmerge.memory import Budget
from wpmerge.models import open_family
from wpmerge.readings import ScoreSettings
from wpmerge.readouts import LogProbReadout, measure
from wpmerge.rows import pack
from wpmerge.scores import Scores, load_scores
from wpmerge.scoring import score

SETTINGS = ScoreSettings(
    prompts=6,
    held_out=4,
    reference_tokens=5,
    top=2,
    sample=2,
    verify_prompts=3,
    accept_anchor=True,
    estimators=("linear", "integrated"),
    integrated_points=2,
)
QUICK = dataclasses.replace(SETTINGS, top=0, sample=0, estimators=("linear",))


def words(generator: random.Random, count: int) -> str:
    return " ".join(f"w{generator.randrange(50)}" for _ in range(count))


def prompts(seed: int, *, count: int = 12, pairs: bool, references: bool) -> list[dict[str, str]]:
    generator = random.Random(seed)
    found = []
    for n in range(count):
        entry = {"prompt": f"w{n} {words(generator, 4)} w50 w51"}
        if pairs:
            entry["without"] = entry["prompt"].removesuffix(" w50 w51")
        if references:
            entry["reference"] = words(generator, 3)
        found.append(entry)
    return found


def write(path: Path, entries: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Disk:
    """Inputs of a run: two experts, one with contrast pairs and references, one with bare prompts."""

    root: Path
    models: dict[str, str]
    capabilities: dict[str, str]

    def score(self, out: str | Path, settings: ScoreSettings = SETTINGS, **options: object) -> Scores:
        given = {
            "base": self.models["base"],
            "experts": {name: path for name, path in self.models.items() if name != "base"},
            "capabilities": self.capabilities,
            "out": self.root / out,
            "settings": settings,
            **options,
        }
        return score(**given)


def make_disk(root: Path) -> Disk:
    models = save_family(root / "models")
    capabilities = {
        "e0": write(root / "e0.jsonl", prompts(0, pairs=True, references=True)),
        "e1": write(root / "e1.jsonl", prompts(1, pairs=False, references=False)),
    }
    return Disk(root=root, models=models, capabilities=capabilities)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    return make_disk(tmp_path_factory.mktemp("scoring"))


@pytest.fixture(scope="module")
def scores(disk: Disk) -> Scores:
    return disk.score("whole")


def test_every_estimator_readout_expert_and_kind_has_its_array(scores: Scores) -> None:
    labels = {"e0": "e0", "e0@anchor": "e0", "e1": "e1", "e1@anchor": "e1"}
    kinds = {kind for kind in KINDS if kind not in ("positions", "lm_head")}  # rotary, and tied
    linear_keys = {f"linear/{label}/{expert}/{kind}" for label in labels for expert in ("e0", "e1") for kind in kinds}
    own_keys = {f"integrated/{label}/{own}/{kind}" for label, own in labels.items() for kind in kinds}
    assert scores.arrays.keys() == linear_keys | own_keys
    assert set(scores.readouts) == set(labels)
    for label, own in labels.items():
        record = scores.readouts[label]
        assert record.capability == own
        assert record.readout == ("anchor" if "@" in label else "reference")
        assert record.anchor == ({"e0": "contrast", "e1": "pair"}[own] if "@" in label else None)
        assert len(record.curve) == (3 if "@" in label else 0)
        assert record.gap == pytest.approx(record.expert - record.base)
        assert record.prompts == 6
        assert set(record.verification) == {"sufficiency"}
        assert set(record.verification["sufficiency"]) == (kinds - {"final_norm"} if "@" in label else kinds)
        assert record.integrated_residual is not None
    shapes = {"head": (3, 4), "neuron": (3, 32), "kv_group": (3, 2), "norm": (3, 2), "output_bias": (3, 2)}
    for key, array in scores.arrays.items():
        assert tuple(array.shape) == shapes.get(key.rsplit("/", 1)[1], (1, 1)), key
        assert array.dtype == torch.float32


def test_units_that_a_readout_cannot_see_are_nan_and_no_others(scores: Scores) -> None:
    for key, array in scores.arrays.items():
        _, label, _, kind = key.split("/")
        record = scores.readouts[label]
        if kind == "final_norm":
            assert bool(array.isnan()) is (record.readout == "anchor"), key
        elif len(array) == 1:
            assert not array.isnan().any(), key
        else:
            expected = [layer > record.l_star for layer in range(3)]
            assert array.isnan().all(dim=1).tolist() == array.isnan().any(dim=1).tolist() == expected, key
    assert [scores.readouts[label].l_star for label in ("e0", "e1")] == [2, 2]
    assert any(scores.readouts[label].l_star < 2 for label in ("e0@anchor", "e1@anchor")), "0.9 of 3 layers is 2"


def test_recoveries_are_effects_over_the_own_experts_gap(disk: Disk, scores: Scores) -> None:
    """Own and cross arrays again, from the pieces: the sequences of the scored prompts, all in one row."""
    family = open_family(disk.models["base"], {name: disk.models[name] for name in ("e0", "e1")})
    by_text = {
        entry["prompt"]: entry for entry in map(json.loads, Path(disk.capabilities["e0"]).read_text().splitlines())
    }
    chosen = [by_text[text] for text in scores.capabilities["e0"].scored]
    heads = [family.chat.prompt_tokens(entry["prompt"]) for entry in chosen]
    sequences = [
        head + family.chat.reply_tokens(entry["reference"], limit=5) for head, entry in zip(heads, chosen, strict=True)
    ]
    readout = LogProbReadout(layer=2, sequences=sequences, starts=[len(head) for head in heads])
    rows = pack(sequences)
    value = {name: float(measure(family.engine, family.weights[name], rows, readout).mean()) for name in ("", "e0")}
    record = scores.readouts["e0"]
    assert record.base == pytest.approx(value[""], rel=1e-5)
    assert record.expert == pytest.approx(value["e0"], rel=1e-5)
    effects = linear(family.engine, family.weights[""], [family.weights["e0"], family.weights["e1"]], rows, readout)
    for name, arrays in zip(("e0", "e1"), effects, strict=True):
        for kind, array in arrays.items():
            expected = (array / (value["e0"] - value[""])).float()
            torch.testing.assert_close(scores.array("e0", name, kind), expected, rtol=1e-3, atol=1e-5)


def test_integrated_shares_sum_to_one_and_the_residual(scores: Scores) -> None:
    for label, record in scores.readouts.items():
        shares = [array for key, array in scores.arrays.items() if key.startswith(f"integrated/{label}/")]
        total = sum(float(array.double().nansum()) for array in shares)
        assert total - 1 == pytest.approx(record.integrated_residual, abs=1e-4)


def test_what_was_scored_and_what_was_kept(disk: Disk, scores: Scores) -> None:
    for name, record in scores.capabilities.items():
        entries = [json.loads(line)["prompt"] for line in Path(disk.capabilities[name]).read_text().splitlines()]
        assert len(record.scored) == 6
        assert len(record.held_out.prompts) == len(record.held_out.sequences) == len(record.held_out.starts) == 4
        assert not set(record.scored) & set(record.held_out.prompts)
        assert set(record.scored) | set(record.held_out.prompts) <= set(entries)
        assert record.references == {"e0": "given", "e1": "expert"}[name]
        for sequence, start in zip(record.held_out.sequences, record.held_out.starts, strict=True):
            assert 1 <= len(sequence) - start <= 5, "no reference is longer than asked"


def test_verified_units_carry_the_linear_score_of_their_prompts(scores: Scores) -> None:
    for label, record in scores.readouts.items():
        assert record.noise_floor is not None
        assert 0 <= record.noise_floor < 1e-3, label
        for kind, entry in record.verification["sufficiency"].items():
            assert sum(unit.drawn == "top" for unit in entry.units) == min(2, len(entry.units))
            assert len(entry.units) <= 4
            # the tops of all prompts and of the first three are not the same list, but one screen is like the other
            assert all(unit.unit.split(".")[0] == kind for unit in entry.units)


def test_the_files_hold_what_is_returned(disk: Disk, scores: Scores) -> None:
    assert sorted(path.name for path in (disk.root / "whole").iterdir()) == ["scores.json", "scores.safetensors"]
    found = load_scores(disk.root / "whole")
    assert found.readouts == scores.readouts
    assert found.capabilities == scores.capabilities
    assert found.arrays.keys() == scores.arrays.keys()
    assert all(torch.equal(found.arrays[key].nan_to_num(9), scores.arrays[key].nan_to_num(9)) for key in found.arrays)
    assert found.provenance["settings"]["prompts"] == 6
    assert found.base.source == disk.models["base"]
    assert not list(disk.root.glob(".whole*")), "nothing is left beside the output"


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(disk: Disk, scores: Scores) -> None:
    disk.score("again")
    disk.score("other", dataclasses.replace(QUICK, seed=1))
    bytes_of = {name: (disk.root / name / "scores.safetensors").read_bytes() for name in ("whole", "again", "other")}
    assert bytes_of["whole"] == bytes_of["again"]
    assert bytes_of["whole"] != bytes_of["other"]
    records = [json.loads((disk.root / name / "scores.json").read_text()) for name in ("whole", "again")]
    for record in records:
        for measured in ("seconds", "peak_memory_bytes"):
            del record["provenance"][measured]
    assert records[0] == records[1], "but for time and memory"


def drift(one: Scores, other: Scores) -> float:
    """Largest difference of a recovery, as a multiple of the readout's noise floor (or of float32's last digits)."""
    worst = 0.0
    for key, array in other.arrays.items():
        record = one.readouts[key.split("/")[1]]
        assert record.noise_floor is not None
        assert torch.equal(array.isnan(), one.arrays[key].isnan()), key
        apart = float((array - one.arrays[key]).abs().nan_to_num().max())
        floor = max(record.noise_floor, 1e-6 * float(one.arrays[key].abs().nan_to_num().max()))
        worst = max(worst, apart / floor)
    return worst


def test_packing_and_streaming_do_not_move_scores(disk: Disk, scores: Scores) -> None:
    for name, settings, resident in (
        ("narrow", dataclasses.replace(QUICK, tokens_per_row=1), True),
        ("middle", dataclasses.replace(QUICK, tokens_per_row=30), True),
        ("streamed", QUICK, False),
    ):
        found = disk.score(name, settings, resident=resident)
        limit = 0.0 if name == "streamed" else 3.0
        assert drift(scores, found) <= limit, name


def test_prompts_that_do_not_fit_into_memory_together_add_up(
    disk: Disk, scores: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wpmerge.scoring.budget", lambda *_, **__: Budget(held_bytes=1))
    most = {}
    for name, settings in (("whole", QUICK), ("groups", dataclasses.replace(QUICK, tokens_per_row=30))):
        steps: list[tuple[str, int, int]] = []
        found = disk.score(f"{name}-again", settings, progress=lambda *told, steps=steps: steps.append(told))
        most[name] = max(of for what, _, of in steps if what == "e0: linear")
    assert most["groups"] > most["whole"]
    assert drift(scores, found) <= 3


def test_prompt_order_does_not_move_scores(disk: Disk, scores: Scores) -> None:
    """The same prompts in other places of the file, but so that the same ones are drawn for scoring."""
    capabilities = {}
    for name in ("e0", "e1"):
        lines = Path(disk.capabilities[name]).read_text().splitlines()
        texts = [json.loads(line)["prompt"] for line in lines]
        places = [texts.index(text) for text in scores.capabilities[name].scored]
        moved = list(lines)
        for place, source in zip(places, places[1:] + places[:1], strict=True):
            moved[place] = lines[source]
        path = disk.root / f"moved-{name}.jsonl"
        path.write_text("\n".join(moved) + "\n")
        capabilities[name] = str(path)
    # halves of an anchor's prompts depend on their order: the layer is given, and the direction is that of all prompts
    layer = {label: scores.readouts[label].l_star for label in ("e0@anchor", "e1@anchor")}
    found = disk.score("moved", QUICK, capabilities=capabilities)
    for name in ("e0", "e1"):
        one, other = scores.capabilities[name].scored, found.capabilities[name].scored
        assert set(one) == set(other)
        assert one != other
    same = {key for key in found.arrays if layer.get(key.split("/")[1], 2) == found.readouts[key.split("/")[1]].l_star}
    kept = dataclasses.replace(found, arrays={key: found.arrays[key] for key in same})
    assert len(kept.arrays) >= 28
    assert drift(scores, kept) <= 3


class Stop:
    """Progress that raises when a given step is told for the first time, and remembers what was told."""

    def __init__(self, at: str | None, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.at, self.error, self.told = at, error, []

    def __call__(self, what: str, done: int, of: int) -> None:
        assert 0 <= done <= of
        self.told.append(what)
        if what == self.at:
            raise self.error


@pytest.mark.parametrize("at", ["e0: linear", "e1: exact", "e1@anchor: linear"])
def test_a_killed_run_goes_on_from_its_pieces(disk: Disk, scores: Scores, at: str) -> None:
    out = disk.root / f"killed-{at.replace(': ', '-')}"
    with pytest.raises(KeyboardInterrupt):
        disk.score(out, progress=Stop(at))
    assert not out.exists()
    (box,) = disk.root.glob(f".{out.name}.wpmerge")
    second = Stop(None)
    disk.score(out, progress=second)
    assert not box.exists()
    assert (out / "scores.safetensors").read_bytes() == (disk.root / "whole/scores.safetensors").read_bytes()
    assert load_scores(out).readouts == scores.readouts
    order = ["e1: the expert's own replies", "e0: linear", "e0: exact", "e0@anchor: linear", "e1: linear", "e1: exact"]
    finished = {"e0: linear": 1, "e1: exact": 5, "e1@anchor: linear": 6}[at]
    for step, what in enumerate(order):
        assert (what in second.told) is (step >= finished), what


def test_pieces_of_other_work_are_not_used(disk: Disk) -> None:
    """Killed, and then asked for something else: settings, prompts, and what the model's template makes of them."""
    models = {name: shutil.copytree(path, disk.root / "copies" / name) for name, path in disk.models.items()}
    copies = dataclasses.replace(disk, models={name: str(path) for name, path in models.items()})
    file = Path(shutil.copy(disk.capabilities["e1"], disk.root / "copied.jsonl"))
    capabilities = {**disk.capabilities, "e1": str(file)}

    def change_settings() -> ScoreSettings:
        return dataclasses.replace(QUICK, reference_tokens=4)

    def change_prompts() -> ScoreSettings:
        file.write_text(file.read_text().replace("w50 w51", "w51 w50"))
        return QUICK

    def change_template() -> ScoreSettings:
        template = models["base"] / "chat_template.jinja"
        template.write_text(template.read_text().replace("<user>", "<user> w9"))
        return QUICK

    for number, change in enumerate((change_settings, change_prompts, change_template)):
        out = disk.root / f"changed-{number}"
        with pytest.raises(KeyboardInterrupt):
            copies.score(out, QUICK, capabilities=capabilities, progress=Stop("e1@anchor: linear"))
        second = Stop(None)
        settings = change()
        found = copies.score(out, settings, capabilities=capabilities, progress=second)
        assert "e1: the expert's own replies" in second.told, change.__name__
        fresh = copies.score(disk.root / f"fresh-{number}", settings, capabilities=capabilities)
        assert all(torch.equal(found.arrays[k].nan_to_num(9), v.nan_to_num(9)) for k, v in fresh.arrays.items())


def test_a_run_that_fails_leaves_nothing(disk: Disk) -> None:
    before = set(disk.root.iterdir())
    with pytest.raises(RuntimeError):
        disk.score("failed", QUICK, progress=Stop("e1: linear", RuntimeError))
    assert set(disk.root.iterdir()) == before


def test_a_subset_of_kinds_and_of_experts(disk: Disk, scores: Scores) -> None:
    settings = dataclasses.replace(
        SETTINGS, kinds=("head", "norm"), cross=False, readouts=("anchor",), layer=0, estimators=("linear",)
    )
    found = disk.score("subset", settings)
    assert found.arrays.keys() == {f"linear/{name}/{name}/{kind}" for name in ("e0", "e1") for kind in ("head", "norm")}
    assert {record.l_star for record in found.readouts.values()} == {0}
    assert all(set(r.verification["sufficiency"]) == {"head", "norm"} for r in found.readouts.values())


# bad input ------------------------------------------------------------------------------------------------------------


def edit(directory: str | Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = Path(directory) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def break_nan(disk: Disk) -> None:
    edit(disk.models["e1"], lambda t: t["model.layers.2.mlp.up_proj.weight"].view(-1).__setitem__(3, torch.nan))


def break_truncated(disk: Disk) -> None:
    path = Path(disk.models["e1"]) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def break_missing(disk: Disk) -> None:
    edit(disk.models["e1"], lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))


def break_shape(disk: Disk) -> None:
    edit(disk.models["e1"], lambda t: t.update({"model.norm.weight": torch.ones(4)}))


def break_same(disk: Disk) -> None:
    shutil.copy(Path(disk.models["base"]) / "model.safetensors", disk.models["e1"])


def break_architecture(disk: Disk) -> None:
    shutil.rmtree(disk.models["e1"])
    save_model(Path(disk.models["e1"]), tiny_model("qwen2", seed=1))


def break_tokenizer(disk: Disk) -> None:
    path = Path(disk.models["e1"]) / "tokenizer.json"
    path.write_text(path.read_text().replace('"w7"', '"seven"'))


def break_empty(disk: Disk) -> None:
    Path(disk.capabilities["e1"]).write_text("")


def break_line(disk: Disk) -> None:
    path = Path(disk.capabilities["e1"])
    path.write_text(path.read_text().replace('{"prompt": "w4 ', '{"prompt": w4 '))


def break_short(disk: Disk) -> None:
    write(Path(disk.capabilities["e1"]), prompts(1, count=7, pairs=False, references=False))


@pytest.mark.parametrize(
    ("fault", "kind", "where", "what"),
    [
        (break_nan, CheckpointError, "model.layers.2.mlp.up_proj.weight", "not finite"),
        (break_truncated, CheckpointError, "e1/model.safetensors", "ends before"),
        (break_missing, CheckpointError, "e1", "not of the base's family"),
        (break_shape, CheckpointError, "e1", "not of the base's family"),
        (break_same, CheckpointError, "e1", "the base itself"),
        (break_architecture, CheckpointError, "e1", "not of the base's family"),
        (break_tokenizer, CheckpointError, "e1", "not of the base's family"),
        (break_empty, CapabilityError, "e1.jsonl", "empty"),
        (break_line, CapabilityError, "e1.jsonl, line 5", "not JSON"),
        (break_short, CapabilityError, "e1.jsonl", "too few prompts"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    tmp_path: Path, fault: Callable[[Disk], None], kind: type[WpmergeError], where: str, what: str
) -> None:
    disk = make_disk(tmp_path)
    fault(disk)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind) as caught:
        disk.score("out", QUICK)
    assert where in str(caught.value.where)
    assert what in caught.value.what
    assert sorted(tmp_path.rglob("*")) == before


def test_an_expert_without_a_gap_is_refused_even_if_insisted_on(disk: Disk, tmp_path: Path) -> None:
    """Other weights, the same function: a neuron whose gate is dead. Nothing is a fraction of a gap of 0."""
    prefix = "model.layers.1.mlp"
    for number, name in enumerate(("base", "twin")):
        shutil.copytree(disk.models["base"], tmp_path / name)
        for leaf in ("weight", "bias"):
            edit(tmp_path / name, lambda t, leaf=leaf: t[f"{prefix}.gate_proj.{leaf}"][7].zero_())
        edit(tmp_path / name, lambda t, number=number: t[f"{prefix}.up_proj.weight"][7].add_(number))
    models = {"base": str(tmp_path / "base"), "e0": str(tmp_path / "twin")}
    twin = dataclasses.replace(disk, models=models, capabilities={"e0": disk.capabilities["e0"]})
    with pytest.raises(AnchorError, match="more strongly than the base") as caught:
        twin.score(tmp_path / "out", QUICK)
    assert "gap 0" in str(caught.value.got)
    assert not (tmp_path / "out").exists()


def test_gaps_and_anchors_that_may_be_nothing_are_refused_with_their_numbers(disk: Disk) -> None:
    cautious = dataclasses.replace(QUICK, accept_anchor=False)
    with pytest.raises(AnchorError, match="more strongly than the base") as caught:
        disk.score("gapless", dataclasses.replace(cautious, readouts=("reference",)))
    assert "t = " in str(caught.value.got)
    assert "over 6 prompts" in str(caught.value.got)
    with pytest.raises(AnchorError, match="no layer gives a reliable anchor") as caught:
        disk.score("gapless", dataclasses.replace(cautious, readouts=("anchor",)))
    assert caught.value.where == "e0"
    with pytest.raises(AnchorError, match="no such layer"):
        disk.score("gapless", dataclasses.replace(QUICK, readouts=("anchor",), layer=3))
    assert not list(disk.root.glob("*gapless*"))


def test_outputs_that_exist_or_are_inputs_are_refused(tmp_path: Path) -> None:
    disk = make_disk(tmp_path)
    disk.score("out", QUICK)
    held = (tmp_path / "out/scores.safetensors").read_bytes()
    with pytest.raises(OutputError, match="exists"):
        disk.score("out", QUICK)
    for out in ("models", "models/e1", "models/e1/inside", "models/base"):
        with pytest.raises(OutputError):
            disk.score(out, QUICK, overwrite=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/text").touch()
    with pytest.raises(OutputError, match="refused to replace"):
        disk.score("notes", QUICK, overwrite=True)
    assert (tmp_path / "models/e1/model.safetensors").is_file()
    assert (tmp_path / "out/scores.safetensors").read_bytes() == held
    disk.score("out", dataclasses.replace(QUICK, seed=1), overwrite=True)
    assert (tmp_path / "out/scores.safetensors").read_bytes() != held


def test_a_capability_file_inside_the_output_is_an_input(tmp_path: Path) -> None:
    disk = make_disk(tmp_path)
    disk.score("out", QUICK)
    moved = shutil.move(disk.capabilities["e1"], tmp_path / "out/e1.jsonl")
    with pytest.raises(OutputError, match="contains an input"):
        disk.score("out", QUICK, overwrite=True, capabilities={**disk.capabilities, "e1": str(moved)})
    assert Path(moved).is_file()


def test_a_full_disk_is_said_before_work_starts(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(disk.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    told = Stop(None)
    with pytest.raises(OutputError, match="not enough disk space"):
        disk.score("full", QUICK, progress=told)
    assert told.told == ["opening models"]
    assert not list(disk.root.glob("*full*"))


@pytest.mark.parametrize("name", ["", "a/b", "a@anchor", ".hidden", "a b", "base", "é"])
def test_names_that_would_blur_keys_are_refused(disk: Disk, name: str) -> None:
    with pytest.raises(CapabilityError, match="cannot be used as a name"):
        disk.score("named", QUICK, experts={name: disk.models["e0"]}, capabilities={name: disk.capabilities["e0"]})


def test_every_expert_has_its_capability_and_every_capability_its_expert(disk: Disk) -> None:
    for missing, kept in (("e0", "e1"), ("e1", "e0")):
        one = {kept: disk.capabilities[kept]}
        with pytest.raises(CapabilityError, match=f"expert {missing} has no capability"):
            disk.score("named", QUICK, capabilities=one)
        with pytest.raises(CapabilityError, match=f"capability {missing} has no expert"):
            disk.score("named", QUICK, experts={kept: disk.models[kept]})


@pytest.fixture(scope="module")
def everything(disk: Disk) -> Scores:
    """Both directions, every estimator and readout, fine and coarse kinds, and a retain set, all units replaced."""
    settings = dataclasses.replace(
        SETTINGS,
        kinds=("head", "norm", "embedding", "attention", "layer", "tensor"),
        readouts=("reference", "divergence", "anchor"),
        estimators=("linear", "integrated", "exact"),
        directions=("sufficiency", "necessity"),
        integrated_points=8,
        verify_prompts=6,
    )
    return disk.score("everything", settings, retain={"plain": disk.capabilities["e1"]})


def test_both_directions_every_estimator_and_a_retain_set(disk: Disk, everything: Scores) -> None:
    kinds = ("head", "norm", "embedding", "attention", "layer", "tensor")
    expected = set()
    for own in ("e0", "e1"):
        for label in (own, f"{own}@divergence", f"{own}@anchor"):
            expected |= {f"{name}/{label}/{own}" for name in ("linear", "integrated", "exact")}
            if "divergence" not in label:
                expected |= {f"{name}-necessity/{label}/{own}" for name in ("linear", "exact")}
            expected |= {f"linear/{label}/{other}" for other in ("e0", "e1")}
    expected |= {f"{name}/plain/{other}" for name in ("linear", "integrated", "exact") for other in ("e0", "e1")}
    assert everything.arrays.keys() == {f"{key}/{kind}" for key in expected for kind in kinds}
    record = everything.readouts["plain"]
    assert (record.gap, record.expert, record.verification) == (None, None, {})
    assert everything.capabilities["plain"].retain
    assert everything.capabilities["plain"].references == "base"
    assert load_scores(disk.root / "everything").readouts == everything.readouts


def test_exact_arrays_are_what_verification_found(everything: Scores) -> None:
    """Verified on all six prompts: the same number by another road, in either direction."""
    for label, record in everything.readouts.items():
        own = record.capability
        for direction, kinds in record.verification.items():
            for kind, entry in kinds.items():
                array = everything.array(label, own, kind, estimator="exact", direction=direction)
                for unit in entry.units:
                    layer, index = (0, 0) if kind == "embedding" else map(int, unit.unit.split(".")[1:])
                    assert unit.exact == pytest.approx(float(array[layer, index]), abs=1e-3 + 1e-2 * abs(unit.exact))


def test_necessity_of_everything_is_the_gap(disk: Disk) -> None:
    """One layer, all of it and what stands outside it: undoing the expert unit by unit, hand-made."""
    family = open_family(disk.models["base"], {name: disk.models[name] for name in ("e0", "e1")})
    found = disk.score(
        "necessity",
        dataclasses.replace(
            QUICK,
            kinds=("layer",),
            directions=("sufficiency", "necessity"),
            estimators=("linear", "exact"),
            readouts=("reference",),
        ),
    )
    case = found.capabilities["e0"]
    entries = {e["prompt"]: e for e in map(json.loads, Path(disk.capabilities["e0"]).read_text().splitlines())}
    heads = [family.chat.prompt_tokens(text) for text in case.scored]
    replies = [family.chat.reply_tokens(entries[text]["reference"], limit=5) for text in case.scored]
    sequences = [head + reply for head, reply in zip(heads, replies, strict=True)]
    readout, rows = LogProbReadout(layer=2, sequences=sequences, starts=[len(h) for h in heads]), pack(sequences)

    class Undone:
        """The expert with layer 1 from the base."""

        def layer(self, index: int) -> dict[str, torch.Tensor]:
            return family.weights["" if index == 1 else "e0"].layer(index)

        def outer(self, names: object = None) -> dict[str, torch.Tensor]:
            return family.weights["e0"].outer()

    values = [float(measure(family.engine, s, rows, readout).mean()) for s in (family.weights["e0"], Undone())]
    expected = (values[0] - values[1]) / found.readouts["e0"].gap
    necessity = found.array("e0", "e0", "layer", estimator="exact", direction="necessity")
    assert float(necessity[1, 0]) == pytest.approx(expected, abs=2e-4)
    assert not torch.allclose(necessity, found.array("e0", "e0", "layer", estimator="exact"), atol=1e-3)


def test_divergence_is_zero_at_the_expert_and_its_gap_is_positive(everything: Scores) -> None:
    for name in ("e0", "e1"):
        record = everything.readouts[f"{name}@divergence"]
        assert record.expert == pytest.approx(0, abs=1e-6)
        assert record.base < 0 < record.gap


def test_a_bound_on_memory_streams_and_changes_nothing(disk: Disk, scores: Scores) -> None:
    settings = dataclasses.replace(QUICK, max_memory=64 << 30)
    assert drift(scores, disk.score("roomy", settings)) == 0
    with pytest.raises(WpmergeError, match="--max-memory") as caught:
        disk.score("cramped", dataclasses.replace(QUICK, max_memory=1 << 20))
    assert "at least" in str(caught.value.expected)
    assert not list(disk.root.glob("*cramped*"))


@pytest.mark.parametrize("stage", ["e0: linear", "e0@divergence: integrated", "e1: exact"])
def test_a_run_killed_in_the_middle_of_a_stage_goes_on_inside_it(disk: Disk, stage: str) -> None:
    """Layers, nodes and passes that were finished are not told again as undone work, and the file is the same."""
    settings = dataclasses.replace(
        QUICK,
        kinds=("head", "neuron", "norm"),
        readouts=("reference", "divergence"),
        estimators=("linear", "integrated", "exact"),
        integrated_points=3,
    )
    out = disk.root / f"middle-{stage[:2]}-{stage.rsplit(maxsplit=1)[-1]}"
    seen = []

    def stop(what: str, done: int, of: int) -> None:
        if what == stage:
            seen.append(done)
            if 0 < done < of and len(seen) > 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disk.score(out, settings, progress=stop)
    (box,) = disk.root.glob(f".{out.name}.wpmerge")
    kept = {path.name for path in box.rglob("*.safetensors")}
    assert any(name.startswith(stage.split(": ")[1]) for name in kept), kept
    whole = disk.score(f"{out.name}-whole", settings)
    found = disk.score(out, settings)
    assert (out / "scores.safetensors").read_bytes() == (
        disk.root / f"{out.name}-whole/scores.safetensors"
    ).read_bytes()
    assert found.readouts == whole.readouts


def test_a_resumed_run_cuts_its_work_as_the_first_did(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free memory is another when the run goes on: the groups of rows stay those of the pieces."""
    settings = dataclasses.replace(QUICK, tokens_per_row=30, readouts=("reference",))
    whole = disk.score("cut-whole", settings)
    told = []

    def stop(what: str, done: int, of: int) -> None:
        told.append(what)
        if told.count("e0: linear") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disk.score("cut", settings, progress=stop)
    monkeypatch.setattr("wpmerge.scoring.budget", lambda *_, **__: Budget(held_bytes=1))
    found = disk.score("cut", settings)
    assert all(torch.equal(found.arrays[key].nan_to_num(9), array.nan_to_num(9)) for key, array in whole.arrays.items())


def test_what_scores_rest_on_cannot_be_left_out(disk: Disk) -> None:
    for change in ({"estimators": ("integrated",)}, {"directions": ("necessity",)}):
        with pytest.raises(WpmergeError, match="rest"):
            dataclasses.replace(QUICK, **change)
    with pytest.raises(CapabilityError, match="no unit of these kinds"):
        disk.score("named", dataclasses.replace(QUICK, kinds=("positions",)))
