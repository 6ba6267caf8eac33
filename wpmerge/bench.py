"""Merging strategies on one family, each tuned alike, on fresh test prompts: the work behind ``wpmerge bench``.

Every strategy may run the same number of merges on the same tuning prompts, read by the share of the experts' replies
that is kept, and has the same utility to maximise (``refine`` runs 10, and more with retain sets; the number is kept).
Only its winner meets the test prompts: it reads the experts' own replies to them, and replies itself, greedily.
Finished pieces are lines of ``results.jsonl``; a rerun does what is missing.
"""

import fcntl
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wpmerge.bench_controls import same_norm, shuffled
from wpmerge.bench_mergekit import MergekitInMemory
from wpmerge.bench_results import BASE_MODEL, EXPERT_MODEL, Key, Record, ResultFile
from wpmerge.bench_setup import (
    BenchSettings,
    check_names,
    check_subsets,
    check_tests,
    read_tests,
    strategy_names,
    text_hash,
    tuning_pool,
    tuning_readings,
)
from wpmerge.bench_table import Cell, Measure, finalists, make_cell
from wpmerge.bench_testing import Tester
from wpmerge.calibration import HeldOutReading, retention, search_numbers, utility
from wpmerge.capability import Capability, load_capability
from wpmerge.console import finite
from wpmerge.directory import read_json
from wpmerge.errors import CheckpointError, EvaluationError, OutputError
from wpmerge.fusing import open_scored_family
from wpmerge.judges import TestPrompt, hash_of_tests, load_prompts
from wpmerge.models import Family
from wpmerge.output import room_is_said, write_file
from wpmerge.pieces import Pieces
from wpmerge.plan import BASE, Plan, input_model, load_plan
from wpmerge.provenance import machine, provenance, versions
from wpmerge.readings import Progress
from wpmerge.rules import RuleOutcome, coefficients_for
from wpmerge.scores import Scores, load_scores, without_retain_sets
from wpmerge.strategies import ALWAYS, OURS, RIVALS
from wpmerge.tuning import held_out_readings, reference_limit, scored_readings
from wpmerge.weights import StateWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """What a benchmark found.

    Attributes:
        out: holds results.jsonl, bench.json, the replies and the plans of our rules.
        cells: one per subset and measure.
        provenance: settings, versions, machine, times.
    """

    out: Path
    cells: tuple[Cell, ...]
    provenance: Mapping[str, Any]


