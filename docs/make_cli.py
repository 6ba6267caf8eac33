"""Write docs/cli.md, the reference of the command line, from the commands themselves.

python docs/make_cli.py
"""

import re
from pathlib import Path
from typing import Any

import typer.main

from wpmerge import cli

HERE = Path(__file__).parent
HEAD = """# The command line

Made from the commands by `python docs/make_cli.py`; `wpmerge COMMAND --help` says the same.

Results go to stdout, messages and progress to stderr. Exit codes: 0, done; 1, `verify` found something wrong; 2,
something in the input can be mended, and the message says what; 130, interrupted. An interrupted command goes on where
it was when it is given again. Nothing appears under an output's name before it is whole.
"""


def reference() -> str:
    """The page."""
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    parts = [HEAD, "| command | |", "|---|---|"]
    parts += [f"| [`wpmerge {name}`](#wpmerge-{name}) | {summary(command)} |" for name, command in commands.items()]
    for name, command in commands.items():
        parts += ["", *section(name, command)]
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
