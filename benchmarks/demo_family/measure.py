"""Measure the demo family: instruction following of base, experts and uniform merges, by lm-eval's IFEval checkers.

    python benchmarks/demo_family/measure.py [FAMILY]

Replies are greedy, in float32, to the prompts of FAMILY/eval.jsonl. Prints a markdown table, and in the last line a
JSON object with the best uniform scale and what it retains of the experts' skills.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

EXPERTS = {
    "letters": ("change_case:english_capital", "punctuation:no_comma"),
    "marks": ("detectable_format:title", "detectable_format:number_highlighted_sections"),
    "frame": ("startend:quotation", "detectable_format:multiple_sections"),
}
INSTRUCTIONS = tuple(name for owned in EXPERTS.values() for name in owned)
SCALES = tuple(round(0.1 * i, 1) for i in range(1, 11))
SHIPPED = Path(__file__).parents[2] / "wpmerge" / "demo_family"


def checkers() -> dict[str, Any]:
    """lm-eval's instruction checkers; its module downloads nltk data when imported, which none of the six needs."""
    import langdetect  # type: ignore[import-untyped]
    import nltk

    nltk.download = lambda *_, **__: False
    langdetect.DetectorFactory.seed = 0
    from lm_eval.tasks.ifeval import instructions_registry

    return dict(instructions_registry.INSTRUCTION_DICT)


@torch.inference_mode()
def replies(model: Any, tokenizer: Any, prompts: list[str], batch: int = 120) -> list[str]:
    """Greedy replies to single-turn prompts, in the order of the prompts."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    out = []
    for start in range(0, len(texts), batch):
        inputs = tokenizer(texts[start : start + batch], return_tensors="pt", padding=True, add_special_tokens=False)
        ids = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=100)
        out += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return out


def accuracies(rows: list[dict[str, Any]], texts: list[str], registry: dict[str, Any]) -> dict[str, float]:
    """Share of prompts whose instruction is followed, per instruction (strict: the reply as it is)."""
    hits: dict[str, list[bool]] = {name: [] for name in INSTRUCTIONS}
    for row, text in zip(rows, texts, strict=True):
        (name,), (kwargs,) = row["instruction_id_list"], row["kwargs"]
        checker = registry[name](name)
        checker.build_description(**kwargs)
        hits[name].append(bool(text.strip()) and bool(checker.check_following(text)))
    return {name: sum(found) / len(found) for name, found in hits.items()}


def uniform(base: dict[str, Tensor], experts: list[dict[str, Tensor]], scale: float) -> dict[str, Tensor]:
    """Task arithmetic: base + scale · Σ (expert − base), in float32, rounded once to bfloat16 as a shipped merge is."""
    return {
        name: (tensor + scale * sum(expert[name] - tensor for expert in experts)).bfloat16().float()
        for name, tensor in base.items()
    }


def retention(row: dict[str, float], base: dict[str, float], experts: dict[str, dict[str, float]]) -> dict[str, float]:
    """Per instruction, (merged − base) / (its expert − base): 1 keeps the expert's whole gain."""
    owners = {name: expert for expert, owned in EXPERTS.items() for name in owned}
    return {name: (row[name] - base[name]) / (experts[owners[name]][name] - base[name]) for name in INSTRUCTIONS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path, nargs="?", default=SHIPPED, help="family directory (default: the shipped)")
    parser.add_argument("--eval", type=Path, help="prompts to measure on (default: FAMILY/eval.jsonl)")
    parser.add_argument("--scales", type=float, nargs="*", default=SCALES, help="uniform scales (default 0.1 to 1.0)")
    arguments = parser.parse_args()
    path = arguments.eval or arguments.family / "eval.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    registry = checkers()
    tokenizer = AutoTokenizer.from_pretrained(arguments.family / "base", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(arguments.family / "base", dtype=torch.float32)
    weights = {
        name: {k: v.float() for k, v in load_file(arguments.family / name / "model.safetensors").items()}
        for name in ("base", *EXPERTS)
    }

    def measured(name: str, state: dict[str, Tensor]) -> dict[str, float]:
        # A tied head is not in the file; loading the embedding sets both.
        model.load_state_dict(state, strict=False)
        result = accuracies(rows, replies(model, tokenizer, [row["prompt"] for row in rows]), registry)
        cells = " | ".join(f"{result[instruction]:.0%}" for instruction in INSTRUCTIONS)
        print(f"| {name} | {cells} | {sum(result.values()) / len(result):.0%} |", flush=True)
        return result

    print(f"{len(rows)} prompts, {path}", file=sys.stderr)
    print("| model | " + " | ".join(name.split(":")[1] for name in INSTRUCTIONS) + " | mean |")
    print("|---" * (len(INSTRUCTIONS) + 2) + "|")
    base = measured("base", weights["base"])
    experts = {name: measured(name, weights[name]) for name in EXPERTS}
    tried = {
        scale: measured(f"uniform {scale}", uniform(weights["base"], [weights[e] for e in EXPERTS], scale))
        for scale in arguments.scales
    }
    if tried:
        kept = {scale: retention(row, base, experts) for scale, row in tried.items()}
        best = max(kept, key=lambda scale: sum(kept[scale].values()))
        mean = sum(kept[best].values()) / len(INSTRUCTIONS)
        print(json.dumps({"best_uniform_scale": best, "mean_retention": round(mean, 3), "retention": kept[best]}))


if __name__ == "__main__":
    main()
