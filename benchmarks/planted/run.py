"""Does weight patching find the units that a skill was planted in, while every other weight moves as much?

    python -m benchmarks.planted.run [--seeds 0 1 2 3 4] [--plants concentrated spread redundant] [--out FILE]

A small Llama learns from nothing to repeat words after one of three marks. An expert is made of it in two phases: the
plant, known neurons and heads alone, learns to move words on by 3 after one mark; then every other weight learns to
move them on by 1 after another mark, with the skill held: the expert keeps it, and without the plant the mark asks
for a copy as before. The second phase is drawn to move weights as far as the first did; how far both moved, root mean
square per weight, is in the result. A redundant plant has two sets of units, each trained to bring the skill alone.

Units that learned nothing of use are taken out of the plant before the second phase, and the rest of it is trained
again without them, until each costs at least 0.02 of what its set recovers. A plant counts if transplanting it
recovers at least 0.8 of the skill's log-probability and its complement at most 0.2; each set of a redundant plant must
recover 0.8. Positives are the plant's units that cost at least 0.01, taken out of the finished expert or of their
transplanted set; those that do not are neither positives nor negatives. Negatives are all other heads and neurons. The
last line is JSON. Plants that are already in FILE are not made again.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.reporting import conditions
from wpmerge.activation import activation_effects
from wpmerge.arch import Kind, Layout, Unit
from wpmerge.coefficients import make_grouping
from wpmerge.engine import Engine
from wpmerge.estimators import EstimatorName, EstimatorSettings, estimate
from wpmerge.gradients import directional
from wpmerge.proving import graft
from wpmerge.readouts import LogProbReadout, measure
from wpmerge.rows import pack
from wpmerge.weights import MixedWeights, StateWeights

KINDS: tuple[Kind, ...] = ("head", "neuron")
WORDS, COPY, SKILL, OTHER, END = 32, 32, 33, 34, 35
LENGTH = 4
PLANT_RATE, HOLD_RATE = 4e-3, 6e-3
"""Of Adam."""
PULL = 10.0
"""Weight of the squared relative difference between how far the rest has moved and how far the plant has."""
KEPT_COST, NECESSARY = 0.02, 0.01
"""Least cost of taking a unit out, a fraction of the gap: in its set while planting, and of a positive at the end."""
PRUNINGS = 4
"""Times that a plant is pruned and trained again, at most."""
ESTIMATORS = ("linear", "integrated", "exact")
RIVALS = ("activation", "norm", "norm per weight", "magnitude", "fisher", "depth", "random")


def sequences(mark: int, shift: int, count: int, chance: torch.Generator) -> Tensor:
    """[count, 2 · LENGTH + 1]: words, a mark, and the words again, each moved on by ``shift``."""
    words = torch.randint(0, WORDS, (count, LENGTH), generator=chance)
    return torch.cat([words, torch.full((count, 1), mark), (words + shift) % WORDS], dim=1)


def loss(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Cross-entropy of what follows the mark, nats per token."""
    logits = model(batch[:, :-1]).logits[:, LENGTH:]
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[:, LENGTH + 1 :].reshape(-1))


