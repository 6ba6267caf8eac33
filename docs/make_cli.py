"""Write docs/cli.md, the reference of the command line, from the commands themselves.

python docs/make_cli.py
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer.main

from wpmerge import cli
from wpmerge.taskdata import ANSWER_FIELDS, IFEVAL_FIELDS
from wpmerge.tasks import PRESETS

HERE = Path(__file__).parent
HEAD = """# The command line

Made from the commands by `python docs/make_cli.py`; `wpmerge COMMAND --help` says the same.

Results go to stdout, messages and progress to stderr. Exit codes: 0, done; 1, `verify` found something wrong; 2,
something in the input can be mended, and the message says what; 130, interrupted. An interrupted command goes on where
it was when it is given again. Nothing appears under an output's name before it is whole.
"""

EVAL = """### Presets of `--tasks`

| preset | tasks of lm-eval |
|---|---|
{presets}

`instruct` without a local file for another task than `ifeval` is IFEval alone, and says so. `humaneval_instruct` and
`mbpp_instruct` run code that a model wrote, and ask for `--confirm-unsafe-code`; `minerva_math` needs
`pip install "lm-eval[math]"`. Of HumanEval and MBPP these are the forms for chat models, and of MATH the one whose
answer is parsed; for models without a chat template there are `humaneval` and `mbpp`. A task without `--task-data`
takes its data set from the hub, or from the hub's cache.

### Local documents

A file of `--task-data TASK=FILE` is JSONL, an object a line, in one of three forms:

| TASK | keys of every row | judged by |
|---|---|---|
| `ifeval`, or a name that lm-eval does not have \
| {ifeval}; `kwargs` has an object for each instruction, with every argument that its checker takes (null is none) \
| IFEval's checkers and those of `--checkers`, strict and loose |
| a name that lm-eval does not have | {answer}: a number, a text, or any other JSON \
| a number: the last "answer is N" of the reply; a text: the reply itself; else: the whole reply read as JSON |
| another task of lm-eval, such as `gsm8k` | those of the task's own data set, the same in every row | the task |

The first row of a file with a name of its own decides which form it has. Other keys may stand in the first two forms,
and are not read. Apart from `answer`, the values of a key are of one type throughout a file. A group of tasks takes
no file; its tasks do, by name. `TASK:SPLIT=FILE` fills another split: `gsm8k` shows five examples, and so asks for
`--task-data gsm8k:train=FILE` beside `--task-data gsm8k=FILE`.

### Instructions that IFEval does not have

Rows of the first form may name instructions of other benchmarks if `--checkers` names a Python file that defines
`INSTRUCTION_DICT`, instruction id → class, each with the methods of IFEval's: `__init__(instruction_id)`,
`build_description(**arguments)`, `get_instruction_args()`, `check_following(reply)`. IFBench's
`instructions_registry.py`, with the files beside it and the packages that these import, is such a file:

```sh
# needs your own models, and github.com/allenai/IFBench with what its requirements.txt names
wpmerge eval base=BASE merged=merged --tasks instruct --task-data ifeval=ifeval.jsonl \\
    --task-data ifbench=IFBench_test.jsonl --checkers IFBench/instructions_registry.py --base base --out evaluation
```

**This runs the file, and what it imports, as your own code**, and only because you name it: a recipe of `wpmerge run`
cannot. Documents with such instructions are tried before a model is run. Arguments reach these checkers as the
file has them, 0, false and empty text too, as they do in IFBench's own script; to IFEval's, lm-eval hands on none of
the three. An id that IFEval has is refused unless its class is IFEval's. If a checker fails on a reply, the evaluation
stops and names it; finished replies are kept beside the output, and judged once it is mended. Where a Python file of
its folder has changed, finished models are judged again, from what they said. Modules beside two files of checkers may
not have one name. The evaluation's `provenance` has the names and SHA-256 of all of these."""


def reference() -> str:
    """The page."""
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    parts = [HEAD, "| command | |", "|---|---|"]
    parts += [f"| [`wpmerge {name}`](#wpmerge-{name}) | {summary(command)} |" for name, command in commands.items()]
    for name, command in commands.items():
        parts += ["", *section(name, command)]
        if name == "eval":
            parts += ["", eval_notes()]
    return "\n".join(parts) + "\n"


def section(name: str, command: Any) -> list[str]:
    """One command: what it does, its arguments, its options with their defaults."""
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option" and each.name != "help"]
    needed = [f"{each.opts[0]} {each.metavar}" for each in options if each.required]
    given = [each.metavar if each.required else bracketed(each.metavar) for each in arguments]
    lines = [f"## wpmerge {name}", "", f"`{' '.join(['wpmerge', name, *given, *needed, '[OPTIONS]'])}`", ""]
    lines += [cell(part) for part in (command.help or "").split("\n\n")]
    lines += ["", "| | | default |", "|---|---|---|"]
    lines += [f"| `{each.metavar}` | {cell(each.help)} | {'required' if each.required else ''} |" for each in arguments]
    lines += [f"| `{spelled(each)}` | {what(each)} | {default(each)} |" for each in options]
    return lines


def eval_notes() -> str:
    """What tasks and documents ``wpmerge eval`` takes."""
    more = {"instruct": ", and every local file of `--task-data`"}
    presets = [f"| `{name}` | {code(tasks)}{more.get(name, '')} |" for name, tasks in PRESETS.items()]
    return EVAL.format(presets="\n".join(presets), ifeval=code(IFEVAL_FIELDS), answer=code(ANSWER_FIELDS))


def code(names: Iterable[str]) -> str:
    """Names as code, with commas."""
    return ", ".join(f"`{name}`" for name in names)


def summary(command: Any) -> str:
    """The first sentence of a command's help."""
    return cell((command.help or "").split("\n\n")[0])


def bracketed(metavar: str) -> str:
    """An argument that may be left out."""
    return metavar if metavar.startswith("[") else f"[{metavar}]"


def spelled(option: Any) -> str:
    """An option as it is typed."""
    names = "/".join([*option.opts, *option.secondary_opts])
    return names if option.is_flag else f"{names} {option.metavar}"


def what(option: Any) -> str:
    """An option's help without its default, which has a column."""
    return cell(re.sub(r"\s*Default: .*$", "", option.help or "", flags=re.DOTALL))


def default(option: Any) -> str:
    """An option's default, as its help says it or as its value."""
    if option.required:
        return "required"
    said = re.search(r"Default: (.*?)\.?$", option.help or "", flags=re.DOTALL)
    if said:
        return cell(said[1])
    if option.is_flag and option.secondary_opts:
        return f"`{option.opts[0] if option.default else option.secondary_opts[0]}`"
    value = option.default
    return f"`{', '.join(map(str, value)) if isinstance(value, list | tuple) else value}`"


def cell(text: str | None) -> str:
    """Text on one line, safe in a table."""
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    (HERE / "cli.md").write_text(reference(), encoding="utf-8")
