"""Artifacts for the tests of reports: scores with given numbers, and what goes with them."""

import base64
import json
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wpmerge.evaluation import Evaluation, ModelResult, Skill, only_type, score_of
from wpmerge.plan import Coefficient, InputModel, Plan
from wpmerge.scores import (
    AnchorCurvePoint,
    CapabilityRecord,
    HeldOut,
    ReadoutRecord,
    Scores,
    Verification,
    Verified,
)

NASTY = "</script><img src=x onerror=alert(1)>{{title}}\"'&<b>"
"""What somebody may call a file or write into a prompt."""
TYPES = ["keywords:existence", "punctuation:no_comma"]


def data_of(page: str) -> dict[str, Any]:
    """What a page's script draws and looks up."""
    held = re.search(r'<script type="text/plain" id="data">(.*?)</script>', page, re.DOTALL)
    assert held is not None
    found: dict[str, Any] = json.loads(_inflated(held[1]))
    look = found["lookup"]
    shape = (len(look["maps"]), -1, len(look["units"]))
    codes, ranks = (np.frombuffer(_inflated(look[each]), dtype=np.uint8).reshape(shape) for each in ("values", "ranks"))
    joined = [int.from_bytes(bytes(each), "big") for each in _rows(codes)]
    values = [number_of(each) for each in joined]
    columns = len(look["maps"])
    look["values"] = [values[start : start + columns] for start in range(0, len(values), columns)]
    whole = [int.from_bytes(bytes(each), "big") for each in _rows(ranks)]
    look["ranks"] = [whole[start : start + columns] for start in range(0, len(whole), columns)]
    return found


