"""Scoring with weights streamed from disk against weights in memory: time, peak memory, and whether scores agree.

A random Llama pair of 1.1 billion parameters each, 2.2 GB in bfloat16, is made in a temporary folder and scored by
`wpmerge score` in processes of their own, streamed and resident in turn, with the models in the file cache.
The ratio streamed / resident is of the command's wall time.

    python -m benchmarks.scoring.streaming [--size scoring] [--rounds 3] [--out FILE]
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.merge.models import SIZES, make_family
from benchmarks.processes import measure
from benchmarks.reporting import conditions
from wpmerge.scores import Scores, load_scores

HEAD, BODY, REPLY = 30, 12, 8
"""Tokens of a prompt that all prompts share, of its own, and of its reference."""


def write_tokenizer(directory: Path, vocabulary: int) -> None:
    """One word for each token."""
    words = {"<s>": 0, "</s>": 1} | {f"w{number}": number for number in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="w2")
    made.save_pretrained(directory)


def write_prompts(path: Path, count: int, vocabulary: int) -> None:
    """Prompts of random words behind a common head, with references."""
    generator = random.Random(0)

    def words(number: int) -> str:
        return " ".join(f"w{generator.randrange(2, vocabulary)}" for _ in range(number))

    head = words(HEAD)
    entries = [{"prompt": f"{head} {words(BODY)}", "reference": words(REPLY)} for _ in range(count)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def run(folder: Path, name: str, options: list[str], threads: int) -> tuple[float, float]:
    """Run `wpmerge score`; seconds of wall time and peak resident MB."""
    command = [sys.executable, "-m", "wpmerge", "score", "--base", str(folder / "base")]
    command += ["--expert", f"e={folder / 'expert0'}", "--capability", f"e={folder / 'prompts.jsonl'}"]
    command += ["--out", str(folder / name), "--overwrite", "--readout", "reference", "--accept-anchor", *options]
    found = measure(command, folder / "log", {"OMP_NUM_THREADS": str(threads)})
    return found["wall_s"], found["rss_mb"]


def largest_difference(one: Scores, other: Scores) -> float:
    """Over all units, a fraction of the gap."""
    return max(float((array - other.arrays[key]).abs().nan_to_num().max()) for key, array in one.arrays.items())


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="scoring")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="where to make the models; default: the system's temporary folder")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    common = ["--prompts", str(args.prompts), "--held-out", "4", "--top-k", "2", "--random-sample", "2"]
    common += ["--verify-prompts", "2"]
    found: dict[str, list[tuple[float, float]]] = {"resident": [], "streamed": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        folder = Path(made)
        for path in make_family(folder, args.size, experts=1):
            write_tokenizer(path, SIZES[args.size]["vocab"])
        write_prompts(folder / "prompts.jsonl", args.prompts + 4, SIZES[args.size]["vocab"])
        options = {"resident": common, "streamed": [*common, "--stream"]}
        for file in folder.rglob("*.safetensors"):
            file.read_bytes()  # warms the file cache
        for number in range(args.rounds):
            for name in ("resident", "streamed") if number % 2 else ("streamed", "resident"):
                found[name].append(run(folder, name, options[name], args.threads))
                print(f"{name}: {found[name][-1][0]:.0f} s, {found[name][-1][1]:,.0f} MB", file=sys.stderr)
        scores = {name: load_scores(folder / name) for name in found}
        apart = largest_difference(scores["streamed"], scores["resident"])
    ratios = [s[0] / r[0] for s, r in zip(found["streamed"], found["resident"], strict=True)]
    line = json.dumps(summary(found, ratios, apart, scores["resident"], args))
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


def summary(
    found: dict[str, list[tuple[float, float]]], ratios: list[float], apart: float, scores: Scores, args: Any
) -> dict[str, Any]:
    """What is kept of a run."""
    return {
        "benchmark": "scoring/streaming",
        "streamed / resident, wall time": {
            "median": round(statistics.median(ratios), 3),
            "least": round(min(ratios), 3),
            "most": round(max(ratios), 3),
        },
        "peak resident MB": {name: round(max(peak for _, peak in runs)) for name, runs in found.items()},
        "seconds": {name: [round(seconds, 1) for seconds, _ in runs] for name, runs in found.items()},
        "largest difference of a score": apart,
        "noise floor": scores.readouts["e"].noise_floor,
        **conditions(size=args.size, prompts=args.prompts, threads=args.threads, torch_threads=torch.get_num_threads()),
    }


if __name__ == "__main__":
    main()