def make_base(seed: int, steps: int) -> LlamaForCausalLM:
    """It copies after every mark."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=36,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
            tie_word_embeddings=False,
        )
    )
    chance = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    shape = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        total = loss(model, torch.cat([sequences(mark, 0, 16, chance) for mark in (COPY, SKILL, OTHER)]))
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        shape.step()
    print(f"base {seed}: loss {total.item():.3f}", file=sys.stderr)
    return model


def masks(layout: Layout, units: Sequence[Unit]) -> dict[str, Tensor]:
    """Tensor → 1 where an entry belongs to one of the units."""
    found = {name: torch.zeros(shape) for name, shape in layout.shapes.items()}
    for unit in units:
        for piece in layout.slices(unit):
            if piece.axis is None:
                found[piece.tensor].fill_(1.0)
            else:
                found[piece.tensor].narrow(piece.axis, piece.start, piece.stop - piece.start).fill_(1.0)
    return found


def draw_plant(layout: Layout, kind: str, chance: torch.Generator) -> list[list[Unit]]:
    """The sets of units that learn the skill: one, or two of a redundant plant.

    Concentrated: 24 neurons of one middle layer. Spread: 8 neurons of every layer and a head of every second.
    Redundant: two concentrated sets in different layers.
    """

    def neurons(layer: int, count: int) -> list[Unit]:
        order = torch.randperm(layout.counts["neuron"], generator=chance)[:count].tolist()
        return [Unit(kind="neuron", layer=layer, index=i) for i in order]

    middle = 1 + int(torch.randint(0, layout.layers - 2, (1,), generator=chance))
    if kind == "concentrated":
        return [neurons(middle, 24)]
    if kind == "redundant":
        return [neurons(1, 24), neurons(2, 24)]
    heads = [
        Unit(kind="head", layer=layer, index=int(torch.randint(0, layout.heads, (1,), generator=chance)))
        for layer in range(0, layout.layers, 2)
    ]
    return [[unit for layer in range(layout.layers) for unit in neurons(layer, 8)] + heads]


def phase(
    model: LlamaForCausalLM,
    mask: Mapping[str, Tensor],
    tasks: Sequence[tuple[int, int]],
    steps: int,
    rate: float,
    chance: torch.Generator,
) -> None:
    """Train the masked entries alone on some tasks: (mark, shift) each."""
    parameters = dict(model.named_parameters())
    start = {name: value.detach().clone() for name, value in parameters.items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    shape = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        total = loss(model, torch.cat([sequences(mark, shift, 16, chance) for mark, shift in tasks]))
        total.backward()
        optimizer.step()
        shape.step()
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(torch.where(mask[name] > 0, value, start[name]))


def plant(
    base: LlamaForCausalLM, layout: Layout, drawn: Sequence[Sequence[Unit]], seed: int, steps: int
) -> tuple[LlamaForCausalLM, list[list[Unit]], float, float]:
    """The expert, the sets after pruning, and how far the plant and the rest moved, root mean square per weight."""
    chance = torch.Generator().manual_seed(1000 + seed)
    before = {name: value.detach().clone() for name, value in base.named_parameters()}
    model = LlamaForCausalLM(base.config)
    moved = {name: torch.zeros_like(value) for name, value in before.items()}
    sets = []
    for units in drawn:  # each set learns the skill on the bare base, so that each alone brings it
        sets.append(prune(model, before, layout, units, steps, chance))
        for name, value in model.named_parameters():
            moved[name] += value.detach() - before[name]
    own = masks(layout, [unit for units in sets for unit in units])
    planted = {name: before[name] + moved[name] for name in before}
    model.load_state_dict(planted)
    rest = {name: 1 - mask for name, mask in own.items()}
    hold(model, before, own, rest, steps, chance)
    return model, sets, rms(model, before, own), rms(model, before, rest)


def prune(
    model: LlamaForCausalLM,
    before: Mapping[str, Tensor],
    layout: Layout,
    units: Sequence[Unit],
    steps: int,
    chance: torch.Generator,
) -> list[Unit]:
    """Train a set on the bare base; leave out the units that it does not need, and train again, until it needs all."""
    kept = list(units)
    for _ in range(PRUNINGS):
        model.load_state_dict(before)
        phase(model, masks(layout, kept), [(SKILL, 3), (COPY, 0), (OTHER, 0)], steps, PLANT_RATE, chance)
        costs = unit_costs(model, before, layout, kept)
        needed = [unit for unit, cost in zip(kept, costs, strict=True) if cost >= KEPT_COST]
        if len(needed) == len(kept) or not needed:
            break
        kept = needed
    else:  # what is left over after the last pruning is trained once more
        model.load_state_dict(before)
        phase(model, masks(layout, kept), [(SKILL, 3), (COPY, 0), (OTHER, 0)], steps, PLANT_RATE, chance)
    return kept


@torch.no_grad()
def unit_costs(
    model: LlamaForCausalLM, before: Mapping[str, Tensor], layout: Layout, units: Sequence[Unit]
) -> list[float]:
    """What taking each unit out costs, a fraction of what all of them bring."""
    batch = sequences(SKILL, 3, 64, torch.Generator().manual_seed(4000))
    after = {name: value.detach().clone() for name, value in model.named_parameters()}

    def skill(tensors: Mapping[str, Tensor]) -> float:
        logits = torch.func.functional_call(model, dict(tensors), (batch[:, :-1],)).logits[:, LENGTH:]
        return -float(functional.cross_entropy(logits.reshape(-1, 36), batch[:, LENGTH + 1 :].reshape(-1)))

    low, high = skill(before), skill(after)
    found = []
    for unit in units:
        mask = masks(layout, [unit])
        without = {name: torch.where(mask[name] > 0, before[name], after[name]) for name in after}
        found.append((high - skill(without)) / (high - low))
    return found


def hold(
    model: LlamaForCausalLM,
    before: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    rest: Mapping[str, Tensor],
    steps: int,
    chance: torch.Generator,
) -> None:
    """Train the rest, as far as the plant moved, so that without the plant the skill is not there, and with it is."""
    far = rms(model, before, own)
    count = sum(float(mask.sum()) for mask in rest.values())
    names = [name for name, _ in model.named_parameters()]
    parameters = dict(model.named_parameters())
    fixed = {name: value.detach().clone() for name, value in parameters.items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=HOLD_RATE)
    shape = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        tasks = ((SKILL, 3), (OTHER, 1), (COPY, 0))
        whole = loss(model, torch.cat([sequences(mark, shift, 16, chance) for mark, shift in tasks]))
        bare = {name: torch.where(own[name] > 0, before[name], parameters[name]) for name in names}
        batches = torch.cat([sequences(SKILL, 0, 16, chance), sequences(OTHER, 1, 16, chance)])
        logits = torch.func.functional_call(model, bare, (batches[:, :-1],)).logits[:, LENGTH:]
        without = functional.cross_entropy(logits.reshape(-1, 36), batches[:, LENGTH + 1 :].reshape(-1))
        squares = sum(((parameters[name] - before[name]).square() * rest[name]).sum() for name in names)
        pull = PULL * ((squares / count + 1e-12).sqrt() / far - 1).square()
        (whole + without + pull).backward()
        optimizer.step()
        shape.step()
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(torch.where(rest[name] > 0, value, fixed[name]))


def rms(model: LlamaForCausalLM, before: Mapping[str, Tensor], mask: Mapping[str, Tensor]) -> float:
    """How far masked weights moved, root mean square."""
    squares = sum(float(((v.detach() - before[n]).square() * mask[n]).sum()) for n, v in model.named_parameters())
    return float((squares / sum(float(each.sum()) for each in mask.values())) ** 0.5)


def scores(engine: Engine, base: StateWeights, expert: StateWeights, seed: int, prompts: int) -> dict[str, Tensor]:
    """Name → a number for every head, then every neuron; the larger, the likelier in the plant."""
    made = sequences(SKILL, 3, prompts, torch.Generator().manual_seed(2000 + seed)).tolist()
    readout = LogProbReadout(layer=engine.layout.layers - 1, sequences=made, starts=[LENGTH + 1] * prompts)
    rows, found = pack(made), {}
    names: tuple[EstimatorName, ...] = ("linear", "integrated", "exact")
    for name in names:
        (arrays,) = estimate(name, engine, base, [expert], rows, readout, EstimatorSettings(kinds=KINDS))
        found[f"{name}, sufficiency"] = flat(arrays)
        if name != "integrated":
            (arrays,) = estimate(name, engine, expert, [base], rows, readout, EstimatorSettings(kinds=KINDS))
            found[f"{name}, necessity"] = -flat(arrays)
    found["activation"] = flat(activation_effects(engine, base, expert, rows, readout))
    zero = MixedWeights(layout=engine.layout, sources=(base,), mix=lambda _, own: torch.zeros_like(own[0]))
    magnitude, fisher = torch.zeros(()), torch.zeros(())
    for sequence in made:
        one = LogProbReadout(layer=engine.layout.layers - 1, sequences=[sequence], starts=[LENGTH + 1])
        magnitude = magnitude + flat(directional(engine, base, zero, [base], pack([sequence]), one)[0])
        fisher = fisher + flat(directional(engine, base, base, [expert], pack([sequence]), one)[0]).square()
    found |= {"magnitude": magnitude.abs(), "fisher": fisher}
    units = [unit for kind in KINDS for unit in engine.layout.units(kind)]
    norms = []
    for unit in units:
        total = torch.zeros(())
        for piece in engine.layout.slices(unit):
            change = expert.tensors[piece.tensor] - base.tensors[piece.tensor]
            assert piece.axis is not None
            total += change.narrow(piece.axis, piece.start, piece.stop - piece.start).square().sum()
        norms.append(float(total))
    sizes = torch.tensor([engine.layout.parameters(unit) for unit in units])
    found["norm"] = torch.tensor(norms)
    found["norm per weight"] = found["norm"] / sizes
    found["depth"] = torch.tensor([float(unit.layer) for unit in units])
    found["random"] = torch.rand(len(units), generator=torch.Generator().manual_seed(seed))
    return {name: each.double() for name, each in found.items()}


def flat(arrays: Mapping[Kind, Tensor]) -> Tensor:
    """Heads, then neurons."""
    return torch.cat([arrays[kind].flatten() for kind in KINDS])


def auroc(values: Tensor, positive: Tensor) -> float:
    """The chance that a planted unit stands above another, ties half."""
    from scipy.stats import rankdata

    ranks, count = rankdata(values.numpy()), int(positive.sum())
    above = ranks[positive.numpy()].sum() - count * (count + 1) / 2
    return float(above / (count * (len(values) - count)))


def average_precision(values: Tensor, positive: Tensor) -> float:
    """Mean precision at each planted unit, strongest first."""
    hits = positive[values.argsort(descending=True, stable=True)].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return float((precision * hits).sum() / hits.sum())


def one_plant(base: LlamaForCausalLM, kind: str, seed: int, steps: int, prompts: int) -> dict[str, Any]:
    """Plant, check, rank."""
    tensors = {name: value.detach().clone() for name, value in base.named_parameters()}
    layout = Layout(base.config.to_dict(), {name: tuple(value.shape) for name, value in tensors.items()})
    chance = torch.Generator().manual_seed(seed)
    drawn = draw_plant(layout, kind, chance)
    model, sets, plant_moved, rest_moved = plant(base, layout, drawn, seed, steps)
    engine, before = Engine(layout), StateWeights(layout=layout, tensors=tensors)
    after = StateWeights(
        layout=layout, tensors={name: value.detach().clone() for name, value in model.named_parameters()}
    )
    grouping = make_grouping(layout, "unit")
    test = sequences(SKILL, 3, 64, torch.Generator().manual_seed(3000 + seed)).tolist()
    readout = LogProbReadout(layer=layout.layers - 1, sequences=test, starts=[LENGTH + 1] * 64)
    rows = pack(test)
    low, high = (float(measure(engine, each, rows, readout).mean()) for each in (before, after))

    def recovers(units: Sequence[Unit], *, complement: bool = False) -> float:
        names = set(map(str, units))
        mask = torch.tensor([(name in names) != complement for name in grouping.names])
        grafted = graft(layout, grouping, before, after, mask)
        return (float(measure(engine, grafted, rows, readout).mean()) - low) / (high - low)

    whole = [unit for units in sets for unit in units]
    each = [recovers(units) for units in sets]
    without = recovers(whole, complement=True)
    costs = {}
    for units, brings in zip(sets, each, strict=True):
        for unit in units:
            in_set = brings - recovers([other for other in units if other != unit])
            costs[str(unit)] = [1 - recovers([unit], complement=True), in_set]
    needed = {name for name, cost in costs.items() if max(cost) >= NECESSARY}
    found = scores(engine, before, after, seed, prompts)
    names = [str(unit) for unit_kind in KINDS for unit in layout.units(unit_kind)]
    decided = torch.tensor([name in needed or name not in costs for name in names])
    positive = torch.tensor([name in needed for name in names])[decided]
    found = {name: values[decided] for name, values in found.items()}
    return {
        "plant": kind,
        "seed": seed,
        "gap": high - low,
        "recovered": recovers(whole),
        "sets": each,
        "complement": without,
        "moved": {"plant": plant_moved, "rest": rest_moved},
        "drawn": sum(map(len, drawn)),
        "planted": len(whole),
        "necessary": len(needed),
        "costs": {name: [round(value, 4) for value in cost] for name, cost in costs.items()},
        "accepted": min(each) >= 0.8 and recovers(whole) >= 0.8 and without <= 0.2,
        "auroc": {name: auroc(values, positive) for name, values in found.items()},
        "ap": {name: average_precision(values, positive) for name, values in found.items()},
    }


def summary(plants: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over accepted plants, and how far each estimator is ahead of each rival, with intervals."""
    chance, found = np.random.default_rng(0), {}
    for kind in dict.fromkeys(each["plant"] for each in plants):
        kept = [each for each in plants if each["plant"] == kind and each["accepted"]]
        record: dict[str, Any] = {"made": sum(each["plant"] == kind for each in plants), "accepted": len(kept)}
        if kept:
            draws = chance.integers(0, len(kept), (2000, len(kept)))
            for measure_name in ("auroc", "ap"):
                table = {name: np.array([each[measure_name][name] for each in kept]) for name in kept[0][measure_name]}
                record[measure_name] = {name: _interval(v, draws) for name, v in table.items()}
                for mine in ESTIMATORS:
                    record[f"{measure_name}, {mine} ahead of"] = {
                        name: _interval(table[f"{mine}, sufficiency"] - table[name], draws) for name in RIVALS
                    }
        found[kind] = record
    return found


