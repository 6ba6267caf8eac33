"""From a base, its experts and their capabilities to Scores: the work behind ``wpmerge score``."""

import hashlib
import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from wpmerge.arch import COARSE_KINDS
from wpmerge.capability import Capability, load_capability
from wpmerge.errors import CapabilityError
from wpmerge.memory import Budget, budget, return_freed_memory
from wpmerge.models import Family, open_family, run_facts
from wpmerge.output import check_output, check_space, output_directory
from wpmerge.pieces import Pieces
from wpmerge.plan import input_model
from wpmerge.provenance import provenance
from wpmerge.readings import Case, Progress, ScoreSettings, capability_record, prepare_case
from wpmerge.recovery import Gap, measure_gap, score_readout
from wpmerge.reliability import choose
from wpmerge.scores import AskedReadout, ReadoutRecord, Scores

NAME = re.compile(r"(?!base$)[A-Za-z0-9][\w.-]*", re.ASCII)
"""Of experts and capabilities: "/" and "@" part the keys of arrays, pieces are files, and plans name the base so."""


def score(
    *,
    base: str,
    experts: Mapping[str, str],
    capabilities: Mapping[str, str],
    retain: Mapping[str, str] | None = None,
    out: Path,
    settings: ScoreSettings | None = None,
    device: str = "cpu",
    resident: bool = True,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Scores:
    """Score every unit of every expert and write the Scores artifact.

    Args:
        base: a directory or a hub id.
        experts: name → directory, hub id or LoRA adapter.
        capabilities: name → built-in name or JSONL file; one for each expert, under the expert's name.
        retain: name → as a capability, but without an expert: what a merge must not lose. Read by the log-probability
            of the base's own replies; scores are effects in nats per token.
        out: the directory to be made.
        settings: see :class:`ScoreSettings`.
        device: where to run, as torch names it.
        resident: keep weights in memory; otherwise read each layer from disk when it is run.
        overwrite: replace an output that is already there.
        trust_remote_code: see :func:`~wpmerge.checkpoint.open_checkpoint`.
        progress: told what is being done.

    Raises:
        WpmergeError: an input, capability, anchor or output cannot be used; nothing is written under ``out`` then.
    """
    started = time.monotonic()
    settings = settings or ScoreSettings()
    tell: Progress = progress or (lambda *_: None)
    retained = {name: load_capability(name, spec) for name, spec in (retain or {}).items()}
    own = {name: load_capability(name, spec) for name, spec in capabilities.items()}
    check_names(experts, own, retained)
    loaded = own | retained
    files = [path for spec in (*capabilities.values(), *(retain or {}).values()) if (path := Path(spec)).is_file()]
    check_output(out, inputs=files, overwrite=overwrite)
    tell("opening models", 0, 1)
    family = open_family(
        base, experts, device=device, resident=resident, vocab=settings.vocab, trust_remote_code=trust_remote_code
    )
    _check_kinds(family, settings)
    inputs = [family.base.path, *(expert.path for expert in family.experts.values()), *files]
    check_space(out, total=_bytes(family, loaded, settings))
    fingerprint = _fingerprint(family, loaded, settings, device=device)
    with output_directory(out, inputs=inputs, overwrite=overwrite, fingerprint=fingerprint) as staging:
        pieces = Pieces(staging / "pieces")
        # the first run's, so that another amount of free memory does not cut the work otherwise
        allowed = Budget(**pieces.record("budget", lambda: asdict(_budget(family, settings))))
        if family.resident and not allowed.resident:
            family = open_family(
                base, experts, device=device, resident=False, vocab=settings.vocab, trust_remote_code=trust_remote_code
            )
        arrays: dict[str, Tensor] = {}
        readouts: dict[str, ReadoutRecord] = {}
        # all gaps and anchors first: what is refused is refused before the long work
        cases = {
            name: prepare_case(family, capability, settings, pieces, tell, retain=name in retained)
            for name, capability in loaded.items()
        }
        if not family.resident:
            return_freed_memory()
        measured = list(_measured(family, cases, settings, allowed.held_bytes, pieces, tell))
        for gap in measured:
            readouts[gap.label], found = score_readout(family, gap, settings, allowed.held_bytes, pieces, tell)
            arrays |= found
        scores = Scores(
            base=input_model(family.base),
            experts={name: input_model(expert) for name, expert in family.experts.items()},
            model_type=str(family.layout.config["model_type"]),
            layers=family.layout.layers,
            counts={str(kind): count for kind, count in family.layout.counts.items()},
            labels={str(k): names for k in family.layout.counts if (names := family.layout.labels(k)) is not None},
            capabilities={name: capability_record(loaded[name], case) for name, case in cases.items()},
            readouts=readouts,
            arrays=arrays,
            provenance=provenance(settings, started, device=device),
        )
        scores.save(staging)
        pieces.remove()
    return scores


def _measured(
    family: Family,
    cases: Mapping[str, Case],
    settings: ScoreSettings,
    held_bytes: int,
    pieces: Pieces,
    tell: Progress,
) -> Iterator[Gap]:
    for name, case in cases.items():
        asked: tuple[AskedReadout, ...] = ("reference",) if case.retain else settings.readouts
        known = choose(family, case, settings, held_bytes, pieces, tell) if asked[0] == "auto" else []
        yield from known[:1]
        for place, readout in enumerate(asked):
            if readout == "auto" or (known and readout == known[0].name):
                continue
            tell(f"{name}: gap, {readout}", 0, 1)
            measured = next((gap for gap in known if gap.name == readout), None)
            yield measured or measure_gap(family, case, readout, settings, held_bytes, first=place == 0)


def _budget(family: Family, settings: ScoreSettings) -> Budget:
    return budget(
        family.layout,
        1 + len(family.experts),
        most=settings.max_memory,
        resident=family.resident,
        stored_bytes=family.stored_bytes,
        gradients="integrated" in settings.estimators,
        teacher=not {"divergence", "auto"}.isdisjoint(settings.readouts),
    )


def _check_kinds(family: Family, settings: ScoreSettings) -> None:
    """Refuse kinds of which the model has none, if nothing else was asked for."""
    if not any(kind in family.layout.counts or kind in COARSE_KINDS for kind in settings.kinds):
        raise CapabilityError(
            "the model has no unit of these kinds",
            where=family.base.path,
            got=", ".join(settings.kinds),
            expected=", ".join([*family.layout.counts, *COARSE_KINDS]),
        )


def _bytes(family: Family, capabilities: Mapping[str, Capability], settings: ScoreSettings) -> int:
    """What the arrays need on disk: float32 in the artifact, and the float32 pieces of an unfinished run beside it."""
    units = sum(
        math.prod(family.layout.shape(kind))
        for kind in settings.kinds
        if kind in family.layout.counts or kind in COARSE_KINDS
    )
    estimates = len(family.experts) + len(settings.estimators) * len(settings.directions)
    return 2 * 4 * units * len(capabilities) * len(settings.readouts) * estimates


def check_names(
    experts: Mapping[str, str], capabilities: Mapping[str, Capability], retained: Mapping[str, Capability]
) -> None:
    """Refuse names that cannot be keys, an expert without a capability, and a capability without an expert.

    Raises:
        CapabilityError: says which, and what to add.
    """
    for name in (*experts, *capabilities, *retained):
        if not NAME.fullmatch(name):
            raise CapabilityError(
                "this cannot be used as a name: names are parts of keys and of file names",
                got=repr(name),
                expected="letters, digits, '_', '.', '-', beginning with a letter or digit; not base",
            )
    for name in experts:
        if name not in capabilities:
            raise CapabilityError(
                f"expert {name} has no capability to be scored on",
                got=", ".join(capabilities) or "none",
                expected=f"one named {name}",
                mend=f"add --capability {name}=FILE.jsonl or a built-in name",
            )
    for name in capabilities:
        if name not in experts:
            raise CapabilityError(
                f"capability {name} has no expert to measure its gap to",
                got=", ".join(experts) or "none",
                mend=f"add --expert {name}=PATH, or give what has no expert with --retain",
            )
    for name in retained:
        if name in experts:
            raise CapabilityError(
                "a retain set has the name of an expert", got=name, mend="give it another name: it has no expert"
            )


def _fingerprint(
    family: Family, capabilities: Mapping[str, Capability], settings: ScoreSettings, *, device: str
) -> str:
    """What decides the result: pieces of a killed run are used again only if it is the same."""
    parts = {
        "base": family.base.content_hash(),
        "experts": {name: expert.content_hash() for name, expert in family.experts.items()},
        "capabilities": {name: capability.content_hash() for name, capability in capabilities.items()},
        # what tokenizer and chat template make of the prompts, and what no weight shows
        "tokens": [family.chat.prompt_tokens(prompt.prompt) for c in capabilities.values() for prompt in c.prompts],
        "run": run_facts(family, device=device),
        "settings": repr(settings),
        "version": version("wpmerge"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