def _inflated(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def _rows(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[columns, bytes, units] → [units · columns, bytes]."""
    return planes.transpose(2, 0, 1).reshape(-1, planes.shape[1])


def number_of(code: int) -> float | None:
    """A score from its 16 bits."""
    if code < 2:
        return None if code == 0 else 0.0
    above, digits = divmod(code - 2, 900)
    exponent, negative = divmod(above, 2)
    return float(f"{'-' if negative else ''}{digits + 100}e{exponent - 33}")


def model(name: str) -> InputModel:
    return InputModel(source=f"models/{name}", content_hash=f"sampled-sha256:{name}")


def made_scores(
    *, layers: int = 4, heads: int = 4, neurons: int = 12, names: Sequence[str] = ("a", "b"), seed: int = 0
) -> Scores:
    """A family's scores: reference and anchor, cross effects, a retain set; NaN above the anchors' l* = 1."""
    generator = torch.Generator().manual_seed(seed)
    counts = {"head": heads, "neuron": neurons, "norm": 2, "embedding": 1}
    shapes = {"head": (layers, heads), "neuron": (layers, neurons), "norm": (layers, 2), "embedding": (1, 1)}
    arrays, readouts = {}, {}
    for name in names:
        for label in (name, f"{name}@anchor"):
            for expert in names:
                for kind, shape in shapes.items():
                    values = torch.randn(shape, generator=generator) * 0.05
                    if label != name and kind != "embedding":
                        values[2:] = torch.nan
                    arrays[f"linear/{label}/{expert}/{kind}"] = values
        heads_of = [f"head.{layer}.{index}" for layer in range(layers) for index in range(heads)][:6]
        units = tuple(
            Verified(
                unit=unit,
                drawn="top" if place < 3 else "random",
                screen=0.1 * place,
                exact=0.1 * place + 0.01,
                stderr=0.02,
            )
            for place, unit in enumerate(heads_of)
        )
        check = Verification(
            units=units, spearman=0.9, spearman_random=0.8, recall=1.0, largest_error=0.03, missed_share=0.1
        )
        curve = tuple(
            AnchorCurvePoint(layer=i, cosine=0.5 + 0.1 * min(i, 4), gap=float(i), t=2.0 * i, carried=min(1.0, 0.3 * i))
            for i in range(layers)
        )
        common = {"capability": name, "base": -2.0, "expert": -1.0, "gap": 1.0, "gap_t": 9.0, "prompts": 8}
        verified = {"sufficiency": {"head": check}}
        readouts[name] = ReadoutRecord(**common, readout="reference", l_star=layers - 1, verification=verified)
        readouts[f"{name}@anchor"] = ReadoutRecord(
            **common, readout="anchor", anchor="pair", l_star=1, curve=curve, verification=verified
        )
    readouts["plain"] = ReadoutRecord(
        capability="plain",
        readout="reference",
        l_star=layers - 1,
        base=-1.0,
        expert=None,
        gap=None,
        gap_t=None,
        prompts=8,
    )
    for expert in names:
        arrays[f"linear/plain/{expert}/head"] = torch.randn(shapes["head"], generator=generator) * 0.01
    capabilities = {
        name: CapabilityRecord(
            source=f"{name}.jsonl {NASTY}",
            content_hash="0",
            retain=name == "plain",
            scored=(NASTY, "another"),
            references="base" if name == "plain" else "expert",
            held_out=HeldOut(prompts=("x",), sequences=((1, 2),), starts=(1,)),
        )
        for name in (*names, "plain")
    }
    return Scores(
        base=model("base"),
        experts={name: model(name) for name in names},
        model_type="llama",
        layers=layers,
        counts=counts,
        labels={"norm": ["input_layernorm", "post_attention_layernorm"]},
        capabilities=capabilities,
        readouts=readouts,
        arrays=arrays,
        provenance={"settings": {"prompts": 8, "top": 3}, "versions": {"torch": "2"}, "seconds": 1.0, "device": "cpu"},
    )


def made_plan(scores: Scores, *, seed: int = 0) -> Plan:
    """A coefficient per unit, as `fuse` lays them out for Llama's tensors."""
    generator = torch.Generator().manual_seed(seed)
    coefficients: dict[str, dict[str, Coefficient]] = {}
    for expert in scores.experts:
        held = {"model.embed_tokens.weight": Coefficient(values=torch.rand((), generator=generator))}
        for layer in range(scores.layers):
            prefix = f"model.layers.{layer}."
            heads = torch.rand(scores.counts["head"], generator=generator).repeat_interleave(2)
            neurons = torch.rand(scores.counts["neuron"], generator=generator)
            held[f"{prefix}self_attn.o_proj.weight"] = Coefficient(values=heads, axis=1)
            held[f"{prefix}mlp.down_proj.weight"] = Coefficient(values=neurons, axis=1)
            for norm in scores.labels["norm"]:
                held[f"{prefix}{norm}.weight"] = Coefficient(values=torch.rand((), generator=generator))
        coefficients[expert] = held
    return Plan(
        base=scores.base,
        experts=dict(scores.experts),
        coefficients=coefficients,
        rule="refine",
        granularity="unit",
        provenance={"scales": dict.fromkeys(scores.experts, 0.4), "settings": {"rule": "refine", "steps": 8}},
    )


def made_evaluation(scores: Scores) -> Evaluation:
    """Base, experts and a merge, in IFEval's form: each expert follows one instruction type, the merge most of both."""

    def result(name: str, *credits: list[int]) -> ModelResult:
        level = "ifeval/inst_level_strict_acc"
        rows, ids = [list(each) for each in credits], [[TYPES[i % 2]] for i in range(len(credits))]
        found = {level: score_of(rows)} | {f"{level}/{kind}": score_of(only_type(rows, ids, kind)) for kind in TYPES}
        return ModelResult(
            source=f"models/{name}",
            chat_template=None,
            batch_size=1,
            truncated=0,
            seconds=1.0,
            scores=found,
            credits={level: rows},
        )

    first, second = list(scores.experts)[:2]
    pattern = {"base": (0, 0), first: (1, 0), second: (0, 1), "merge": (1, 1)}
    models = {
        name: result(name, *([one, two][i % 2 : i % 2 + 1] if i < 10 or name != "merge" else [0] for i in range(12)))
        for name, (one, two) in pattern.items()
    }
    level = "ifeval/inst_level_strict_acc"
    return Evaluation(
        models=models,
        documents={"ifeval": [str(i) for i in range(12)]},
        instructions={"ifeval": [[TYPES[i % 2]] for i in range(12)]},
        reference="base",
        base="base",
        skills={
            kind: Skill(expert=expert, metric=f"{level}/{kind}")
            for kind, expert in zip(TYPES, (first, second), strict=True)
        },
        settings={"tasks": ["ifeval"], "dtype": "float32"},
        provenance={"versions": {"torch": "2"}, "task_data": {"ifeval": {"": "ifeval.jsonl"}}},
    )


def made_proof(scores: Scores, *, ranged: bool = True) -> dict[str, Any]:
    """Curves of two rankings and of random ones, and roles."""

    def curve(sign: float) -> dict[str, Any]:
        def row(level: float) -> list[float]:
            return [level + sign * share for share in (0.1, 0.5)]

        def record(level: float) -> dict[str, Any]:
            ahead = {"linear_ahead": 0.0, "linear_ahead_interval": [0.0, 0.1]}
            return {"recovered": row(level), "cpr": level, "cpr_interval": [0.1, 0.9], "cmd": 0.2, **ahead}

        chance = {"count": 2, "recovered": row(0.1), "cpr": 0.1, "cpr_range": [0.0, 0.2], "beaten": 2}
        chance |= {"recovered_range": [row(0.0), row(0.2)]} if ranged else {}
        return {"rankings": {"linear": record(0.5), "norm": record(0.3)}, "random": chance}

    source = ["head.0.1", "head.1.2"]
    counts = [
        {"kind": "head", "role": "source", "thirds": [1, 1, 0], "strongest": source[:1], "members": source},
        {"kind": "neuron", "role": "execution", "thirds": [0, 0, 1], "strongest": ["neuron.3.7"]},
    ]
    counts[1]["members"] = counts[1]["strongest"]
    proof = {
        "shares": [0.1, 0.5],
        "readouts": {"reference": {"n": 4, "transplant": curve(1.0), "revert": curve(-1.0)}},
        "stability": {
            **{"halves": 0.9, "halves_interval": [0.8, 0.95], "overlap": 0.8, "bootstrap": [0.7, 0.9], "stored": 0.95},
            **dict.fromkeys(("paraphrases", "seeds", "layers")),
        },
        "roles": {"l_star": 1, "prompts": 4, "high": 5.0, "carried": 0.5, "units": counts},
    }
    provenance = {"settings": {"shares": [0.1, 0.5], "randoms": 2, "roles": True}, "versions": {"torch": "2"}}
    return {
        "kind": "proof",
        "schema_version": 1,
        "scores": "scores",
        "capabilities": dict.fromkeys(scores.experts, proof),
        "provenance": provenance,
    }


def made_bench(scores: Scores) -> dict[str, Any]:
    """Two strategies on all experts."""

    def interval(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.05, "high": value + 0.05}

    rows = [
        {"strategy": name, "mean": interval(mean), "minimum": interval(mean - 0.2)}
        for name, mean in (("uniform", 0.5), ("fuse:refine", 0.9))
    ]
    models = {"base": scores.base, **scores.experts}
    identity = {
        "models": {name: each.content_hash for name, each in models.items()},
        "tests": dict.fromkeys(scores.experts, "0"),
    }
    cell = {"subset": list(scores.experts), "measure": "generated", "rows": rows}
    return {"cells": [cell], "provenance": {"settings": {"seeds": [0]}, "versions": {}, "identity": identity}}