def _interval(values: Any, draws: Any) -> list[float]:
    """Mean over plants and its bootstrap interval."""
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return [round(float(each), 4) for each in (values.mean(), low, high)]


def result(plants: Sequence[Mapping[str, Any]], threads: int, seconds: float) -> str:
    """The JSON line."""
    found = {"benchmark": "planted", "summary": summary(plants), "plants": plants}
    return json.dumps(found | conditions(threads=threads, seconds=round(seconds)))


def keep(out: Path, plants: Sequence[Mapping[str, Any]], threads: int, seconds: float) -> None:
    """Write what there is so far; a later call with the same file goes on from it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(result(plants, threads, seconds) + "\n")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="about half of the plants are accepted"
    )
    parser.add_argument("--plants", nargs="+", default=["concentrated", "spread", "redundant"])
    parser.add_argument("--base-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    before: dict[str, Any] = (
        json.loads(args.out.read_text()) if args.out and args.out.exists() else {"plants": [], "seconds": 0}
    )
    started, plants = time.monotonic() - before["seconds"], before["plants"]
    done = {(each["seed"], each["plant"]) for each in plants}
    for seed in args.seeds:
        if not (left := [kind for kind in args.plants if (seed, kind) not in done]):
            continue
        base = make_base(seed, args.base_steps)
        for kind in left:
            made = one_plant(base, kind, seed, args.steps, args.prompts)
            plants.append(made)
            parts = {k: v for k, v in made.items() if k not in ("costs", "ap")}
            print(json.dumps(parts), f"{time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            if args.out:
                keep(args.out, plants, args.threads, time.monotonic() - started)
    print(result(plants, args.threads, time.monotonic() - started))


if __name__ == "__main__":
    main()
