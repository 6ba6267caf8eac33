"""Checkers from files that the user names: judged by lm-eval's own code, put away again, refused one by one."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from wpmerge.checkers import judge_named, read_checkers, registered, try_checkers
from wpmerge.errors import EvaluationError
from wpmerge.ifeval import ifeval_checkers

COUNTING = """
import words

class Instruction:
    def __init__(self, instruction_id):
        self.id = instruction_id

class Range(Instruction):
    def build_description(self, *, min_words=None, max_words=None):
        self.low, self.high = min_words, max_words
        return f"between {min_words} and {max_words} words"
    def get_instruction_args(self):
        return {"min_words": self.low, "max_words": self.high}
    def check_following(self, value):
        return self.low <= words.count(value) <= self.high

class Copies(Instruction):
    def build_description(self, *, prompt=None, times=7):
        self.prompt, self.times = prompt, getattr(self, "times", times)
    def get_instruction_args(self):
        return {"prompt": self.prompt}
    def check_following(self, value):
        return value.count(self.prompt) == self.times
"""
REGISTRY = """
import instructions

print("hello")
INSTRUCTION_DICT = {"count:range": instructions.Range, "copy:times": instructions.Copies}
"""
RANGE = {"min_words": 0, "max_words": 3, "times": None, "keyword1": None}
COPIES = {"min_words": None, "max_words": None, "times": 0, "keyword1": None}


def write(folder: Path, text: str = REGISTRY, words: str = "def count(text): return len(text.split())") -> Path:
    """A registry with the two modules beside it that it needs, as IFBench's lies."""
    folder.mkdir()
    (folder / "instructions.py").write_text(COUNTING)
    (folder / "words.py").write_text(words)
    (folder / "registry.py").write_text(text)
    return folder / "registry.py"


def document(*ids: str, kwargs: list[dict[str, Any]], prompt: str = "Go on") -> dict[str, Any]:
    return {"key": 1, "prompt": prompt, "instruction_id_list": list(ids), "kwargs": json.dumps(kwargs)}


