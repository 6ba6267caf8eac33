"""Every command in the docs: its names and options exist, and it runs here, or says itself why it cannot.

Commands stand in ``sh`` blocks. ``<!-- runs in the tests -->`` before one runs it, on the family that ships. The first
line of any other is a comment that readers see too: ``# needs a GPU``, ``# needs a download`` or ``# needs your own
models``. All of them are parsed.
"""

import ast
import doctest
import importlib
import re
import shlex
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from reports import data_of
from typer.testing import CliRunner

from wpmerge import cli
from wpmerge.plan import load_plan
from wpmerge.replaying import unit_coefficients
from wpmerge.run_recipe import RunRecipe
from wpmerge.scores import load_scores

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (?P<marker>[^>]*?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)```", re.DOTALL)
RUNS = "runs in the tests"
NEEDS = re.compile(r"# needs (a GPU|a download|your own models)\b")
OTHERS = {"pip", "make", "python"}
NUMBER = r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    marker: str
    language: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """Its lines as words, without comments, continued lines joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(language: str) -> list[Block]:
    return [
        Block(page, found["marker"] or "", found["language"], found["text"])
        for page in PAGES
        for found in BLOCK.finditer(page.read_text(encoding="utf-8"))
        if found["language"] == language
    ]


def name_of(block: Block) -> str:
    return f"{block.page.name}: {' '.join(block.commands[0])[:40]}" if block.commands else block.page.name


@pytest.mark.parametrize("block", blocks("sh"), ids=name_of)
def test_commands_are_what_they_say(block: Block) -> None:
    assert block.marker in ("", RUNS)
    for words in block.commands:
        program, *rest = words
        if program == "wpmerge":
            parse(rest)
        elif program.endswith("python"):
            check_python(rest)
        elif program == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert rest and set(rest) <= set(targets)
        else:
            assert program in OTHERS, words


@pytest.mark.parametrize("block", blocks("sh"), ids=name_of)
def test_a_block_is_run_or_says_what_it_needs(block: Block) -> None:
    assert (block.marker == RUNS) is not bool(NEEDS.match(block.text)), f"{block.page.name}: {block.text}"
    if block.marker == RUNS:
        assert {words[0] for words in block.commands} == {"wpmerge"}, "the tour runs nothing else"


def test_a_block_without_a_mark_is_found() -> None:
    unmarked = BLOCK.search("```sh\nwpmerge inspect scores\n```")
    assert unmarked and not unmarked["marker"] and not NEEDS.match(unmarked["text"])
    for line in ("# needs a GPU", "# needs a download: of a model", "# needs your own models, scored"):
        assert NEEDS.match(f"{line}\nwpmerge inspect scores\n")
    assert not NEEDS.match("wpmerge inspect scores  # needs a GPU\n")


def test_modules_that_pages_run_are_there() -> None:
    named = {name for page in PAGES for name in re.findall(r"`python -m (benchmarks\.[\w.]+)", page.read_text())}
    assert len(named) >= 2
    for name in named:
        assert find_spec(name) is not None, name


def parse(words: list[str]) -> None:
    """As the shell would hand it over, but nothing is run."""
    name, *rest = words[: words.index(">")] if ">" in words else words
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert name in commands, words
    try:
        commands[name].make_context(name, rest)
    except Exception as error:  # click's usage errors, whichever click typer brings
        pytest.fail(f"wpmerge {' '.join(words)}: {getattr(error, 'message', error)}")


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        assert find_spec(words[1]) is not None, words
    else:
        assert (ROOT / words[0]).is_file(), words


def test_every_block_says_what_it_is() -> None:
    for page in PAGES:
        for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
            shell = re.search(r"^(wpmerge|make|pip|python) ", found["text"], re.MULTILINE)
            assert found["language"] == "sh" or not shell, f"{page.name}: {found['text'][:60]}"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that looks like the repository's root to a command that reads the family or the recipes."""
    path = tmp_path_factory.mktemp("root")
    for name in ("wpmerge", "recipes"):
        (path / name).symlink_to(ROOT / name)
    return path


