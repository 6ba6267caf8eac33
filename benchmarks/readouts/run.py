"""Which readout gives a stable ranking of units, for each of IFEval's 25 instruction types?

    python -m benchmarks.readouts.run --base .family/base --expert .family/format [--out FILE] [--types title …]

For each built-in instruction and each readout the units of the expert are scored (linear; heads and neurons) on
disjoint groups of prompts. From 8, 16 and 32 prompts: the rank correlation of the unit scores of two disjoint halves
and the overlap of their strongest 5%, means over splits, on the units that every readout of the type reads. Readouts:
the reference log-probability (of the expert's own replies), the divergence, the contrast anchor at the prompt's last
token, and the same anchor at the reply's tokens (both at the anchor's layer; each half fits its own direction). Also:
the anchor's numbers at its layer, each gap's t, and how far one half's scores foretell the reference on the other half.
Types already in FILE are not run again. The last line is JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.reporting import conditions
from wpmerge import builtin
from wpmerge.agreement import overlap, spearman
from wpmerge.anchor import Anchor, token_states
from wpmerge.arch import Kind
from wpmerge.attribution import linear
from wpmerge.capability import load_capability
from wpmerge.models import Family, open_family
from wpmerge.patching import HELD_BYTES
from wpmerge.pieces import Pieces
from wpmerge.readings import Case, Reading, ScoreSettings, fit_case_anchor, make_reading, prepare_case, some_of
from wpmerge.readouts import AnchorReadout, measure
from wpmerge.rows import pack
from wpmerge.scores import ReadoutName

KINDS: tuple[Kind, ...] = ("head", "neuron")
GROUP = 4
SIZES = (8, 16, 32)
TRAINED = ("capital_letters", "highlighted_sections", "multiple_sections", "no_comma", "quotation", "title")
"""What the SmolLM2 format expert was trained on."""
SPLITS = 10
"""Splits into halves that are averaged, where there are more."""
READOUTS = ("reference", "divergence", "anchor", "anchor at reply")
LESS = 16
"""Prompts of the divergence and of the anchor at the reply's tokens, at most: they cost most."""
REPLY = 16
"""Tokens of the reply at which that anchor is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One readout's unit scores: (first prompt, prompts) → effects of heads and neurons."""

    groups: Mapping[tuple[int, int], Tensor]

    def half(self, numbers: Sequence[int]) -> Tensor | None:
        """Mean effects on some prompts, from one group or from the smallest ones; None if those are not there."""
        span = (numbers[0], len(numbers))
        if span in self.groups and list(numbers) == list(range(numbers[0], numbers[0] + len(numbers))):
            return self.groups[span]
        parts = [self.groups.get((start, GROUP)) for start in numbers[::GROUP]]
        known = [part for part in parts if part is not None]
        return torch.stack(known).mean(dim=0) if len(known) == len(parts) else None


def effects(family: Family, expert: str, reading: Reading) -> Tensor:
    """Linear effects of the expert's heads and neurons."""
    base, other = family.weights[""], family.weights[expert]
    (arrays,) = linear(family.engine, base, [other], reading.rows, reading.readout, kinds=KINDS)
    return torch.cat([array.flatten() for array in arrays.values()]).cpu()


def behavioural(family: Family, case: Case, name: ReadoutName, options: ScoreSettings, count: int) -> Scored:
    """Reference or divergence: effects add up over prompts, so groups of four are all it takes."""
    found = {}
    for start in range(0, count, GROUP):
        part = some_of(case, range(start, start + GROUP))
        reading = make_reading(family, part, None, options, count=GROUP, name=name)
        found[start, GROUP] = effects(family, case.own, reading)
    return Scored(groups=found)