def bench(
    scores_dir: Path,
    out: Path,
    *,
    tests: Mapping[str, Path],
    prompts: Mapping[str, Path] | None = None,
    retain: Path | None = None,
    settings: BenchSettings | None = None,
    models: Mapping[str, str] | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> BenchResult:
    """Run every strategy that is not in ``out`` yet, and make the tables.

    Args:
        scores_dir: what ``wpmerge score`` wrote: the models, and prompts to tune on.
        out: a directory for results; one of the same benchmark is continued.
        tests: skill → JSONL, see :func:`~wpmerge.judges.load_tests`.
        prompts: skill → JSONL of more prompts to tune on.
        retain: JSONL of prompts outside every skill, on which a merge should be what the base is.
        settings: see :class:`BenchSettings`.
        models: where inputs live now, by name, "base" for the base; the places in the scores otherwise.
        device: where models run.
        trust_remote_code: see :func:`~wpmerge.checkpoint.open_checkpoint`.
        progress: told what is being done.

    Raises:
        WpmergeError: something cannot be used, or ``out`` holds another benchmark. Finished pieces are never lost.
    """
    settings = settings or BenchSettings()
    strategies = strategy_names(settings.strategies)
    scores = load_scores(scores_dir)
    check_names(list(scores.experts), tests=tests, prompts=prompts or {})
    subsets = check_subsets(settings.subsets, list(scores.experts))
    if not any(record.retain for record in scores.capabilities.values()):
        strategies = tuple(name for name in strategies if not _bound(name))
    items = read_tests(tests, [name for name in scores.experts if any(name in subset for subset in subsets)])
    outside = load_prompts(retain) if retain else ()
    more = {name: load_capability(name, str(path)) for name, path in (prompts or {}).items()}
    check_tests(items, outside, scores, more, settings)
    started = time.monotonic()
    family = open_scored_family(
        scores, dict(models or {}), device=device, resident=True, trust_remote_code=trust_remote_code
    )
    identity = _identity(scores, items, more, outside, settings)
    with _workplace(out, identity):
        run = _Run(family, scores, items, outside, more, settings, out, progress or (lambda *_: None))
        run.everything(subsets, strategies)
        cells = _all_cells(run.results.records, subsets, strategies, settings)
        made = provenance(asdict(settings), started, identity=identity, device=device)
        summary = {"cells": [asdict(cell) for cell in cells], "provenance": made}
        write_file(out / "bench.json", json.dumps(finite(summary), indent=1))
    return BenchResult(out=out, cells=cells, provenance=made)


class _Run:
    """The state of a benchmark that is being run: models, prompts, and what is finished."""

    def __init__(
        self,
        family: Family,
        scores: Scores,
        items: Mapping[str, tuple[TestPrompt, ...]],
        outside: tuple[str, ...],
        prompts: Mapping[str, Capability],
        settings: BenchSettings,
        out: Path,
        tell: Progress,
    ) -> None:
        self.family, self.scores, self.settings, self.out, self.tell = family, scores, settings, out, tell
        self.results = ResultFile(out / "results.jsonl")
        self.pieces = pieces = Pieces(out / "replies")
        self.tester = Tester(family, items, outside, settings, pieces)
        limit = reference_limit(scores)
        self.pools = {name: tuning_pool(family, scores, name, prompts.get(name), pieces, limit=limit) for name in items}
        experts = {name: family.weights[name] for name in items}
        self._scored: Mapping[str, HeldOutReading] | None = None
        self._kept: Mapping[str, HeldOutReading] | None = None
        self.merger = MergekitInMemory(family.layout, family.weights[""], experts)

    def everything(self, subsets: Sequence[tuple[str, ...]], strategies: Sequence[str]) -> None:
        """All strategies on the first seed, then the next: an interrupted run leaves whole tables behind."""
        only = self.settings.only_seeds
        for seed in [seed for seed in self.settings.seeds if not only or seed in only]:
            work = [
                (subset, name)
                for subset in subsets
                for name in self._those_left(subset, strategies, seed)
                if _applies(name, subset)
            ]
            self._read_models(seed)
            readings = tuning_readings(self.family, self.pools, self.settings, seed)
            for done, (subset, name) in enumerate(work):
                if self.results.find(subset, name, seed) is None:
                    self.tell(f"seed {seed}, {'+'.join(subset)}: {name}", done, len(work))
                    own = {skill: readings[skill] for skill in subset}
                    self.results.append(self._strategy(subset, name, seed, own))

    def _those_left(self, subset: tuple[str, ...], strategies: Sequence[str], seed: int) -> Sequence[str]:
        """The strategies to run: on a later seed, where only the best go on, those of all that the first seed has seen.

        Raises:
            EvaluationError: the first seed has not seen one that is asked for.
        """
        first, count = self.settings.seeds[0], self.settings.finalists
        if count is None or seed == first:
            return strategies
        tuned = {
            name: record.tuned for (of, name, at), record in self.results.records.items() if (of, at) == (subset, first)
        }
        if unknown := [name for name in strategies if name not in tuned and _applies(name, subset)]:
            raise EvaluationError(
                f"whether a strategy goes on to seed {seed} is decided by seed {first}, which it has not run on",
                got=f"{unknown[0]}, {'+'.join(subset)}",
                mend=f"run seed {first} first",
            )
        went_on = finalists(tuned, rivals=list(RIVALS), always=ALWAYS, count=count)
        return [name for name in strategies if name in went_on]

    def _read_models(self, seed: int) -> None:
        """What base and experts do on a seed's test prompts, and the replies that merges are read on."""
        for skill in self.pools:
            if self.results.find((skill,), EXPERT_MODEL, seed) is None:
                self.tell(f"seed {seed}: expert {skill}", 0, 1)
                began = time.monotonic()
                found = self.tester.test(self.family.weights[skill], seed, [skill])
                seconds = {"test": time.monotonic() - began}
                self.results.append(self._record((skill,), EXPERT_MODEL, seed, skills=found, seconds=seconds))
        if self.results.find((), BASE_MODEL, seed) is None:
            self.tell(f"seed {seed}: base", 0, 1)
            began = time.monotonic()
            found = self.tester.test(self.family.weights[""], seed, list(self.pools))
            kept = self.tester.retain(self.family.weights[""], seed)
            seconds = {"test": time.monotonic() - began}
            self.results.append(self._record((), BASE_MODEL, seed, skills=found, retain=kept, seconds=seconds))

    def _strategy(
        self, subset: tuple[str, ...], name: str, seed: int, readings: Mapping[str, HeldOutReading]
    ) -> Record:
        began = time.monotonic()
        if name in RIVALS:
            merged, decided = self._rival(subset, name, seed, readings)
        else:
            merged, decided = self._ours(subset, name, seed, readings)
        tuned = time.monotonic()
        merged = _as_stored(self.family, merged)
        skills = self.tester.test(merged, seed, subset)
        kept = self.tester.retain(merged, seed)
        seconds = {"tune": tuned - began, "test": time.monotonic() - tuned}
        return self._record(subset, name, seed, skills=skills, retain=kept, seconds=seconds, **decided)

    def _record(self, subset: tuple[str, ...], strategy: str, seed: int, **found: Any) -> Record:
        made_by = {**versions("mergekit"), "machine": machine(), "threads": str(torch.get_num_threads())}
        if self.settings.label:
            made_by["label"] = self.settings.label
        return Record(subset=subset, strategy=strategy, seed=seed, made_by=made_by, **found)

    def _rival(
        self, subset: tuple[str, ...], name: str, seed: int, readings: Mapping[str, HeldOutReading]
    ) -> tuple[StateWeights, dict[str, Any]]:
        rival = RIVALS[name]

        def merged(point: dict[str, float]) -> StateWeights:
            return self.merger.merge(rival.method, subset, rival.numbers(subset, point), seed=seed)

        evaluations = 0

        def evaluate(point: dict[str, float]) -> dict[str, float]:
            nonlocal evaluations
            evaluations += 1
            return retention(self.family.engine, merged(point), readings)

        space = rival.space(subset)
        point, kept = search_numbers(
            space.start, space.tunables, evaluate, utility, evaluations=self.settings.evaluations
        )
        decided = {"parameters": point, "tuned": kept, "evaluations": evaluations}
        return merged(point), decided

    def _ours(
        self, subset: tuple[str, ...], name: str, seed: int, readings: Mapping[str, HeldOutReading]
    ) -> tuple[StateWeights, dict[str, Any]]:
        """A rule of ours, or a control beside one: that takes the rule's coefficients from its plan."""
        rule, _, control = name.partition("/")
        place = self.out / "plans" / f"{'+'.join(subset)}-{rule.replace(':', '-')}-{seed}"
        if not control:
            ours = OURS[rule]
            outcome = coefficients_for(
                replace(ours.settings, evaluations=self.settings.evaluations, seed=seed),
                self.family,
                self.scores if ours.retain else without_retain_sets(self.scores),
                experts=subset,
                held_out=lambda: {**readings, **(self._retain_sets() if ours.retain else {})},
                prompts=lambda: self._scored_prompts(subset, retain=ours.retain),
            )
            self._plan(subset, rule, outcome).save(place)
            assert outcome.standing is not None, "no scale is given, so there were held-out prompts"
            parameters = {name: value for name, value in outcome.record.items() if name != "evaluations"}
            decided = {
                "parameters": parameters,
                "tuned": dict(outcome.standing.kept),
                "evaluations": outcome.evaluations,
            }
            return self.merger.with_coefficients(outcome.coefficients), decided
        coefficients = load_plan(place).coefficients
        layout = self.family.layout
        if control == "shuffled":
            coefficients = shuffled(layout, coefficients, seed=seed)
        else:
            coefficients = same_norm(layout, coefficients, self.merger.deltas)
        merged = self.merger.with_coefficients(coefficients)
        return merged, {"tuned": retention(self.family.engine, merged, readings), "evaluations": 1}

    def _retain_sets(self) -> Mapping[str, HeldOutReading]:
        """The held-out prompts of the scores' retain sets: a constraint of our rules."""
        if self._kept is None:
            self._kept = held_out_readings(self.family, self.scores, [])
        return self._kept

    def _scored_prompts(self, subset: Sequence[str], *, retain: bool) -> dict[str, HeldOutReading]:
        """What ``refine`` takes steps on: the prompts that scores were taken on, those of retain sets if asked for."""
        if self._scored is None:
            self._scored = scored_readings(self.family, self.scores, list(self.pools), pieces=self.pieces)
        return {
            name: reading for name, reading in self._scored.items() if name in subset or (retain and reading.retain)
        }

    def _plan(self, subset: tuple[str, ...], rule: str, outcome: RuleOutcome) -> Plan:
        return Plan(
            base=input_model(self.family.base),
            experts={name: input_model(self.family.experts[name]) for name in subset},
            coefficients=outcome.coefficients,
            rule=rule,
            granularity=outcome.grouping.granularity,
            provenance=outcome.record,
        )


def _applies(strategy: str, subset: Sequence[str]) -> bool:
    largest = RIVALS[strategy].largest if strategy in RIVALS else None
    return largest is None or len(subset) <= largest


def _bound(strategy: str) -> bool:
    """Whether it is a rule that the scores' retain sets bind, or a control of one."""
    rule = OURS.get(strategy.partition("/")[0])
    return rule is not None and rule.retain


def _as_stored(family: Family, merged: StateWeights) -> StateWeights:
    """Weights rounded once to the dtype the base is stored in, as a merged checkpoint's would be."""
    tensors = {}
    for name, tensor in merged.tensors.items():
        dtype = family.base.tensors[family.layout.stored[name]].dtype.torch
        tensors[name] = tensor.to(dtype).to(tensor.dtype)
    return StateWeights(layout=family.layout, tensors=tensors)


def _identity(
    scores: Scores,
    items: Mapping[str, tuple[TestPrompt, ...]],
    prompts: Mapping[str, Capability],
    outside: tuple[str, ...],
    settings: BenchSettings,
) -> dict[str, Any]:
    """Everything that results in one directory must have in common."""
    held = {name: text_hash(record.held_out.model_dump()) for name, record in scores.capabilities.items()}
    arrays = {key: float(value.nan_to_num().double().sum()) for key, value in sorted(scores.arrays.items())}
    same = ("seeds", "evaluations", "tune", "tests", "longest", "generate")
    return {
        "models": {BASE: scores.base.content_hash, **{n: e.content_hash for n, e in scores.experts.items()}},
        "scores": text_hash(arrays),
        "held out": held,
        "tests": {name: hash_of_tests(each)[:16] for name, each in items.items()},
        "prompts": {name: text_hash([asdict(each) for each in more.prompts]) for name, more in prompts.items()},
        "retain": text_hash(outside),
        "settings": {name: json.loads(json.dumps(getattr(settings, name))) for name in same},
        "tuned by": "share of the expert's replies that is kept",
    }


@contextmanager
def _workplace(out: Path, identity: Mapping[str, Any]) -> Iterator[None]:
    """The directory of this benchmark, and nobody else in it.

    Raises:
        OutputError: it cannot be made, holds something else or another benchmark, or another run is at work there.
    """
    stated = out / "identity.json"
    try:
        foreign = out.exists() and (
            not out.is_dir() or bool({each.name for each in out.iterdir()} - {"lock"} and not stated.exists())
        )
        if foreign:
            raise OutputError("the output is not a directory of wpmerge bench", where=out, mend="choose another path")
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / "lock").open("w")
    except OSError as error:
        raise OutputError("the output cannot be written", where=out, got=error.strerror) from None
    with lock, room_is_said(out):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError("another run is writing this output", where=out) from None
        if not stated.exists():
            write_file(stated, json.dumps(identity, indent=1))
        found = _stated(stated)
        # a run of some of the experts has tests of these alone, which must be among those that are there
        whole = {**identity, "tests": {**found.get("tests", {}), **identity["tests"]}}
        if different := [name for name in whole if found.get(name) != whole[name]]:
            name = different[0]
            raise OutputError(
                f"the output holds a benchmark with other {name}",
                where=out,
                got=json.dumps(found.get(name))[:200],
                expected=json.dumps(whole[name])[:200],
                mend="repeat what that one was asked, or choose another path",
            )
        yield


