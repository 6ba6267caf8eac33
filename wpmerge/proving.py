"""Is a ranking of units right? Grafts and reverts of its strongest units, against matched random and trivial rankings.

The work behind ``wpmerge prove``; definitions in docs/method.md, section "What makes a ranking believed".

Shape suffixes: G units, n prompts, P points of a curve.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wpmerge.activation import PATCHED, activation_effects
from wpmerge.agreement import interval, resamples
from wpmerge.anchor import Anchor
from wpmerge.arch import Layout
from wpmerge.attribution import UnitArrays, empty_arrays
from wpmerge.calibration import HeldOutReading, check_better, read_held_out
from wpmerge.capability import Capability, load_capability
from wpmerge.coefficients import Grouping, group_scores, make_grouping, squared_norms, tensor_coefficients
from wpmerge.console import finite
from wpmerge.curves import (
    SHARES,
    area,
    chosen,
    matched,
    order_by,
    recovered,
    strata,
)
from wpmerge.errors import WpmergeError
from wpmerge.fusing import open_scored_family
from wpmerge.gradients import directional
from wpmerge.judges import TestPrompt, judge
from wpmerge.models import Family, end_tokens, generation_model
from wpmerge.output import output_directory, write_file
from wpmerge.patching import HELD_BYTES
from wpmerge.pieces import Pieces
from wpmerge.proof import SCHEMA_VERSION
from wpmerge.provenance import provenance
from wpmerge.rank_stability import Judged, measure_stability
from wpmerge.readings import Case, Progress, ScoreSettings, fit_case_anchor, make_reading, prepare_case
from wpmerge.readouts import LogProbReadout, measure
from wpmerge.replies import Decoding, read_and_reply
from wpmerge.roles import CARRIED, HIGH, count_roles, roles_of
from wpmerge.rows import pack
from wpmerge.scores import Scores, load_scores
from wpmerge.tuning import TOKENS_PER_ROW
from wpmerge.weights import MixedWeights, WeightSource

logger = logging.getLogger(__name__)

JUDGED_RANDOMS = 3
"""Random rankings whose generated replies are judged: replies cost more than readings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProveSettings:
    """What ``wpmerge prove`` may be told.

    Attributes:
        shares: of the moved parameters, at which curves are read; increasing, between 0 and 1.
        randoms: matched random rankings.
        prompts: held-out prompts that curves are read on, and as many scored ones that rivals rank by; None for all.
        draws: bootstrap draws.
        roles: find source, aggregation and execution units too.
        seed: of every draw.
    """

    shares: tuple[float, ...] = SHARES
    randoms: int = 10
    prompts: int | None = None
    draws: int = 1000
    roles: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        ordered = sorted({share for share in self.shares if 0 < share < 1})
        if not self.shares or list(self.shares) != ordered:
            raise WpmergeError("shares must increase, between 0 and 1", got=self.shares, mend="such as 0.01 0.05 0.2")


def graft(
    layout: Layout, grouping: Grouping, base: WeightSource, expert: WeightSource, units: Bool[Tensor, " G"]
) -> MixedWeights:
    """The base with a set of units from the expert, bit for bit: none is the base, all is the expert.

    Args:
        layout: names the tensors.
        grouping: of granularity "unit".
        base: θ_B.
        expert: θ_e.
        units: which.
    """
    taken = tensor_coefficients(layout, grouping, units.double())

    def mix(name: str, pair: tuple[Tensor, ...]) -> Tensor:
        own = taken[layout.stored[name]].expand(pair[0].shape).to(pair[0].device) > 0
        return torch.where(own, pair[1], pair[0])

    return MixedWeights(layout=layout, sources=(base, expert), mix=mix)


