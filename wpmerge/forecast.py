"""What a run will take, before it is run: memory, disk and time, from configurations and measured costs.

Every figure below is from one core of a two-core Intel Xeon and stands in ``benchmarks/results``; docs/performance.md
says how they make an estimate and how far it was off where a whole run was measured. None was measured on a GPU.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wpmerge.arch import COARSE_KINDS, KINDS, Layout
from wpmerge.capability import Capability
from wpmerge.memory import HELD_BYTES, least_memory, least_merging_memory, resident_bytes, resident_weights
from wpmerge.models import layout_from
from wpmerge.options import byte_size
from wpmerge.reliability import CANDIDATES
from wpmerge.retaining import LEAST_EVALUATIONS
from wpmerge.run_recipe import EVALUATED, Judging, RunRecipe
from wpmerge.sources import Source, itemsize, parameters, shapes_of
from wpmerge.tuning import TOKENS_PER_ROW

HARDWARE = "one core of an Intel Xeon"
BILLION = 1e9

LINEAR = 7.488 / (0.1345 * 699)
"""Seconds per billion parameters and token of one linear run for one expert: scoring/cost.json, "experts", 1; the 699
packed tokens are those of scoring/speed.json."""
FURTHER_EXPERT = 1.9604 / 7.488
"""Of that, what each further expert adds: scoring/cost.json, "experts"."""
FORWARD = LINEAR * 699 / (0.70 * 3520)
"""The same of a forward run: scoring/speed.json, a linear run is .59 to .82 of a forward run of 3,520 padded tokens."""
EXACT = FORWARD * 3520 / 699 / 12
"""The same of one unit replaced for real: scoring/speed.json, 10.4 to 14.5 times less than such a forward run."""
OPENING = 77.0
"""Seconds per billion parameters and model for reading, converting, gaps and noise floor: what the above leave of
scoring/streaming.json's 243.8 s, for two models of 1.1 billion."""
MERGING = 4.9 / (4 * 1.03)
"""Seconds per billion parameters and model read: merge/quiet.json, one thread, a base and three experts."""
TOKEN = 665.1 / (3 * 89 * 128) / 0.1345
"""Seconds per billion parameters and token that a model writes, 16 replies at a time: evaluation/ifeval.json."""
LEAST_SECONDS = 60.0
"""Below a minute, what does not grow with the model decides, and none of the above says how much that is."""
CHARACTERS_PER_TOKEN = 4
GRID, CHECKS = 4, 5
"""Merges that ``refine`` runs on the held-out prompts before its steps and between them (docs/performance.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a stage takes.

    Attributes:
        memory: resident memory, bytes; with a GPU most of it is there. None: unknown.
        written: bytes under its name when it is done; None: unknown, or small.
        seconds: on :data:`HARDWARE`; None: unknown.
    """

    memory: int | None = None
    written: int | None = None
    seconds: float | None = None


REPORT = Needs(memory=500_000_000, written=4_000_000, seconds=20)
"""Of ``wpmerge report``: scores, not weights, are read; as seen on a model of 135 million parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What decides a run's cost.

    Attributes:
        recipe: what is asked for.
        layout: of the base.
        billions: parameters of the base.
        stored: bytes of a stored weight, the most of any model.
        nbytes: of the base's weights on disk.
        capabilities: with their prompts, retain sets among them.
    """

    recipe: RunRecipe
    layout: Layout
    billions: float
    stored: int
    nbytes: int
    capabilities: Mapping[str, Capability]

    @property
    def models(self) -> int:
        """Base and experts."""
        return 1 + len(self.recipe.experts)

    @property
    def each_expert(self) -> float:
        """What a linear run costs with all experts, in those of one."""
        return 1 + FURTHER_EXPERT * (len(self.recipe.experts) - 1)


def workload(
    recipe: RunRecipe, sources: Mapping[str, Source], capabilities: Mapping[str, Capability]
) -> Workload | None:
    """What the base's configuration makes of a recipe; None where that is not at hand.

    Args:
        recipe: what is asked for.
        sources: the base under "base", experts under their names.
        capabilities: by name, retain sets too.

    Raises:
        CheckpointError: an architecture that is not supported, or a configuration that makes no model.
    """
    base = sources["base"]
    if base.config is None:
        return None
    config: Mapping[str, Any] = base.config
    layout = layout_from(config, shapes_of(config), where=base.path)
    stored = max(itemsize(source.config) for source in sources.values() if source.config is not None)
    return Workload(
        recipe=recipe,
        layout=layout,
        billions=parameters(config) / BILLION,
        stored=stored,
        nbytes=base.nbytes or 0,
        capabilities=capabilities,
    )


def scoring_needs(work: Workload) -> Needs:
    """Of ``wpmerge score``."""
    recipe, settings = work.recipe, work.recipe.scoring
    units = _verified_units(work)
    seconds = OPENING * work.models
    for name, capability in work.capabilities.items():
        for readout in ["reference"] if name in recipe.retain else settings.readout:
            each = _tokens(capability, settings.reference_tokens, anchor=readout == "anchor")
            runs = 1 + ("integrated" in settings.estimator) * settings.integrated_points
            runs *= len(set(settings.direction) | {"sufficiency"})
            seconds += LINEAR * settings.prompts * each * runs * work.each_expert
            if readout == "auto":  # before: every candidate on both halves of the prompts, the own expert alone
                read = (_tokens(capability, settings.reference_tokens, anchor=one == "anchor") for one in CANDIDATES)
                seconds += LINEAR * settings.prompts * sum(read)
            seconds += EXACT * settings.verify_prompts * each * units
    arrays = sum(math.prod(work.layout.shape(kind)) for kind in KINDS if kind in work.layout.counts)
    estimates = len(recipe.experts) + len(settings.estimator) * len(settings.direction)
    limit = byte_size("scoring.max_memory", settings.max_memory) if settings.max_memory else None
    return Needs(
        memory=limit or _scoring_memory(work),
        written=4 * arrays * len(work.capabilities) * len(settings.readout) * estimates,
        seconds=max(LEAST_SECONDS, seconds * work.billions),
    )


