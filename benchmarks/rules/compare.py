"""What does each rule keep, at each granularity, on prompts that nothing was chosen on?

    python -m benchmarks.rules.compare --work DIR [--family demo] [--seeds 0 1 2] [--only NAME …] [--retain]
        [--out OUT]

Each seed scores the family anew, on its own draw of prompts; what is left of them chooses numbers. Read is the share of
the gap in log-probability of the experts' own replies (retention) that a merge keeps on test prompts in other wordings.
With --retain there is a retain set, plain questions, and what the merge loses on others of them, nats per token;
`refine` without one of its parts, or from another start, is left out then: those steps know nothing of retain sets.
What OUT has of a variant and seed is not run again: a killed run goes on, and others may be added.
The last line is JSON: per variant mean and minimum retention with their range over seeds, and differences to `scaled`.
"""

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.reporting import conditions
from wpmerge.activation import PATCHED, activation_effects
from wpmerge.bench_controls import shuffled
from wpmerge.calibration import HeldOutReading, Standing, assess, merged_source, read_held_out
from wpmerge.coefficients import Rule
from wpmerge.fusing import FuseSettings, open_scored_family
from wpmerge.models import Family, continuations
from wpmerge.output import write_file
from wpmerge.readings import ScoreSettings
from wpmerge.readouts import LogProbReadout, ReplyReadout
from wpmerge.refining import Merging, RefineSettings, refine
from wpmerge.roles import roles_of
from wpmerge.rows import pack
from wpmerge.rules import SCORED, RuleOutcome, coefficients_for
from wpmerge.scores import Scores, load_scores
from wpmerge.scoring import score
from wpmerge.tuning import held_out_readings, scored_readings

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "wpmerge" / "demo_family"
REPLY = 80
RETAIN = "plain"
QUESTION = "What does each rule keep, at each granularity, on prompts that nothing was chosen on?"
SHARES: tuple[Rule, ...] = ("proportional", "select")
ACTIVATION = "activation"
BEHIND = 1e-6
"""What scores of units without a role are multiplied with, to come after all that have one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A family, its prompts, and how many are scored and held out.

    Attributes:
        models: directory of base and experts.
        prompts: expert → JSONL to score and choose on.
        tests: expert → test prompts.
        prompts_count: scored prompts a capability.
        held_out: prompts that choose.
    """

    models: Path
    prompts: Mapping[str, Path]
    tests: Mapping[str, list[str]]
    prompts_count: int
    held_out: int


def demo() -> Setup:
    """The family that comes with the package: its evaluation prompts are in other wordings, on other queries."""
    marks = {
        "letters": ("english_capital", "no_comma"),
        "marks": ("title", "highlighted_sections"),
        "frame": ("quotation", "multiple_sections"),
    }
    entries = _lines(DEMO / "eval.jsonl")
    tests = {
        name: [e["prompt"] for e in entries if any(kind in e["instruction_id_list"][0] for kind in kinds)]
        for name, kinds in marks.items()
    }
    return Setup(
        models=DEMO,
        prompts={name: DEMO / "prompts" / f"{name}.jsonl" for name in marks},
        tests=tests,
        prompts_count=48,
        held_out=24,
    )