def _stated(identity: Path) -> dict[str, Any]:
    """What a directory of results says that it was made from."""
    try:
        return read_json(identity)
    except CheckpointError as error:
        raise OutputError(
            "what the results in this output were made from cannot be read",
            where=identity,
            got=error.what if error.got is None else error.got,
            mend="choose another path",
        ) from None


def _all_cells(
    records: Mapping[Key, Record],
    subsets: Sequence[tuple[str, ...]],
    strategies: Sequence[str],
    settings: BenchSettings,
) -> tuple[Cell, ...]:
    """The tables of all seeds; before them those of the first alone, where not every strategy went on."""
    whole = _cells_of(records, subsets, strategies, settings, seeds=settings.seeds)
    if settings.finalists is None or len(settings.seeds) == 1:
        return whole
    return (*_cells_of(records, subsets, strategies, settings, seeds=settings.seeds[:1]), *whole)


def _cells_of(
    records: Mapping[Key, Record],
    subsets: Sequence[tuple[str, ...]],
    strategies: Sequence[str],
    settings: BenchSettings,
    *,
    seeds: Sequence[int],
) -> tuple[Cell, ...]:
    """The tables of some seeds: each subset by generated replies, then by log-probability.

    Args:
        records: finished work.
        subsets: the experts of each table.
        strategies: those to show; only those that have finished every one of ``seeds`` are.
        settings: whether replies were generated.
        seeds: those that the table is made of.
    """
    measures: tuple[Measure, ...] = ("generated", "logprob") if settings.generate else ("logprob",)
    found = []
    for subset in subsets:
        done = [name for name in strategies if all((subset, name, seed) in records for seed in seeds)]
        for measure in measures:
            found.append(make_cell(records, subset, done, rivals=list(RIVALS), measure=measure, seeds=seeds))
    return tuple(cell for cell in found if cell is not None)