def spans(count: int) -> list[tuple[int, int]]:
    """Halves of 8, 16, … prompts up to ``count``, as (first, prompts); each needs a direction of its own."""
    found = []
    for size in SIZES:
        if size <= count:
            starts = range(0, size, size // 2)
            found += [(start, size // 2) for start in starts]
    return found


def anchored(family: Family, case: Case, anchor: Anchor, count: int, *, reply: int) -> Scored:
    """The contrast anchor at its layer, direction fitted and read on the same few prompts.

    Args:
        family: the models.
        case: the prompts.
        anchor: its layer is used.
        count: prompts.
        reply: tokens of the reply that are read; 0 reads the prompt's last token.
    """
    found = {}
    for start, size in spans(count):
        part = some_of(case, range(start, start + size))
        sequences, starts = pair_sequences(family, part, reply)
        rows = pack(sequences)
        states = token_states(family.engine, family.weights[case.own], rows, len(sequences), starts=starts)
        states = states[:, anchor.layer]
        direction = torch.nn.functional.normalize((states[0::2] - states[1::2]).mean(dim=0), dim=0).float()
        found[start, size] = effects(
            family, case.own, Reading(readout=anchor_at(anchor, direction, size, starts), rows=rows)
        )
    return Scored(groups=found)


def pair_sequences(family: Family, case: Case, reply: int) -> tuple[list[list[int]], list[int]]:
    """x⁺ and x⁻ in turn, each with the beginning of the same reply; and the first token that is read of each."""
    sequences, starts = [], []
    for prompt, sequence, start in zip(case.scored.prompts, case.sequences, case.starts, strict=True):
        tail = sequence[start:][:reply]
        for text in (prompt.prompt, str(prompt.without)):
            head = family.chat.prompt_tokens(text)
            sequences.append(head + tail)
            starts.append(len(head) if tail else len(head) - 1)
    return sequences, starts


def anchor_at(anchor: Anchor, direction: Tensor, items: int, starts: Sequence[int]) -> AnchorReadout:
    """The readout of pairs, along a direction, from given tokens on."""
    return AnchorReadout(
        layer=anchor.layer,
        direction=direction,
        item=[number // 2 for number in range(2 * items)],
        sign=[1.0, -1.0] * items,
        items=items,
        starts=list(starts),
    )


def splits(size: int) -> list[tuple[list[int], list[int]]]:
    """Ways to halve the first ``size`` prompts by groups of four: first against second half first, then others."""
    groups = [list(range(start, start + GROUP)) for start in range(0, size, GROUP)]
    half = len(groups) // 2
    found = []
    for chosen in combinations(range(len(groups)), half):
        if 0 in chosen:
            other = [number for number in range(len(groups)) if number not in chosen]
            found.append(tuple([n for g in side for n in groups[g]] for side in (chosen, other)))
    return [(list(one), list(two)) for one, two in found[:SPLITS]]


def agreements(scored: Mapping[str, Scored], common: Tensor) -> dict[str, Any]:
    """Per readout and number of prompts: rank correlation of halves and overlap of the top, means over splits."""
    table: dict[str, Any] = {}
    for name, each in scored.items():
        for size in SIZES:
            found = []
            for one, other in splits(size):
                first, second = each.half(one), each.half(other)
                if first is not None and second is not None:
                    found.append((spearman(first[common], second[common]), overlap(first[common], second[common])))
            if found:
                halves, tops = np.mean(found, axis=0)
                table.setdefault(name, {})[str(size)] = {
                    "halves": float(halves),
                    "overlap": float(tops),
                    "splits": len(found),
                }
    return table


def behaviour(scored: Mapping[str, Scored], common: Tensor) -> dict[str, Any]:
    """How far half of a readout's prompts foretell the reference on the other half, from 16 and from 32 prompts."""
    table: dict[str, Any] = {}
    for name, each in scored.items():
        for size in (16, 32):
            one, other = list(range(size // 2)), list(range(size // 2, size))
            mine = [each.half(numbers) for numbers in (one, other)]
            its = [scored["reference"].half(numbers) for numbers in (other, one)]
            pairs = [(a, b) for a, b in zip(mine, its, strict=True) if a is not None and b is not None]
            if len(pairs) == 2:
                table.setdefault(name, {})[str(size)] = float(
                    np.mean([spearman(a[common], b[common]) for a, b in pairs])
                )
    return table


def gap(family: Family, case: Case, reading: Reading) -> dict[str, float]:
    """Expert minus base, and its t over items."""
    ends = [
        measure(family.engine, family.weights[name], reading.rows, reading.readout).double() for name in (case.own, "")
    ]
    change = ends[0] - ends[1]
    t = float(change.mean() / (change.std() / len(change) ** 0.5).clamp_min(1e-12))
    return {"gap": float(change.mean()), "t": t}


def one_type(family: Family, name: str, options: ScoreSettings, readouts: Sequence[str], work: Path) -> dict[str, Any]:
    """One instruction type: every readout, every number of prompts up to those to score on."""
    started = time.process_time()
    capability = replace(load_capability("format", name), name="format")
    case = prepare_case(family, capability, options, Pieces(work), lambda *_: None)
    anchor = fit_case_anchor(family, case, options, HELD_BYTES)
    point = anchor.curve[anchor.layer]
    count, less = options.prompts, min(LESS, options.prompts)
    makers: dict[str, Callable[[], Scored]] = {
        "reference": lambda: behavioural(family, case, "reference", options, count),
        "divergence": lambda: behavioural(family, case, "divergence", options, less),
        "anchor": lambda: anchored(family, case, anchor, count, reply=0),
        "anchor at reply": lambda: anchored(family, case, anchor, less, reply=REPLY),
    }
    scored = {each: makers[each]() for each in readouts}
    everything = torch.stack([part for each in scored.values() for part in each.groups.values()])
    common = ~everything.isnan().any(dim=0) & (everything != 0).any(dim=0)
    said = make_reading(family, case, None, options, count=count)
    sequences, starts = pair_sequences(family, case, 0)
    last = Reading(readout=anchor_at(anchor, anchor.direction, count, starts), rows=pack(sequences))
    return {
        "type": name,
        "trained": name in TRAINED,
        "prompts": count,
        "units": int(common.sum()),
        "anchor": {
            "layer": anchor.layer,
            "reliable": anchor.reliable,
            "cosine": point.cosine,
            "t": point.t,
            "carried": point.carried,
        },
        "gap": {"reference": gap(family, case, said), "anchor": gap(family, case, last)},
        "stability": agreements(scored, common),
        "behaviour": behaviour(scored, common),
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=".family/base")
    parser.add_argument("--expert", default=".family/format")
    parser.add_argument("--types", nargs="+", default=builtin.instructions(), choices=builtin.instructions())
    parser.add_argument("--tokens", type=int, default=24, help="longest reply")
    parser.add_argument("--prompts", type=int, default=max(SIZES), choices=SIZES)
    parser.add_argument("--readouts", nargs="+", default=READOUTS, choices=READOUTS, help="reference among them")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("readouts.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    options = ScoreSettings(prompts=args.prompts, held_out=4, reference_tokens=args.tokens, accept_anchor=True)
    family = open_family(args.base, {"format": args.expert}, device=args.device)
    done = json.loads(args.out.read_text())["types"] if args.out.exists() else []
    for name in args.types:
        if name in {each["type"] for each in done}:
            continue
        with TemporaryDirectory() as work:
            done.append(one_type(family, name, options, args.readouts, Path(work)))
        print(json.dumps(done[-1]), file=sys.stderr, flush=True)
        result = {"benchmark": "readouts", "types": done, "tokens": args.tokens}
        line = json.dumps(
            result | conditions(threads=args.threads, cpu_seconds=round(sum(e["cpu_seconds"] for e in done)))
        )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(line + "\n")
    print(args.out.read_text().strip())


if __name__ == "__main__":
    main()
