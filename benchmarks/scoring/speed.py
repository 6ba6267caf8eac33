"""How fast are the linear estimator and exact patching, against plain forwards and naive swap-and-rerun?

    python benchmarks/scoring/speed.py FAMILY [--out FILE]

FAMILY holds base/ and format/, ordinary checkpoints (the SmolLM2 family); the prompts are 32 contrast pairs from
the built-in capabilities. Both sides of each ratio run in the same round, in turn; the last line is JSON with every
ratio's median and range over rounds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.reporting import conditions
from wpmerge.arch import Unit
from wpmerge.attribution import linear
from wpmerge.capability import load_capability
from wpmerge.models import Family, generation_model, open_family
from wpmerge.patching import exact
from wpmerge.readouts import AnchorReadout
from wpmerge.rows import pack

PAIRS = 32
LAYER_STEP = 3


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def contrast_pairs(family: Family) -> list[list[int]]:
    """Tokens of 32 prompts with their instruction and without, in turn."""
    prompts = load_capability("all", "capital_letters+no_comma+title+quotation").prompts[:PAIRS]
    texts = [text for prompt in prompts for text in (prompt.prompt, prompt.without or "")]
    return [family.chat.prompt_tokens(text) for text in texts]


def anchor_at(layer: int, width: int, pairs: int = PAIRS) -> AnchorReadout:
    """A readout at a layer; its direction does not matter for time."""
    direction = torch.randn(width, generator=torch.Generator().manual_seed(0))
    numbers = range(2 * pairs)
    return AnchorReadout(
        layer=layer,
        direction=direction / direction.norm(),
        item=[n // 2 for n in numbers],
        sign=[1.0 if n % 2 == 0 else -1.0 for n in numbers],
        items=pairs,
    )


def padded(sequences: list[list[int]]) -> dict[str, torch.Tensor]:
    """The same prompts as one left-padded batch, as one would hand them to transformers."""
    width = max(map(len, sequences))
    ids = torch.tensor([[0] * (width - len(s)) + s for s in sequences])
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences])
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def naive(family: Family, model: Any, batch: dict[str, torch.Tensor], unit: Unit) -> None:
    """Swap a unit's weights in transformers' model, run it, and swap them back."""
    parameters = dict(model.named_parameters())
    source = family.weights["format"].layer(unit.layer)
    prefix = family.layout.layer_prefix(unit.layer)
    kept = []
    for piece in family.layout.slices(unit):
        target = parameters[piece.tensor].narrow(piece.axis or 0, piece.start, piece.stop - piece.start)
        kept.append((target, target.clone()))
        patch = source[piece.tensor.removeprefix(prefix)]
        target.copy_(patch.narrow(piece.axis or 0, piece.start, piece.stop - piece.start))
    model(**batch)
    for target, before in kept:
        target.copy_(before)


def measure(family: Family, rounds: int) -> dict[str, Any]:
    """All ratios, round by round."""
    sequences = contrast_pairs(family)
    rows, batch = pack(sequences), padded(sequences)
    base, expert = family.weights[""], family.weights["format"]
    for index in range(family.layout.layers):  # read both models before any clock runs
        base.layer(index), expert.layer(index)
    # a copy of the weights, since the naive way writes into them
    model = generation_model(family.engine, base)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    layers = family.layout.layers
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, layer in (("0.7 of the depth", round(0.7 * layers) - 1), ("last layer", layers - 1)):
            readout = anchor_at(layer, family.layout.hidden)
            heads = [u for u in family.layout.units("head") if u.layer <= layer and u.layer % LAYER_STEP == 1]
            with torch.no_grad():
                plain = seconds(lambda: model(**batch))
            lin = seconds(lambda r=readout: linear(family.engine, base, [expert], rows, r, kinds=("head", "neuron")))  # type: ignore[misc]
            ours = seconds(lambda r=readout, h=heads: exact(family.engine, base, expert, rows, r, h)) / len(heads)  # type: ignore[misc]
            theirs = seconds(lambda h=heads: naive(family, model, batch, h[len(h) // 2]))  # type: ignore[misc]
            found.setdefault(f"linear / plain forward, {name}", []).append(lin / plain)
            found.setdefault(f"naive / exact per head, {name}", []).append(theirs / ours)
            print(f"{name}: plain {plain:.2f} s, linear {lin:.2f} s, naive {theirs:.2f} s, exact {ours:.3f} s a head")
    return {
        name: {"median": round(statistics.median(v), 3), "least": round(min(v), 3), "most": round(max(v), 3)}
        for name, v in found.items()
    } | {"tokens": {"padded": batch["input_ids"].numel(), "packed": sum(r.tokens.shape[1] for r in rows)}}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    family = open_family(str(args.family / "base"), {"format": str(args.family / "format")})
    result = {"benchmark": "scoring/speed", **measure(family, args.rounds), **conditions(threads=args.threads)}
    line = json.dumps(result)
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