def fusing_needs(work: Workload) -> Needs:
    """Of ``wpmerge fuse``: choosing coefficients, then writing."""
    rule, settings = work.recipe.rule, work.recipe.scoring
    looks = GRID + CHECKS if rule.name == "refine" else rule.evaluations
    if rule.scale is not None and not rule.calibrate and rule.name != "refine":
        looks = 1
    seconds = (OPENING + MERGING) * work.models
    again = 0  # merges run for retain sets, once the steps are taken
    if rule.name == "refine" and work.recipe.retain:
        again = max(LEAST_EVALUATIONS, rule.evaluations - looks)
    for name, capability in work.capabilities.items():
        each = _tokens(capability, settings.reference_tokens, anchor=False)
        retained = bool(again) and name in work.recipe.retain
        read = (settings.held_out + settings.prompts) * again if retained else settings.held_out * (looks + again)
        seconds += FORWARD * read * each
        if rule.name == "refine" and not retained:
            seconds += LINEAR * rule.steps * rule.batch * each * work.each_expert
    sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
    wanted = work.recipe.output.dtype
    written = work.nbytes if wanted is None else int(work.billions * BILLION) * sizes[wanted]
    limit = byte_size("rule.max_memory", rule.max_memory) if rule.max_memory else None
    return Needs(
        memory=limit or _fusing_memory(work),
        written=written,
        seconds=max(LEAST_SECONDS, seconds * work.billions),
    )


def judging_needs(work: Workload, judging: Judging) -> Needs:
    """Of ``wpmerge eval`` on base, experts and merge."""
    itemsizes = {"auto": work.stored, "float32": 4, "bfloat16": 2, "float16": 2}
    memory = resident_bytes() + int(work.billions * BILLION) * itemsizes[judging.dtype]
    documents = _documents(judging)
    seconds = None
    if documents is not None and judging.max_gen_tokens is not None:
        written = (work.models + 1) * documents * judging.max_gen_tokens
        seconds = max(LEAST_SECONDS, TOKEN * work.billions * written)
    return Needs(memory=memory, seconds=seconds)


def _scoring_memory(work: Workload) -> int:
    settings = work.recipe.scoring
    least = least_memory(
        work.layout,
        work.models,
        resident=not work.recipe.stream,
        stored_bytes=work.stored,
        gradients="integrated" in settings.estimator,
        teacher=not {"divergence", "auto"}.isdisjoint(settings.readout),
    )
    return resident_bytes() + least + min(HELD_BYTES, resident_weights(work.layout, 1))


def _fusing_memory(work: Workload) -> int:
    least = least_merging_memory(
        work.layout,
        len(work.recipe.experts),
        longest=TOKENS_PER_ROW,
        resident=not work.recipe.stream,
        stored_bytes=work.stored,
        gradients=work.recipe.rule.name == "refine",
    )
    return resident_bytes() + least + min(HELD_BYTES, resident_weights(work.layout, 1))


def _verified_units(work: Workload) -> int:
    """Units replaced for real per capability and readout."""
    settings = work.recipe.scoring
    kinds = [kind for kind in settings.kind or KINDS if kind in work.layout.counts or kind in COARSE_KINDS]
    most = settings.top_k + settings.random_sample
    return sum(min(most, math.prod(work.layout.shape(kind))) for kind in kinds)


def _tokens(capability: Capability, reference_tokens: int, *, anchor: bool) -> float:
    """Tokens that a readout reads of a prompt: by its length, and as many of a reply as there may be."""
    prompts = capability.prompts
    asked = sum(len(prompt.prompt) + (len(prompt.without or "") if anchor else 0) for prompt in prompts)
    each = asked / CHARACTERS_PER_TOKEN / len(prompts)
    if anchor:
        return each
    if not capability.has_references:
        return each + reference_tokens
    given = sum(len(prompt.reference or "") for prompt in prompts) / CHARACTERS_PER_TOKEN / len(prompts)
    return each + min(given, reference_tokens)


def _documents(judging: Judging) -> int | None:
    """Documents of all tasks, where they are known before anything is downloaded."""
    counts: list[int] = []
    for task in judging.tasks:
        files = judging.task_data.get(task)
        file = files.get(EVALUATED) if isinstance(files, dict) else files
        if file is not None and Path(file).is_file():
            lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
            found = sum(bool(line.strip()) for line in lines)
            counts.append(min(found, judging.limit or found))
        elif judging.limit is not None:
            counts.append(judging.limit)
        else:
            return None
    return sum(counts)


def longest(needs: Sequence[Needs]) -> Needs:
    """Of several stages one after the other: the most memory, and all bytes and seconds that are known."""
    memory = [each.memory for each in needs if each.memory is not None]
    return Needs(
        memory=max(memory, default=None),
        written=sum(each.written or 0 for each in needs),
        seconds=sum(each.seconds or 0 for each in needs) if any(each.seconds for each in needs) else None,
    )