def prove(
    directory: Path,
    *,
    out: Path | None = None,
    capabilities: Sequence[str] = (),
    tests: Mapping[str, Sequence[TestPrompt]] | None = None,
    models: Mapping[str, str] | None = None,
    settings: ProveSettings | None = None,
    device: str = "cpu",
    resident: bool = True,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judge the rankings of a Scores directory and write ``proof.json``.

    Args:
        directory: the scores.
        out: the directory to be made; None takes the scores' name with ``-proof`` beside it.
        capabilities: which; none for all that have an expert.
        tests: capability → judged test prompts, on whose replies curves are read as well.
        models: name → where a model lives now.
        settings: see :class:`ProveSettings`.
        device: where to run.
        resident: keep weights in memory.
        overwrite: replace an output that is already there.
        trust_remote_code: see :func:`~wpmerge.checkpoint.open_checkpoint`.
        progress: told what is being done.

    Returns:
        What ``proof.json`` holds; docs/formats.md states it.

    Raises:
        WpmergeError: scores, a capability, a model or the output cannot be used; nothing is written then.
    """
    started, settings, tell = time.monotonic(), settings or ProveSettings(), progress or (lambda *_: None)
    scores = load_scores(directory)
    names = _asked(scores, capabilities, tests or {})
    out = out or directory.with_name(f"{directory.resolve().name}-proof")
    parts = [scores.base.content_hash, *(scores.experts[n].content_hash for n in names), repr(settings), repr(tests)]
    parts += [hashlib.sha256((directory / "scores.safetensors").read_bytes()).hexdigest(), device, version("wpmerge")]
    fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    with output_directory(out, inputs=[directory], overwrite=overwrite, fingerprint=fingerprint) as staging:
        pieces = Pieces(staging / "pieces")
        family = open_scored_family(
            scores, dict(models or {}), device=device, resident=resident, trust_remote_code=trust_remote_code
        )
        proofs = {
            name: _Proof(family, scores, name, settings, pieces.below(name), tell).run((tests or {}).get(name, ()))
            for name in names
        }
        record: dict[str, Any] = finite(
            {
                "kind": "proof",
                "schema_version": SCHEMA_VERSION,
                "scores": str(directory),
                "capabilities": proofs,
                "provenance": provenance(settings, started, device=device),
            }
        )
        write_file(staging / "proof.json", json.dumps(record, indent=1, allow_nan=False))
        pieces.remove()
    return {"out": str(out), **record}


def anchor_label(scores: Scores, name: str) -> str | None:
    """What a capability's anchor scores are called: its own name, where the anchor was the first or chosen readout."""
    labels = (name, f"{name}@anchor")
    return next(
        (each for each in labels if each in scores.readouts and scores.readouts[each].readout == "anchor"), None
    )


def _asked(scores: Scores, asked: Sequence[str], tests: Mapping[str, Any]) -> list[str]:
    known = [name for name, record in scores.capabilities.items() if not record.retain]
    for name in (*asked, *tests):
        if name not in known:
            raise WpmergeError("the scores have no such capability", got=name, expected=", ".join(known))
    return list(asked) or known


class _Proof:
    """One capability: its models, its rankings, what has been read."""

    def __init__(
        self, family: Family, scores: Scores, name: str, settings: ProveSettings, pieces: Pieces, tell: Progress
    ) -> None:
        self.family, self.scores, self.name, self.settings = family, scores, name, settings
        self.pieces, self.tell = pieces, tell
        self.layout, self.engine = family.layout, family.engine
        self.base, self.expert = family.weights[""], family.weights[name]
        self.grouping = make_grouping(self.layout, "unit")
        norms = squared_norms(self.layout, self.grouping, self.base, self.expert)
        self.norms, self.moved = norms, norms > 0
        self.capability = self._capability()
        self.case: Case | None = None
        if self.capability is not None:
            self.case = prepare_case(family, self.capability, self._options, pieces, tell)
        self._fitted: Anchor | None = None

    def run(self, tests: Sequence[TestPrompt]) -> dict[str, Any]:
        reading = self._reading()
        rankings = self.rankings()
        found: dict[str, Any] = {
            "units": int(self.moved.sum()),
            "parameters": int(self.grouping.sizes[self.moved].sum()),
            "shares": self.settings.shares,
            "prompts": len(reading.base_items),
            "base": reading.base,
            "expert": reading.expert,
            "readouts": {"reference": self._curves("reference", reading, rankings)},
            "stability": self._stability(reading, rankings["linear"]),
        }
        if (anchored := self._anchor_reading()) is not None and (anchor := self._anchor()) is not None:
            found["readouts"]["anchor"] = self._curves("anchor", anchored, rankings | self._stored(anchor[0]))
        if tests:
            found["readouts"]["judged"] = self._judged(tests, rankings)
        if self.settings.roles:
            found["roles"] = self._roles()
        return found

    def _capability(self) -> Capability | None:
        """The capability's prompts; None, with a word, where its source is not what it was."""
        record = self.scores.capabilities[self.name]
        without = "no anchor, no roles, no stability over wordings and seeds, and rivals rank by held-out prompts"
        try:
            capability = load_capability(self.name, record.source)
        except WpmergeError as error:
            logger.warning("%s: %s: its own cannot be read: %s", self.name, without, error)
            return None
        if capability.content_hash() != record.content_hash:
            logger.warning("%s: %s: its own have changed", self.name, without)
            return None
        return capability

    @property
    def _options(self) -> ScoreSettings:
        raw: dict[str, Any] = self.scores.provenance["settings"]
        given: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in raw.items()}
        return ScoreSettings(**given)

    def _reading(self) -> HeldOutReading:
        """The held-out prompts: no ranking has seen them."""
        record = self.scores.capabilities[self.name].held_out
        chosen = slice(self.settings.prompts)
        found = self._read([list(each) for each in record.sequences[chosen]], record.starts[chosen])
        mend = "score with more of them (--held-out)"
        check_better(found.expert, found.base, name=self.name, prompts="held-out prompts", mend=mend)
        return found

    def _read(self, sequences: list[list[int]], starts: Sequence[int]) -> HeldOutReading:
        readout = LogProbReadout(layer=self.layout.layers - 1, sequences=sequences, starts=list(starts))
        rows = pack(sequences, tokens_per_row=TOKENS_PER_ROW)
        return read_held_out(self.engine, self.base, self.expert, readout, rows)

    def _ranked_by(self) -> list[tuple[list[int], int]]:
        """Scored prompts with their references, which rivals rank by; held-out ones where those cannot be had."""
        count = self.settings.prompts
        if self.case is not None:
            return list(zip(self.case.sequences, self.case.starts, strict=True))[:count]
        held = self.scores.capabilities[self.name].held_out
        return [(list(each), start) for each, start in zip(held.sequences, held.starts, strict=True)][:count]

    def _stored(self, label: str) -> dict[str, Tensor]:
        """Every estimator and direction that the scores hold for a readout."""
        found = {}
        for key in self.scores.arrays:
            estimator, own, expert, _ = key.split("/")
            if (own, expert) == (label, self.name) and estimator not in found:
                arrays = empty_arrays(self.layout)
                for kind in arrays:
                    arrays[kind] = self.scores.arrays.get(f"{estimator}/{label}/{expert}/{kind}", arrays[kind])
                found[estimator] = self._flat(arrays)
        return found

    def _flat(self, arrays: UnitArrays) -> Float[Tensor, " G"]:
        return group_scores(self.layout, self.grouping, empty_arrays(self.layout) | arrays)

    def rankings(self) -> dict[str, Float[Tensor, " G"]]:
        """Name → a number per unit, the larger the sooner taken."""
        found = self._stored(self.name)
        if "linear" not in found:
            raise WpmergeError("the scores hold no recovery of finest units", where=self.name, mend="score again")
        self.tell(f"{self.name}: trivial rankings", 0, 1)
        made = self.pieces.tensors("rivals", self._rivals)
        depth = [0 if self.layout.is_outer(u) else u.layer + 1 for u in self._units()]
        by_depth = torch.tensor(depth, dtype=torch.float64) * self.grouping.sizes  # ranked per parameter: undo that
        return found | made | {"norm": self.norms, "depth": by_depth}

    def _units(self) -> list[Any]:
        return [unit for kind in self.layout.counts for unit in self.layout.units(kind)]

    def _rivals(self) -> dict[str, Tensor]:
        """|θ·∇L| at the base, and Δᵀ·Fisher·Δ of each unit's block, both on the scored prompts' references."""
        zero = MixedWeights(layout=self.layout, sources=(self.base,), mix=lambda _, own: torch.zeros_like(own[0]))
        magnitude, fisher = torch.zeros(()), torch.zeros(())
        for sequence, start in self._ranked_by():
            readout = LogProbReadout(layer=self.layout.layers - 1, sequences=[sequence], starts=[start])
            rows = pack([sequence])
            (own,) = directional(self.engine, self.base, zero, [self.base], rows, readout)
            (step,) = directional(self.engine, self.base, self.base, [self.expert], rows, readout)
            magnitude = magnitude + self._flat(own)
            fisher = fisher + self._flat(step).square()
        activation = self._activation()
        return {"magnitude": magnitude.abs(), "fisher": fisher} | ({} if activation is None else activation)

    def _activation(self) -> dict[str, Tensor] | None:
        pairs = self._ranked_by()
        sequences = [sequence for sequence, _ in pairs]
        readout = LogProbReadout(
            layer=self.layout.layers - 1, sequences=sequences, starts=[start for _, start in pairs]
        )
        rows = pack(sequences, tokens_per_row=TOKENS_PER_ROW)
        return {"activation": self._flat(activation_effects(self.engine, self.base, self.expert, rows, readout))}

    def _sets(self, values: Float[Tensor, " G"]) -> list[Bool[Tensor, " G"]]:
        return chosen(order_by(values, self.grouping.sizes, self.moved), self.grouping.sizes, self.settings.shares)

    def _randoms(self, values: Float[Tensor, " G"]) -> dict[str, Float[Tensor, " G"]]:
        alike = strata([(unit.kind, unit.layer) for unit in self._units()], self.norms)
        seeds = range(self.settings.seed, self.settings.seed + self.settings.randoms)
        return {f"random-{number}": matched(values, alike, seed=seed) for number, seed in enumerate(seeds)}

    def _curves(
        self, label: str, reading: HeldOutReading, rankings: Mapping[str, Float[Tensor, " G"]]
    ) -> dict[str, Any]:
        everything = {**rankings, **self._randoms(rankings["linear"])}
        items: dict[tuple[str, str], Any] = {}
        for number, (name, values) in enumerate(everything.items()):
            self.tell(f"{self.name}: curves, {label}", number, len(everything))

            def read(values: Float[Tensor, " G"] = values) -> dict[str, Tensor]:
                sets = self._sets(values)
                return {
                    "transplant": torch.stack([self._measure(units, reading) for units in sets]),
                    "revert": torch.stack([self._measure(self.moved & ~units, reading) for units in sets]),
                }

            kept = self.pieces.tensors(f"curve-{label}-{name}", read)
            for curve, found in kept.items():
                items[name, curve] = found.numpy()
        assert reading.expert_items is not None
        return summarise(
            items, reading.base_items.numpy(), reading.expert_items.numpy(), self.settings, rankings=list(rankings)
        )

    def _measure(self, units: Bool[Tensor, " G"], reading: HeldOutReading) -> Float[Tensor, " n"]:
        source = graft(self.layout, self.grouping, self.base, self.expert, units)
        return measure(self.engine, source, reading.rows, reading.readout).double().cpu()

    def _stability(self, reading: HeldOutReading, stored: Float[Tensor, " G"]) -> dict[str, Any]:
        """Over prompts, and where the capability's own can be read over wordings, seeds and neighbouring layers."""
        assert isinstance(reading.readout, LogProbReadout)
        judged = Judged(
            family=self.family,
            name=self.name,
            stored=stored,
            moved=self.moved,
            flat=self._flat,
            options=self._options,
            seed=self.settings.seed,
            pieces=self.pieces,
            tell=self.tell,
        )
        held, anchor = self._held_out(), self._anchor()
        sequences, starts = reading.readout.sequences, reading.readout.starts
        return measure_stability(
            judged, sequences, starts, capability=self.capability, held=held, anchor=anchor and anchor[1]
        )

    def _held_out(self) -> Case | None:
        """The held-out prompts as a case of their own."""
        if self.case is None or self.capability is None:
            return None
        options, kept = self._options, self.scores.capabilities[self.name].held_out
        _, held = self.capability.split(scoring=options.prompts, held_out=options.held_out, seed=options.seed)
        sequences = [list(each) for each in kept.sequences]
        return replace(self.case, scored=held, sequences=sequences, starts=list(kept.starts))

    def _anchor(self) -> tuple[str, Anchor] | None:
        """The label of the anchor's scores, and the anchor, fitted on the scored prompts as it was."""
        if self.case is None or (label := anchor_label(self.scores, self.name)) is None:
            return None
        if self._fitted is None:
            options = replace(self._options, layer=self.scores.readouts[label].l_star, accept_anchor=True)
            self._fitted = fit_case_anchor(self.family, self.case, options, HELD_BYTES)
        return label, self._fitted

    def _anchor_reading(self) -> HeldOutReading | None:
        """The anchor, read on the held-out prompts."""
        anchor, held = self._anchor(), self._held_out()
        if anchor is None or held is None:
            return None
        count = min(self.settings.prompts or len(held.starts), len(held.starts))
        made = make_reading(self.family, held, anchor[1], self._options, count=count)
        return read_held_out(self.engine, self.base, self.expert, made.readout, made.rows)

    def _judged(self, tests: Sequence[TestPrompt], rankings: Mapping[str, Float[Tensor, " G"]]) -> dict[str, Any]:
        """Transplant and revert read by judged replies: the first ranking, and a few of its random ones."""
        chat = self.family.chat
        ends = frozenset(end_tokens(self.family, self.name))
        decoding = Decoding(longest=self._options.reference_tokens, ends=ends, pad=min(ends, default=0))
        heads = [chat.prompt_tokens(item.prompt) for item in tests]

        def passed(source: WeightSource) -> Tensor:
            model = generation_model(self.engine, source)
            replies = read_and_reply(model, heads, [()] * len(heads), decoding)
            texts = [chat.tokenizer.decode(reply.tokens, skip_special_tokens=True) for reply in replies]
            return torch.tensor([float(judge(i, t)) for i, t in zip(tests, texts, strict=True)], dtype=torch.float64)

        ends_of = self.pieces.tensors("judged-ends", lambda: {"b": passed(self.base), "e": passed(self.expert)})
        if float(ends_of["e"].mean()) <= float(ends_of["b"].mean()):
            raise WpmergeError("the expert's replies are judged no better than the base's", where=self.name)
        some = dict(list(self._randoms(rankings["linear"]).items())[:JUDGED_RANDOMS])
        items: dict[tuple[str, str], Any] = {}
        for name, values in {"linear": rankings["linear"], **some}.items():
            self.tell(f"{self.name}: judged replies", len(items), 2 * (1 + len(some)))
            for curve in ("transplant", "revert"):
                sets = [units if curve == "transplant" else self.moved & ~units for units in self._sets(values)]

                def read(sets: Sequence[Tensor] = sets) -> dict[str, Tensor]:
                    grafts = [graft(self.layout, self.grouping, self.base, self.expert, units) for units in sets]
                    return {"items": torch.stack([passed(each) for each in grafts])}

                items[name, curve] = self.pieces.tensors(f"judged-{name}-{curve}", read)["items"].numpy()
        return summarise(items, ends_of["b"].numpy(), ends_of["e"].numpy(), self.settings, rankings=["linear"])

    def _roles(self) -> dict[str, Any] | None:
        """Roles on the scored prompts; None where there is no anchor."""
        found_anchor = self._anchor()
        if found_anchor is None or self.case is None:
            return None
        label, anchor = found_anchor
        record = self.scores.readouts[label]
        assert record.gap is not None
        self.tell(f"{self.name}: roles", 0, 1)
        options = self._options
        count = min(self.settings.prompts or len(self.case.starts), len(self.case.starts))
        anchored = make_reading(self.family, self.case, anchor, options, count=count)
        said = make_reading(self.family, self.case, None, options, count=count, name="divergence")
        by_anchor = activation_effects(self.engine, self.base, self.expert, anchored.rows, anchored.readout)
        by_output = activation_effects(self.engine, self.base, self.expert, said.rows, said.readout)
        counts = []
        for kind in PATCHED:
            weights = self.scores.array(label, self.name, kind).double()
            effect = by_anchor[kind] / record.gap
            found = roles_of(weights, effect, by_output[kind], layer=record.l_star)
            by = {"source": weights, "aggregation": effect, "execution": by_output[kind]}
            counts += [asdict(each) for each in count_roles(kind, found, by)]  # type: ignore[arg-type]
        return {"l_star": record.l_star, "prompts": count, "high": HIGH, "carried": CARRIED, "units": counts}


