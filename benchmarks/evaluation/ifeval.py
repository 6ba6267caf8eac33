"""Does `wpmerge eval` give lm-eval's own numbers? Official IFEval prompts of six instructions: base, expert, merge.

    python -m benchmarks.evaluation.ifeval [--family .family] [--data FILE] [--tokens 128] [--out FILE]

The prompts are those of the official set that ask for nothing but the paper's six instructions. lm-eval's side is its
own command line on its own ifeval task, told to read the prompts from a local file; ours is `wpmerge eval`. Both run
in processes of their own, float32, greedily, with the chat template. Prints a table of every metric by both, and in
its last line the same as JSON, with how many documents are judged alike.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.reporting import conditions
from wpmerge.evaluation import load_evaluation
from wpmerge.ifeval import ensure_punkt

ROOT = Path(__file__).parents[2]
SIX = frozenset(
    {
        "change_case:english_capital",
        "detectable_format:multiple_sections",
        "detectable_format:number_highlighted_sections",
        "detectable_format:title",
        "punctuation:no_comma",
        "startend:quotation",
    }
)
METRICS = ("prompt_level_strict_acc", "inst_level_strict_acc", "prompt_level_loose_acc", "inst_level_loose_acc")
RECIPE = """\
merge_method: task_arithmetic
base_model: {base}
models:
  - model: {format}
    parameters: {{weight: 0.6}}
  - model: {math}
    parameters: {{weight: 0.6}}
  - model: {json}
    parameters: {{weight: 0.6}}
dtype: float32
out_dtype: bfloat16
"""


def select(data: Path, out: Path, limit: int | None) -> int:
    """Write the prompts whose instructions are all among the six; how many there are."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    kept = [row for row in rows if set(row["instruction_id_list"]) <= SIX][:limit]
    out.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return len(kept)


def by_lm_eval(work: Path, model: Path, data: Path, tokens: int, batch: int) -> tuple[dict[str, float], list[bool]]:
    """lm-eval's own command: each metric, and each document's strict verdict in the order of the file."""
    import lm_eval

    tasks = work / "tasks"
    tasks.mkdir(exist_ok=True)
    original = Path(lm_eval.__file__).parent / "tasks" / "ifeval" / "ifeval.yaml"
    files = json.dumps({"data_files": {"train": str(data)}})
    (tasks / "local.yaml").write_text(
        f"include: {original}\ntask: ifeval_local\ndataset_path: json\ndataset_kwargs: {files}\n", encoding="utf-8"
    )
    out = work / f"lm-eval-{model.name}"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "ifeval_local", "--log_samples"]
    command += ["--model_args", f"pretrained={model},dtype=float32", "--include_path", str(tasks), "--device", "cpu"]
    command += ["--apply_chat_template", "--batch_size", str(batch), "--gen_kwargs", f"max_gen_toks={tokens}"]
    punkt = ensure_punkt()
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "hf")}
    if punkt is not None:
        offline["NLTK_DATA"] = str(punkt.parents[2])
    subprocess.run([*command, "--output_path", str(out)], check=True, env={**os.environ, **offline}, stdout=sys.stderr)
    (result,) = out.rglob("results_*.json")
    (samples,) = out.rglob("samples_*.jsonl")
    scores = json.loads(result.read_text())["results"]["ifeval_local"]
    rows = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    return {name: scores[f"{name},none"] for name in METRICS}, [bool(row[METRICS[0]]) for row in rows]


def by_wpmerge(work: Path, models: dict[str, Path], data: Path, tokens: int, batch: int) -> Any:
    """`wpmerge eval` on all models in one go."""
    command = [sys.executable, "-m", "wpmerge", "eval", *(f"{name}={path}" for name, path in models.items())]
    command += ["--task-data", f"ifeval={data}", "--dtype", "float32", "--batch-size", str(batch), "--device", "cpu"]
    command += ["--max-gen-tokens", str(tokens), "--base", "base", "--out", str(work / "evaluation")]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return load_evaluation(work / "evaluation")


def main() -> None:
    """Run both, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", type=Path, default=ROOT / ".family")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "ifeval.jsonl")
    parser.add_argument("--tokens", type=int, default=128, help="longest response (default 128)")
    parser.add_argument("--batch", type=int, default=16, help="prompts run together (default 16)")
    parser.add_argument("--limit", type=int, help="only the first prompts (default: all)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        count = select(args.data, work / "six.jsonl", args.limit)
        experts = {name: (args.family / name).resolve() for name in ("format", "math", "json")}
        base = (args.family / "base").resolve()
        (work / "merge.yml").write_text(RECIPE.format(base=base, **experts))
        merge = [sys.executable, "-m", "wpmerge", "merge", str(work / "merge.yml"), "--out", str(work / "merge")]
        subprocess.run(merge, check=True, stdout=sys.stderr)
        models = {"base": base, "format": experts["format"], "merge": work / "merge"}
        began = time.perf_counter()
        ours = by_wpmerge(work, models, work / "six.jsonl", args.tokens, args.batch)
        seconds = {"wpmerge": round(time.perf_counter() - began, 1)}
        began = time.perf_counter()
        theirs = {n: by_lm_eval(work, path, work / "six.jsonl", args.tokens, args.batch) for n, path in models.items()}
        seconds["lm-eval"] = round(time.perf_counter() - began, 1)
    found: dict[str, Any] = {}
    print(f"{'model':8}{'metric':26}{'lm-eval':>9}{'wpmerge':>9}")
    for name, (scores, verdicts) in theirs.items():
        own = {metric: float(ours.models[name].scores[f"ifeval/{metric}"].value) for metric in METRICS}
        strict = [bool(value[0]) for value in ours.models[name].credits[f"ifeval/{METRICS[0]}"]]
        alike = sum(one == other for one, other in zip(strict, verdicts, strict=True))
        found[name] = {"lm-eval": scores, "wpmerge": own, "documents judged alike": f"{alike} of {count}"}
        for metric in METRICS:
            print(f"{name:8}{metric:26}{scores[metric]:9.4f}{own[metric]:9.4f}")
    line = json.dumps(
        {
            "benchmark": "evaluation/ifeval",
            "prompts": count,
            "largest difference": max(
                abs(each["lm-eval"][metric] - each["wpmerge"][metric]) for each in found.values() for metric in METRICS
            ),
            "models": found,
            "seconds": seconds,
            **conditions(tokens=args.tokens, batch=args.batch),
        }
    )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
