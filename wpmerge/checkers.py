"""Checkers of instructions that IFEval does not have, from Python files that the user names: IFBench's, or one's own.

They join lm-eval's registry for one evaluation. Its ifeval task drops arguments that are 0, false or empty, where
IFBench drops null alone; here they reach the checker as they stand.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from wpmerge.errors import EvaluationError, reason_of
from wpmerge.ifeval import ifeval_checkers

REGISTRY = "INSTRUCTION_DICT"
"""What a file of checkers defines: instruction id to checker class."""

_METHODS = ("build_description", "get_instruction_args", "check_following")
_SENTENCE = "This is a plain sentence of eight words."
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkers:
    """The checkers of one file.

    Attributes:
        file: the Python file.
        files: the Python files of its folder, itself among them, and of packages there, to SHA-256 of their bytes.
        classes: instruction id to checker class, without those that IFEval has itself.
    """

    file: Path
    files: Mapping[str, str]
    classes: Mapping[str, type]

    @property
    def modules(self) -> set[str]:
        """Names of the modules and packages beside the file."""
        return {Path(name).parts[0].removesuffix(".py") for name in self.files} - {self.file.stem}

    def fingerprint(self) -> dict[str, Any]:
        """What tells these checkers from others, as JSON."""
        return {"file": self.file.name, "files": dict(self.files)}


@dataclass(frozen=True, slots=True)
class _Given:
    """An argument that lm-eval would drop."""

    value: Any


@dataclass(frozen=True, slots=True)
class _Named:
    """A checker class of the user's as lm-eval's registry holds it."""

    kind: type
    where: str

    def __call__(self, instruction: str) -> _Checker:
        return _Checker(self, instruction)


class _Checker:
    """A checker of the user's that takes arguments as :func:`judge_named` hands them over, and is named if it fails."""

    def __init__(self, named: _Named, instruction: str) -> None:
        self._where = named.where
        self._own = self._ask("__init__", lambda: named.kind(instruction))

    def build_description(self, **given: Any) -> None:
        plain = {name: each.value if isinstance(each, _Given) else each for name, each in given.items()}
        self._ask("build_description", lambda: self._own.build_description(**plain))

    def get_instruction_args(self) -> dict[str, Any]:
        return self._ask("get_instruction_args", lambda: dict(self._own.get_instruction_args() or {}))

    def check_following(self, value: str) -> bool:
        return self._ask("check_following", lambda: bool(self._own.check_following(value)))

    def _ask(self, method: str, call: Callable[[], _T]) -> _T:
        try:
            with redirect_stdout(sys.stderr):
                return call()
        except (Exception, SystemExit) as error:
            raise EvaluationError(
                "a checker fails",
                where=f"{self._where}, {method}",
                got=reason_of(error),
                expected="true or false of any reply, and the arguments that the documents give",
                mend="mend it, or install what it needs; finished replies are kept beside the output",
            ) from error


def read_checkers(files: Sequence[Path]) -> tuple[Checkers, ...]:
    """Import files of checkers: this runs their code. What they print goes to stderr.

    Raises:
        EvaluationError: no such file, it cannot be imported or defines no checkers; an instruction id has another
            checker already; modules beside two files have one name.
    """
    if not files:
        return ()
    registry = _registry()
    known = dict(registry)
    found: list[Checkers] = []
    for file in files:
        try:
            checkers = _read(file)
        finally:  # a file may add to lm-eval's registry itself
            registry.clear()
            registry.update(known)
        own = {each: checker for each, checker in checkers.classes.items() if known.get(each) is not checker}
        if taken := [each for each in own if each in known or any(each in other.classes for other in found)]:
            raise EvaluationError(
                "an instruction has a checker already",
                where=file,
                got=taken[0],
                expected="ids that neither IFEval nor another file of checkers has",
                mend=f"take it out of the file's {REGISTRY}, or rename it there and in the documents",
            )
        for other in found:
            same = sorted(other.modules & checkers.modules)
            if same and other.file.parent != checkers.file.parent:
                raise EvaluationError(
                    "modules beside two files of checkers have one name",
                    where=f"{other.file.parent} and {checkers.file.parent}",
                    got=same[0],
                    mend="rename one of them, or evaluate with one file at a time",
                )
        found.append(replace(checkers, classes=own))
    return tuple(found)


@contextmanager
def registered(checkers: Sequence[Checkers]) -> Iterator[None]:
    """The checkers in lm-eval's registry of IFEval's, and their folders where modules are looked for; gone afterwards.

    Raises:
        EvaluationError: another evaluation of this process holds them.
    """
    if not checkers:
        yield
        return
    registry = _registry()
    named = {id_: _Named(kind, f"{each.file}: {id_}") for each in checkers for id_, kind in each.classes.items()}
    if held := sorted(registry.keys() & named.keys()):
        raise EvaluationError("another evaluation of this process has a checker of this id", got=held[0])
    registry.update(named)
    try:
        with _looked_for_in([each.file.parent for each in checkers]):
            yield
    finally:
        for instruction in named:
            registry.pop(instruction, None)