def summarise(
    items: Mapping[tuple[str, str], Float[np.ndarray, "P n"]],
    base: Float[np.ndarray, " n"],
    expert: Float[np.ndarray, " n"],
    settings: ProveSettings,
    *,
    rankings: Sequence[str],
) -> dict[str, Any]:
    """Curves, areas with bootstrap intervals over prompts, and how ``linear`` stands to the rest.

    Args:
        items: (ranking, "transplant" or "revert") → each prompt's number at each share.
        base: each prompt's number for the base.
        expert: for the expert.
        settings: shares, and the bootstrap's draws.
        rankings: those that are no random ones.
    """
    weights = resamples(len(base), settings.draws, seed=settings.seed)
    ends = {"transplant": (0.0, 1.0), "revert": (1.0, 0.0)}

    def areas(key: tuple[str, str], w: Float[np.ndarray, "B n"] | None) -> Float[np.ndarray, "B two"]:
        curve: Callable[[Any], list[float]] = lambda row: list(_pair(settings.shares, row, ends[key[1]]))  # noqa: E731
        return np.array([curve(row) for row in recovered(items[key], base, expert, w)])

    draws = {key: areas(key, weights) for key in items}
    whole = {key: areas(key, None)[0] for key in items}
    made: dict[str, Any] = {"n": len(base)}
    for curve in ends:
        randoms = [name for name, each in items if each == curve and name not in rankings]
        sign = 1.0 if curve == "transplant" else -1.0
        table = {}
        for name in rankings:
            low, high = interval(draws[name, curve][:, 0])
            gain = sign * (draws["linear", curve][:, 0] - draws[name, curve][:, 0])
            table[name] = {
                "recovered": recovered(items[name, curve], base, expert)[0].tolist(),
                "cpr": float(whole[name, curve][0]),
                "cpr_interval": [low, high],
                "cmd": float(whole[name, curve][1]),
                "linear_ahead": sign * float(whole["linear", curve][0] - whole[name, curve][0]) + 0.0,  # no −0
                "linear_ahead_interval": list(interval(gain)),
            }
        made[curve] = {"rankings": table, "random": _random_record(items, base, expert, randoms, curve, whole, sign)}
    return made


def _pair(shares: Sequence[float], row: Sequence[float], ends: tuple[float, float]) -> tuple[float, float]:
    found = area(shares, list(row), ends=ends)
    return found.cpr, found.cmd


def _random_record(
    items: Mapping[tuple[str, str], Any],
    base: Any,
    expert: Any,
    randoms: Sequence[str],
    curve: str,
    whole: Mapping[tuple[str, str], Any],
    sign: float,
) -> dict[str, Any] | None:
    if not randoms:
        return None
    cprs = [float(whole[name, curve][0]) for name in randoms]
    beaten = sum(sign * whole["linear", curve][0] > sign * each for each in cprs)
    curves = np.array([recovered(items[name, curve], base, expert)[0] for name in randoms])
    return {
        "count": len(randoms),
        "recovered": curves.mean(axis=0).tolist(),
        "recovered_range": [curves.min(axis=0).tolist(), curves.max(axis=0).tolist()],
        "cpr": float(np.mean(cprs)),
        "cpr_range": [min(cprs), max(cprs)],
        "beaten": int(beaten),
    }