def smollm2(models: Path, shared: Path) -> Setup:
    """SmolLM2-135M and its three LoRA experts."""
    names = ("format", "math", "json")
    return Setup(
        models=models,
        prompts={name: shared / "prompts" / f"{name}.jsonl" for name in names},
        tests={name: [e["prompt"] for e in _lines(shared / "eval" / f"{name}.jsonl")][:36] for name in names},
        prompts_count=48,
        held_out=20,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


Change = Callable[[Scores], Scores]
Variant = tuple[FuseSettings, Change]
FIXED = {"power": 0.5, "density": 0.2, "floor": 0.3, "mu": 1.0}
"""Numbers at which scores count, whether they help or not; the scales are 0.7."""


@dataclass(frozen=True, kw_only=True)
class Walk(FuseSettings):
    """``refine`` otherwise than it is: what its parts bring.

    Attributes:
        parts: numbers of the steps that ``FuseSettings`` has none for.
        begin: the rule whose calibrated coefficients are the start; None for the best common scale.
        alike: let all units move alike, however long their task vectors are.
    """

    parts: Mapping[str, float] = field(default_factory=dict)
    begin: Rule | None = None
    alike: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Alike(Merging):
    """A merging whose task vectors are all of one length."""

    def norms(self) -> Tensor:
        """See :meth:`Merging.norms`."""
        return (Merging.norms(self) > 0).double()


def walked(settings: Walk, family: Family, scores: Scores) -> RuleOutcome:
    """The steps of ``refine`` as a :class:`Walk` says."""
    plain = {each.name: getattr(settings, each.name) for each in fields(FuseSettings)}
    begun = FuseSettings(**plain | {"steps": 0})  # the best common scale, no step taken
    if settings.begin is not None:
        begun = replace(begun, rule=settings.begin, calibrate=True)
    start = coefficients_for(begun, family, scores)
    names = tuple(scores.experts)
    merging = (Alike if settings.alike else Merging)(
        engine=family.engine,
        base=family.weights[""],
        experts={name: family.weights[name] for name in names},
        grouping=start.grouping,
    )
    steps_on, held_out = scored_readings(family, scores, names), held_out_readings(family, scores, names)
    numbers = replace(settings.refine_settings, **settings.parts)  # type: ignore[arg-type]
    refined = refine(merging, start.values, steps_on, held_out, numbers)
    return replace(
        start,
        settings=replace(start.settings, rule="refine"),
        coefficients=merging.per_tensor(refined.coefficients),
        values=refined.coefficients,
        standing=refined.standing,
        evaluations=start.evaluations + len(refined.checks),
        joint=None,
        refined=refined,
    )


def walks() -> dict[str, Variant]:
    """Name → ``refine`` with another start, or without one of its parts."""
    changed = {
        "from proportional": Walk(begin="proportional"),
        "from select": Walk(begin="select"),
        "from joint": Walk(begin="joint"),
        "units alike": Walk(alike=True),
        "half the rate": Walk(parts={"rate": RefineSettings().rate / 2}),
        "twice the rate": Walk(parts={"rate": 2 * RefineSettings().rate}),
    }
    return {f"refine unit, {name}": (settings, _same) for name, settings in changed.items()}


def variants() -> dict[str, Variant]:
    """Name → settings, and what is done to the scores first."""
    found: dict[str, Variant] = {
        "uniform": (FuseSettings(rule="uniform"), _same),
        "scaled": (FuseSettings(rule="scaled"), _same),
    }
    for level in ("block", "tensor", "unit"):
        for rule in ("proportional", "select", "joint"):
            found[f"{rule} {level}"] = (FuseSettings(rule=rule, granularity=level, calibrate=True), _same)
    for level in ("expert", "block", "tensor", "unit"):
        found[f"refine {level}"] = (FuseSettings(rule="refine", granularity=level), _same)  # type: ignore[arg-type]
    joint = FuseSettings(rule="joint", calibrate=True)
    found["joint unit, not calibrated"] = (replace(joint, calibrate=False), _same)
    found["joint unit, no cross effects"] = (joint, _without_cross)
    found["joint unit, shuffled scores"] = (joint, _shuffled_scores)
    for rule in SHARES:
        calibrated = FuseSettings(rule=rule, calibrate=True)
        found[f"{rule} unit, shuffled scores"] = (calibrated, _shuffled_scores)
        found[f"{rule} unit, necessity scores"] = (calibrated, _instead("linear-necessity"))
        found[f"{rule} unit, integrated scores"] = (calibrated, _instead("integrated"))
        found[f"{rule} unit, activation effects"] = (calibrated, _activation_effects)
    found["select unit, units with a role first"] = (FuseSettings(rule="select", calibrate=True), _roles_first)
    for steps, batch in ((8, 12), (16, 4), (16, 8), (32, 12)):
        found[f"refine unit, {steps} steps of {batch}"] = (FuseSettings(rule="refine", steps=steps, batch=batch), _same)
    for rule in SCORED:
        fixed = FuseSettings(rule=rule, scales={"": 0.7}, **FIXED)  # type: ignore[arg-type]
        found[f"{rule} unit, fixed"] = (fixed, _same)
        found[f"{rule} unit, fixed, shuffled scores"] = (fixed, _shuffled_scores)
        if rule in SHARES:  # joint's cross effects are for sufficiency
            found[f"{rule} unit, fixed, necessity scores"] = (fixed, _instead("linear-necessity"))
    found |= walks()
    found["refine unit, ridge .05"] = (FuseSettings(rule="refine", ridge=0.05), _same)
    for count in (4, 8, 16, 32):
        found[f"refine unit, {count} prompts"] = (FuseSettings(rule="refine"), _first(count))
    return found


def _same(scores: Scores) -> Scores:
    return scores


def _instead(estimator: str) -> Change:
    """Other scores of an expert on its own capability in the place of the linear ones."""

    def other(scores: Scores) -> Scores:
        return replace(scores, arrays={**scores.arrays, **{key: found for key, _, found in _beside(scores, estimator)}})

    return other


def _beside(scores: Scores, estimator: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Wherever an estimator has numbers: the key of the linear scores there, these, and its own."""
    for key, found in scores.arrays.items():
        first, rest = key.split("/", 1)
        if first == estimator:
            yield f"linear/{rest}", scores.arrays[f"linear/{rest}"], found


def _activation_effects(scores: Scores) -> Scores:
    """A(u) in the place of R(u), each kind's sum made that of R(u).

    A(u) counts again in every layer what an earlier one has sent: as it is, heads and neurons would stand before all
    kinds that have none.
    """
    arrays = dict(scores.arrays)
    for key, weights, effect in _beside(scores, ACTIVATION):
        arrays[key] = effect * weights.clamp_min(0).sum() / effect.clamp_min(0).sum()
    return replace(scores, arrays=arrays)


def _roles_first(scores: Scores) -> Scores:
    """Heads and neurons with a role before all others, which keep their order: sources by R(u), relays by A(u).

    The readout comes after the last layer, so that no unit comes after it: there is no execution.
    """
    arrays = dict(scores.arrays)
    for key, weights, effect in _beside(scores, ACTIVATION):
        found = roles_of(weights, effect, effect, layer=len(effect))
        relays = torch.where(found["aggregation"], effect, BEHIND * weights)
        arrays[key] = torch.where(found["source"], weights, relays)
    return replace(scores, arrays=arrays)


def with_activation(family: Family, scores: Scores) -> Scores:
    """The scores with A(u) of each expert on the log-probability of its own replies, as a share of its gap."""
    arrays = dict(scores.arrays)
    known = {name: record for name, record in scores.capabilities.items() if name in scores.experts}
    for name, reading in scored_readings(family, replace(scores, capabilities=known), tuple(scores.experts)).items():
        assert isinstance(reading.readout, ReplyReadout), "experts are read by the replies that a merge keeps"
        models = (family.weights[""], family.weights[name])
        own = read_held_out(family.engine, *models, reading.readout.own, reading.rows)
        effects = activation_effects(family.engine, *models, own.rows, own.readout)
        for kind in PATCHED:
            arrays[f"{ACTIVATION}/{name}/{name}/{kind}"] = effects[kind].double() / (own.expert - own.base)
    return replace(scores, arrays=arrays)


def _without_cross(scores: Scores) -> Scores:
    """Every expert's effect on the others' capabilities said to be 0."""
    arrays = {}
    for key, array in scores.arrays.items():
        label, expert = key.split("/")[1:3]
        arrays[key] = array if label in (expert, RETAIN) else torch.zeros_like(array)
    return replace(scores, arrays=arrays)


def _shuffled_scores(scores: Scores) -> Scores:
    """Scores dealt anew among the units of a kind, alike for all capabilities."""
    arrays = {}
    for key, array in scores.arrays.items():
        expert, kind = key.split("/")[2:]
        generator = torch.Generator().manual_seed(sum(map(ord, expert + kind)))
        arrays[key] = array.flatten()[torch.randperm(array.numel(), generator=generator)].view(array.shape)
    return replace(scores, arrays=arrays)


def _first(count: int) -> Change:
    """Only so many prompts to take steps on, and half as many to stop by."""

    def fewer(scores: Scores) -> Scores:
        records = {}
        for name, record in scores.capabilities.items():
            held, kept = record.held_out, max(4, count // 2)
            fewer_held = held.model_copy(
                update={key: getattr(held, key)[:kept] for key in ("prompts", "sequences", "starts")}
            )
            records[name] = record.model_copy(update={"scored": record.scored[:count], "held_out": fewer_held})
        return replace(scores, capabilities=records)

    return fewer


def plain_questions(setup: Setup, work: Path) -> tuple[Path, list[str]]:
    """A retain set, and others of its kind to test on: the prompts' queries without any instruction."""
    queries = [e["without"] for path in setup.prompts.values() for e in _lines(path) if e.get("without")]
    queries = list(dict.fromkeys(queries))
    kept, tests = queries[0::2][:96], queries[1::2][:48]
    place = work / "plain.jsonl"
    place.write_text("".join(json.dumps({"prompt": query}) + "\n" for query in kept), encoding="utf-8")
    return place, tests


def scores_of(setup: Setup, seed: int, work: Path, retain: Path | None) -> Path:
    """Scores of this seed's draw, taken if they are not there."""
    place = work / f"scores-{seed}{'-retain' if retain else ''}"
    if not place.exists():
        score(
            base=str(setup.models / "base"),
            experts={name: str(setup.models / name) for name in setup.prompts},
            capabilities={name: str(path) for name, path in setup.prompts.items()},
            retain={RETAIN: str(retain)} if retain else None,
            out=place,
            settings=ScoreSettings(
                readouts=("reference",),
                prompts=setup.prompts_count,
                held_out=setup.held_out,
                reference_tokens=REPLY,
                top=0,
                sample=0,
                estimators=("linear", "integrated"),
                directions=("sufficiency", "necessity"),
                seed=seed,
            ),
        )
    return place


def test_readings(family: Family, tests: Mapping[str, Sequence[str]], work: Path) -> dict[str, HeldOutReading]:
    """The test prompts with the experts' (for the retain set the base's) own replies."""
    store = work / "replies.json"
    known = json.loads(store.read_text()) if store.exists() else {}
    readings = {}
    for name, texts in tests.items():
        model = "" if name == RETAIN else name
        if name not in known or len(known[name]) != len(texts):
            known[name] = continuations(family, model, list(texts), tokens=REPLY)
            store.write_text(json.dumps(known))
        readings[name] = answered(family, model, texts, known[name])
    return readings


def answered(family: Family, model: str, texts: Sequence[str], replies: Sequence[Sequence[int]]) -> HeldOutReading:
    """Prompts and what a model has said to them; "" is the base, for a retain set."""
    heads = [family.chat.prompt_tokens(text) for text in texts]
    sequences = [[*head, *reply] for head, reply in zip(heads, replies, strict=True)]
    readout = LogProbReadout(layer=family.layout.layers - 1, sequences=sequences, starts=[len(head) for head in heads])
    expert = family.weights[model] if model else None
    return read_held_out(family.engine, family.weights[""], expert, readout, pack(sequences))


def entry(name: str, seed: int, outcome: RuleOutcome, found: Standing, seconds: float) -> dict[str, Any]:
    """One line of the result."""
    kept = list(found.kept.values())
    return {
        "variant": name,
        "seed": seed,
        "test": dict(found.kept),
        "mean": statistics.mean(kept),
        "minimum": min(kept),
        "utility": found.worth(1e9),
        "lost": dict(found.lost),
        "held_out": dict(outcome.standing.kept) if outcome.standing else None,
        "held_out_lost": dict(outcome.standing.lost) if outcome.standing else None,
        "evaluations": outcome.evaluations,
        "chosen": outcome.record,
        "seconds": round(seconds, 1),
    }


def run_seed(
    setup: Setup, seed: int, work: Path, wanted: Mapping[str, Variant], *, retain: bool
) -> Iterator[list[dict[str, Any]]]:
    """Every variant on one draw, as each is found, its control beside it; a line each on stderr."""
    questions = plain_questions(setup, work) if retain else None
    scores = load_scores(scores_of(setup, seed, work, questions[0] if questions else None))
    family = open_scored_family(scores, {}, device="cpu", resident=True, trust_remote_code=False)
    tests = {**setup.tests, **({RETAIN: questions[1]} if questions else {})}
    readings = test_readings(family, tests, work)
    experts = {name: family.weights[name] for name in scores.experts}
    if any("activation" in name or "role" in name for name in wanted):
        scores = with_activation(family, scores)
    for name, (settings, change) in wanted.items():
        began = time.monotonic()
        seeded = replace(settings, seed=seed)
        decide = walked if isinstance(seeded, Walk) else coefficients_for
        outcome = decide(seeded, family, change(scores))  # type: ignore[arg-type]
        spent = time.monotonic() - began
        many = {name: outcome.coefficients}
        if name in ("refine unit", "joint unit"):
            many[f"{name}, its coefficients shuffled"] = shuffled(family.layout, outcome.coefficients, seed=seed)
        entries = []
        for label, coefficients in many.items():
            merged = merged_source(family.engine, family.weights[""], experts, coefficients)
            found = entry(label, seed, outcome, assess(family.engine, merged, readings), spent)
            kept = " ".join(f"{value:.3f}" for value in found["test"].values())
            lost = " ".join(f"{value:+.3f}" for value in found["lost"].values())
            text = (
                f"{seed} {label}: {kept} mean {found['mean']:.3f} min {found['minimum']:.3f} lost {lost} {spent:.0f} s"
            )
            print(text, file=sys.stderr, flush=True)
            entries.append(found)
        yield entries


def summary(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per variant: mean and range over seeds, and the difference to ``scaled`` of the same seed."""
    seeds = {(e["variant"], e["seed"]): e for e in entries}
    found: dict[str, Any] = {}
    for name in dict.fromkeys(e["variant"] for e in entries):
        own = [e for e in entries if e["variant"] == name]
        found[name] = {"seeds": [e["seed"] for e in own]}
        for kept in ("mean", "minimum"):
            values = [e[kept] for e in own]
            over = [e[kept] - seeds["scaled", e["seed"]][kept] for e in own if ("scaled", e["seed"]) in seeds]
            found[name][kept] = _spread(values)
            found[name][f"{kept} over scaled"] = _spread(over) if over else None
        if own[0]["lost"]:
            found[name]["lost"] = _spread([value for e in own for value in e["lost"].values()])
    return found


def _spread(values: Sequence[float]) -> list[float]:
    return [round(each, 4) for each in (statistics.mean(values), min(values), max(values))]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("demo", "smollm2"), default="demo")
    parser.add_argument("--smollm2", type=Path, default=ROOT / ".family")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "family")
    parser.add_argument("--work", type=Path, required=True, help="scores and replies are kept here")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME", help="variants; scaled always is one")
    parser.add_argument("--retain", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    setup = demo() if given.family == "demo" else smollm2(given.smollm2, given.shared)
    wanted = {name: each for name, each in variants().items() if not given.only or name in ("scaled", *given.only)}
    if given.retain:  # steps alone know nothing of retain sets
        wanted = {name: each for name, each in wanted.items() if not isinstance(each[0], Walk)}
    work = given.work / given.family
    work.mkdir(parents=True, exist_ok=True)
    identity = {
        "family": given.family,
        "retain": given.retain,
        "scored": setup.prompts_count,
        "held_out": setup.held_out,
        "tests": hashlib.sha256(json.dumps(setup.tests).encode()).hexdigest(),
        "refine": asdict(RefineSettings()),
    }
    entries: list[dict[str, Any]] = []
    if given.out is not None and given.out.exists():
        known = json.loads(given.out.read_text(encoding="utf-8"))
        if known.get("identity") != identity:
            parser.error(f"--out {given.out} is of {known.get('identity')}, not of {identity}: give another")
        entries = known["entries"]
    made = conditions(threads=torch.get_num_threads())
    for seed in given.seeds:
        have = {found["variant"] for found in entries if found["seed"] == seed}
        left = {name: each for name, each in wanted.items() if name not in have}
        for found in run_seed(setup, seed, work, left, retain=given.retain) if left else ():
            entries += [{**each, "conditions": made} for each in found]
            if given.out is not None:
                given.out.parent.mkdir(parents=True, exist_ok=True)
                text = {"question": QUESTION, "identity": identity, "summary": summary(entries), "entries": entries}
                write_file(given.out, json.dumps(text, indent=1) + "\n")
    print(json.dumps({"question": QUESTION, "identity": identity, "summary": summary(entries), "conditions": made}))


if __name__ == "__main__":
    main()