def test_the_tour_runs(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = {}
    for block in blocks("sh"):
        for words in block.commands if block.marker == RUNS else []:
            result = CliRunner().invoke(cli.app, words[1:])
            assert result.exit_code == 0, f"{' '.join(words)}\n{result.output}"
            said[" ".join(words[1:5])] = result.output
    assert len(said) >= 8 and (bench / "tour" / "evaluation" / "evaluation.json").is_file()
    check_the_sentences(bench / "tour", " ".join(said["fuse tour/scores --out tour/merged"].split()))


def check_the_sentences(tour: Path, said: str) -> None:
    """The page says of a unit's coefficients what `fuse --explain` said, and what it says adds up to them."""
    why = data_of((tour / "report.html").read_text())["lookup"]["why"]["head.1.0"]
    values = unit_coefficients_of(tour)
    assert len(why) == len(values) == 2
    for sentence in why:
        assert " ".join(sentence.split()) in said
        parts = re.match(
            rf"(\w+) gets ({NUMBER}) at .*?: refine, from ({NUMBER}) by ({NUMBER}) = ({NUMBER}), "
            rf"(not clipped|clipped to {NUMBER})",
            sentence,
        )
        assert parts, sentence
        expert, *numbers, clipped = parts.groups()
        value, start, moved, total = map(float, numbers)
        assert value == pytest.approx(values[expert], abs=1e-3)
        assert total == pytest.approx(start + moved, abs=2e-3)
        assert total == pytest.approx(value, abs=1e-3)
        assert (clipped == "not clipped") is (0.0 < total < 1.5)


def unit_coefficients_of(tour: Path) -> dict[str, float]:
    """Expert → the coefficient of head.1.0, as the merge has it."""
    plan, scores = load_plan(tour / "merged"), load_scores(tour / "scores")
    found = {expert: unit_coefficients(plan, scores, expert, "head") for expert in plan.experts}
    return {expert: float(values[1, 0]) for expert, values in found.items() if values is not None}


def test_the_notebook_runs(bench: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(bench)
    (notebook,) = [block for block in blocks("python") if "import wpmerge as wp" in block.text]
    exec(compile(notebook.text, "docs/python.md", "exec"), {"__name__": "notebook"})
    shown = capsys.readouterr().out
    assert "head." in shown and "merged" in shown


def test_recipes_in_the_docs_are_recipes() -> None:
    found = [RunRecipe.model_validate(yaml.safe_load(block.text)) for block in blocks("yaml")]
    assert found


@pytest.mark.parametrize("module", ["wpmerge", "wpmerge.api"])
def test_doctests(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0 and result.failed == 0


def test_the_reference_is_of_the_commands_as_they_are() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        reference: Any = importlib.import_module("make_cli")
    finally:
        sys.path.pop(0)
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == reference.reference(), "python docs/make_cli.py"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http") or not re.search(r"[./#]", target):  # C[e](u) in a formula is no link
                continue
            file, _, anchor = target.partition("#")
            path = page.parent / file if file else page
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                assert anchor in anchors(path), f"{page.name}: {target}"


def test_the_modules_of_the_readme_import_only_from_lines_above_their_own() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The code")[2]
    lines = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    modules = {path.stem: path for path in (ROOT / "wpmerge").glob("[a-z]*.py")} | {
        "builtin": ROOT / "wpmerge" / "builtin" / "__init__.py"
    }
    assert sorted(lines) == sorted(modules)
    for number, name in enumerate(lines):
        for node in ast.walk(ast.parse(modules[name].read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("wpmerge."):
                imported = str(node.module).split(".")[1]
                assert imported == name or imported in lines[:number], f"{name} imports {imported}, which comes later"


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_papers_of_the_project_can_be_read() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["license"] == "Apache-2.0" and cited["title"].startswith("wpmerge")