def is_named(instruction: str) -> bool:
    """Whether an instruction's checker comes from a file that the user named."""
    return isinstance(ifeval_checkers().get(instruction), _Named)


def judge_named(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """lm-eval's own judgement of a response to an IFEval document, for instructions of which some are the user's.

    Args:
        doc: its ``kwargs`` as JSON, since a table of documents would make one type of all.
        results: the response.

    Raises:
        EvaluationError: a checker fails.
    """
    pairs = zip(doc["instruction_id_list"], json.loads(doc["kwargs"]), strict=True)
    kwargs = [_arguments(each) if is_named(name) else each for name, each in pairs]
    judge = importlib.import_module("lm_eval.tasks.ifeval.utils").process_results
    judged: dict[str, Any] = judge({**doc, "kwargs": kwargs}, results)
    return judged


def try_checkers(document: Mapping[str, Any], where: str) -> None:
    """Let a document's checkers judge two replies, an empty one and a sentence, before any model is run.

    Raises:
        EvaluationError: a checker does not take the document's arguments, or lacks a package or a file. That it fails
            on the sentence for another reason says nothing of other replies.
    """
    for reply in ("", _SENTENCE):  # at the first the checkers are made ready, and not asked
        try:
            judge_named(document, [reply])
        except EvaluationError as error:
            cause = error.__cause__
            if not reply or isinstance(cause, ImportError | OSError) or type(cause) is LookupError:  # the last: nltk's
                raise EvaluationError(
                    error.what, where=f"{where}; {error.where}", got=error.got, expected=error.expected, mend=error.mend
                ) from error


def _registry() -> dict[str, Any]:
    ifeval_checkers()
    registry: dict[str, Any] = importlib.import_module("lm_eval.tasks.ifeval.instructions_registry").INSTRUCTION_DICT
    return registry


def _read(file: Path) -> Checkers:
    if not file.is_file():
        raise EvaluationError("a file of checkers is no file", where=file, mend="check the path given with --checkers")
    file = file.resolve()
    name = f"_wpmerge_checkers_{hashlib.sha256(bytes(file)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_loader(name, importlib.machinery.SourceFileLoader(name, str(file)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _looked_for_in([file.parent]):
        sys.modules[name] = module  # what a dataclass asks for
        try:
            with redirect_stdout(sys.stderr):
                spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise EvaluationError(
                "a file of checkers cannot be imported",
                where=file,
                got=reason_of(error),
                expected=f"Python that defines {REGISTRY}",
                mend="mend the file, or install what it imports beside wpmerge",
            ) from error
    return Checkers(file=file, files=_files(file), classes=_classes(getattr(module, REGISTRY, None), file))


def _classes(found: Any, file: Path) -> dict[str, type]:
    """A file's checkers, or what is wrong with them."""
    wrong = None
    if not isinstance(found, Mapping) or not found:
        wrong = f"no {REGISTRY}" if found is None else f"{REGISTRY} is {'empty' if not found else type(found).__name__}"
    else:
        for name, kind in found.items():
            if not isinstance(name, str) or not isinstance(kind, type):
                wrong = f"an entry from {type(name).__name__} to {type(kind).__name__}"
            elif lacking := [each for each in _METHODS if not callable(getattr(kind, each, None))]:
                wrong = f"{name!r}: {kind.__name__} without {', '.join(lacking)}"
            if wrong:
                break
    if wrong:
        expected = f"{REGISTRY} = {{instruction id: checker class}}, the class with {', '.join(_METHODS)}"
        raise EvaluationError("a file defines no checkers", where=file, got=wrong, expected=expected)
    return dict(found)


@contextmanager
def _looked_for_in(folders: Sequence[Path]) -> Iterator[None]:
    """Modules of these folders before all others, as when a file in them is run; forgotten afterwards, so that they are
    read anew when they have changed."""
    names = {each.stem for folder in folders for each in folder.glob("*.py")}
    aside = {name: sys.modules.pop(name) for name in names & set(sys.modules)}
    places = [str(folder) for folder in folders]
    sys.path[:0] = places
    importlib.invalidate_caches()
    before = set(sys.modules)
    try:
        yield
    finally:
        for place in places:
            if place in sys.path:  # what was imported may have changed it
                sys.path.remove(place)
        for name in set(sys.modules) - before:
            if _lies_in(sys.modules[name], folders):
                del sys.modules[name]
        sys.modules.update(aside)


def _lies_in(module: object, folders: Sequence[Path]) -> bool:
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(isinstance(each, str) and Path(each).is_relative_to(folder) for each in places for folder in folders)


def _files(file: Path) -> dict[str, str]:
    """The Python files of a file's folder and of packages there, relative to it, and SHA-256 of each."""
    folder = file.parent
    packages = [each.parent for each in folder.glob("*/__init__.py")]
    paths = {file, *folder.glob("*.py"), *(path for package in packages for path in package.rglob("*.py"))}
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def _arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """A document's arguments of one instruction, so that lm-eval drops null alone."""
    return {name: value if value or value is None else _Given(value) for name, value in given.items()}