def test_replies_are_judged_and_everything_is_as_before(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before, path, modules = dict(ifeval_checkers()), list(sys.path), set(sys.modules)
    checkers = read_checkers([write(tmp_path / "a")])
    assert capfd.readouterr() == ("", "hello\n")  # stdout is for results
    doc = document("count:range", "copy:times", "punctuation:no_comma", kwargs=[RANGE, COPIES, {}])
    with registered(checkers):
        assert set(ifeval_checkers()) == {*before, "count:range", "copy:times"}
        for reply, strict, loose in [
            ("two words", [True, True, True], [True, True, True]),
            ("Go on Go on", [False, False, True], [False, False, True]),
            ("a first line to drop,\ntwo words", [False, True, False], [True, True, True]),
            ("", [False] * 3, [False] * 3),
        ]:
            judged = judge_named(doc, [reply])
            assert judged["inst_level_strict_acc"] == strict, reply
            assert judged["inst_level_loose_acc"] == loose, reply
    assert dict(ifeval_checkers()) == before
    assert sys.path == path
    assert not {"instructions", "words"} & (set(sys.modules) - modules)


def test_the_registry_is_put_back_after_an_error_and_after_a_file_that_changes_it(tmp_path: Path) -> None:
    before = dict(ifeval_checkers())
    text = (
        "from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT\nfrom instructions import Range\n"
        "INSTRUCTION_DICT['count:range'] = Range\n"
    )
    checkers = read_checkers([write(tmp_path / "a", text)])
    assert set(checkers[0].classes) == {"count:range"}  # IFEval's own are left as they are
    assert dict(ifeval_checkers()) == before
    with pytest.raises(KeyError), registered(checkers):
        raise KeyError
    assert dict(ifeval_checkers()) == before


OTHER = REGISTRY.replace("count:", "letters:").replace("copy:", "again:")


def test_modules_of_one_name_beside_two_files_are_refused(tmp_path: Path) -> None:
    files = [write(tmp_path / "a"), write(tmp_path / "b", OTHER)]
    with pytest.raises(EvaluationError, match=r"one name(.|\n)*/a and (.|\n)*/b\n(.|\n)*instructions"):
        read_checkers(files)


def test_modules_that_are_imported_late_are_found_and_read_anew(tmp_path: Path) -> None:
    late = COUNTING.replace("import words", "") + "\n"
    late = late.replace("return self.low <= words", "import words\n        return self.low <= words")
    for count, judged in (("len(text.split())", [True]), ("len(text)", [False])):
        (tmp_path / "a").mkdir(exist_ok=True)
        for name, text in {"instructions": late, "words": f"def count(text): return {count}", "own": REGISTRY}.items():
            (tmp_path / "a" / f"{name}.py").write_text(text)
        checkers = read_checkers([tmp_path / "a" / "own.py"])
        with registered(checkers):
            found = judge_named(document("count:range", kwargs=[RANGE]), ["four"])
        assert found["inst_level_strict_acc"] == judged
        assert "words" not in sys.modules


def test_checkers_of_one_id_are_held_by_one_evaluation_at_a_time(tmp_path: Path) -> None:
    checkers = read_checkers([write(tmp_path / "a")])
    with registered(checkers), pytest.raises(EvaluationError, match="another evaluation"), registered(checkers):
        pass
    assert "count:range" not in ifeval_checkers()


def test_what_tells_checkers_from_others(tmp_path: Path) -> None:
    file = write(tmp_path / "a")
    (first,) = read_checkers([file])
    found = first.fingerprint()
    assert found["file"] == "registry.py"
    assert {name: len(digest) for name, digest in found["files"].items()} == dict.fromkeys(
        ("instructions.py", "registry.py", "words.py"), 64
    )
    assert read_checkers([file])[0].fingerprint() == found
    (tmp_path / "a" / "words.py").write_text("def count(text): return len(text)  # letters")
    again = read_checkers([file])[0].fingerprint()
    assert [name for name, digest in again["files"].items() if digest != found["files"][name]] == ["words.py"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_module", r"cannot be imported(.|\n)*ModuleNotFoundError: .*no_such_module(.|\n)*install"),
        ("def f(:", r"cannot be imported(.|\n)*SyntaxError"),
        ("raise SystemExit(3)", r"cannot be imported(.|\n)*SystemExit: 3"),
        ("raise ValueError('one\\ntwo')", r"cannot be imported(.|\n)*ValueError: one\n  expected"),
        ("x = 1", r"defines no checkers(.|\n)*no INSTRUCTION_DICT"),
        ("INSTRUCTION_DICT = [1]", r"defines no checkers(.|\n)*is list"),
        ("INSTRUCTION_DICT = {}", r"defines no checkers(.|\n)*is empty"),
        ("INSTRUCTION_DICT = {1: int}", r"defines no checkers(.|\n)*from int to type"),
        ("INSTRUCTION_DICT = {'a:b': len}", r"defines no checkers(.|\n)*from str to builtin"),
        ("INSTRUCTION_DICT = {'a:b': int}", r"'a:b': int without build_description, get_instruction_args, check_foll"),
        (
            "import instructions\nINSTRUCTION_DICT = {'punctuation:no_comma': instructions.Range}",
            r"a checker already(.|\n)*punctuation:no_comma",
        ),
    ],
)
def test_files_without_checkers_are_refused(tmp_path: Path, text: str, message: str) -> None:
    before, path = dict(ifeval_checkers()), list(sys.path)
    file = write(tmp_path / "a", text)
    with pytest.raises(EvaluationError, match=message) as refused:
        read_checkers([file])
    assert refused.value.where == file
    assert dict(ifeval_checkers()) == before and sys.path == path


def test_no_file_and_one_id_in_two_files(tmp_path: Path) -> None:
    for absent in (tmp_path, tmp_path / "none.py"):
        with pytest.raises(EvaluationError, match=r"is no file(.|\n)*--checkers"):
            read_checkers([absent])
    files = [write(tmp_path / "a"), tmp_path / "b" / "registry.py"]
    write(tmp_path / "b")
    with pytest.raises(EvaluationError, match=r"a checker already(.|\n)*b/registry.py(.|\n)*count:range"):
        read_checkers(files)


def test_checkers_are_tried_before_any_model(tmp_path: Path) -> None:
    needy = "def count(text): raise LookupError('Resource punkt not found')"
    with registered(read_checkers([write(tmp_path / "a", words=needy)])):
        with pytest.raises(EvaluationError, match=r"document 1; .*registry.py: count:range, check_fol(.|\n)*punkt"):
            try_checkers(document("count:range", kwargs=[RANGE]), "document 1")
        odd = document("count:range", kwargs=[{"keyword": "x"}])
        with pytest.raises(EvaluationError, match=r"build_description(.|\n)*TypeError: .*unexpected keyword argument"):
            try_checkers(odd, "document 2")
    brittle = "def count(text): return len(text.split()) if 'eight' not in text else 1 / 0"
    with registered(read_checkers([write(tmp_path / "b", words=brittle)])):
        doc = document("count:range", kwargs=[RANGE])
        try_checkers(doc, "document 1")  # another reply may well be judged
        assert judge_named(doc, ["two words"])["prompt_level_strict_acc"] is True
        with pytest.raises(
            EvaluationError, match=r"a checker fails(.|\n)*ZeroDivisionError(.|\n)*replies are kept beside"
        ):
            judge_named(doc, ["eight"])
