"""Checkers of instructions that IFEval does not have, from Python files that the user names: IFBench's, or one's own.

They join lm-eval's registry for one evaluation. Its ifeval task drops arguments that are 0, false or empty, where
IFBench drops null alone; here they reach the checker as they stand.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wpmerge.errors import EvaluationError
from wpmerge.ifeval import ifeval_checkers

REGISTRY = "INSTRUCTION_DICT"
"""What a file of checkers defines: instruction id to checker class."""

_METHODS = ("__init__", "build_description", "get_instruction_args", "check_following")
_MARK = "_wpmerge_named"
_SENTENCE = "This is a plain sentence of eight words."


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkers:
    """The checkers of one file.

    Attributes:
        file: the Python file.
        sha256: of its bytes, in hex.
        imports: file to SHA-256 of the modules beside it that it imported; files relative to its folder.
        classes: instruction id to checker class, without those that IFEval has itself.
    """

    file: Path
    sha256: str
    imports: Mapping[str, str]
    classes: Mapping[str, type]

    def fingerprint(self) -> dict[str, Any]:
        """What tells these checkers from others, as JSON."""
        return {"file": self.file.name, "sha256": self.sha256, "imports": dict(self.imports)}


@dataclass(frozen=True, slots=True)
class _Given:
    """An argument that lm-eval would drop."""

    value: Any


def read_checkers(files: Sequence[Path]) -> tuple[Checkers, ...]:
    """Import files of checkers: this runs their code. What they print goes to stderr.

    While a file is imported its folder is the first that modules are looked for in; its modules are forgotten
    afterwards, so that two files may each have an ``instructions`` beside them.

    Raises:
        EvaluationError: no such file, it cannot be imported or defines no checkers, or an instruction id has another
            checker already.
    """
    registry = _registry()
    known = dict(registry)
    found: list[Checkers] = []
    for file in files:
        try:
            checkers = _read(file)
        finally:  # a file may add to lm-eval's registry itself
            _put_back(registry, known)
        own = {each: checker for each, checker in checkers.classes.items() if known.get(each) is not checker}
        if taken := [each for each in own if each in known or any(each in other.classes for other in found)]:
            raise EvaluationError(
                "an instruction has a checker already",
                where=file,
                got=taken[0],
                expected="ids that neither IFEval nor another file of checkers has",
                mend=f"take it out of the file's {REGISTRY}, or rename it there and in the documents",
            )
        found.append(replace(checkers, classes=own))
    return tuple(found)


@contextmanager
def registered(checkers: Sequence[Checkers]) -> Iterator[None]:
    """The checkers in lm-eval's registry of IFEval's, and their folders the last that modules are looked for in; as
    before afterwards."""
    if not checkers:
        yield
        return
    registry, path = _registry(), list(sys.path)
    known = dict(registry)
    for each in checkers:
        registry.update({name: _guarded(kind, f"{each.file}: {name}") for name, kind in each.classes.items()})
    sys.path += [str(each.file.parent) for each in checkers]
    try:
        yield
    finally:
        _put_back(registry, known)
        sys.path[:] = path


def is_named(instruction: str) -> bool:
    """Whether an instruction's checker comes from a file that the user named."""
    return hasattr(ifeval_checkers().get(instruction), _MARK)


def judge_named(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """lm-eval's own judgement of a response to an IFEval document, for instructions of which some are the user's.

    Raises:
        EvaluationError: a checker fails.
    """
    pairs = zip(doc["instruction_id_list"], doc["kwargs"], strict=True)
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
    try:
        judge_named(document, [""])  # the checkers are made ready, and not asked
    except EvaluationError as error:
        raise _at(where, error) from error
    try:
        judge_named(document, [_SENTENCE])
    except EvaluationError as error:
        cause = error.__cause__
        if isinstance(cause, ImportError | OSError) or type(cause) is LookupError:  # the last is nltk's
            raise _at(where, error) from error


def _at(where: str, error: EvaluationError) -> EvaluationError:
    return EvaluationError(
        error.what, where=f"{where}; {error.where}", got=error.got, expected=error.expected, mend=error.mend
    )


def _registry() -> dict[str, Any]:
    ifeval_checkers()
    registry: dict[str, Any] = importlib.import_module("lm_eval.tasks.ifeval.instructions_registry").INSTRUCTION_DICT
    return registry


def _put_back(registry: dict[str, Any], known: Mapping[str, Any]) -> None:
    registry.clear()
    registry.update(known)


def _read(file: Path) -> Checkers:
    if not file.is_file():
        raise EvaluationError("a file of checkers is no file", where=file, mend="check the path given with --checkers")
    file = file.resolve()
    name = f"_wpmerge_checkers_{hashlib.sha256(bytes(file)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_loader(name, importlib.machinery.SourceFileLoader(name, str(file)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _importing_beside(file) as imports:
        sys.modules[name] = module
        try:
            with redirect_stdout(sys.stderr):
                spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise EvaluationError(
                "a file of checkers cannot be imported",
                where=file,
                got=_one_line(error),
                expected=f"Python that defines {REGISTRY}",
                mend="mend the file, or install what it imports beside wpmerge",
            ) from error
        finally:
            sys.modules.pop(name, None)
    classes = _classes(getattr(module, REGISTRY, None), file)
    return Checkers(file=file, sha256=_sha256(file), imports=imports, classes=classes)


def _classes(found: Any, file: Path) -> dict[str, type]:
    """A file's checkers, or what is wrong with them."""
    expected = f"{REGISTRY} = {{instruction id: checker class}}, the class with {', '.join(_METHODS[1:])}"
    wrong = None
    if not isinstance(found, Mapping) or not found:
        wrong = f"no {REGISTRY}" if found is None else f"{type(found).__name__} {str(found)[:60]}"
    else:
        for name, kind in found.items():
            if not isinstance(name, str) or not isinstance(kind, type):
                wrong = f"{name!r}: {kind!r}"
            elif lacking := [each for each in _METHODS if not callable(getattr(kind, each, None))]:
                wrong = f"{name!r}: {kind.__name__} without {', '.join(lacking)}"
            if wrong:
                break
    if wrong:
        raise EvaluationError("a file defines no checkers", where=file, got=wrong, expected=expected)
    return dict(found)


@contextmanager
def _importing_beside(file: Path) -> Iterator[dict[str, str]]:
    """The modules beside a file before all others, as when it is run; yields what will name those that were imported,
    with their SHA-256."""
    folder, before = file.parent, dict(sys.modules)
    names = {each.stem for each in folder.glob("*.py")}
    aside = {name: sys.modules.pop(name) for name in names & set(sys.modules)}
    packages = {name.partition(".")[0] for name in sys.modules}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    imports: dict[str, str] = {}
    try:
        yield imports
    finally:
        with suppress(ValueError):  # what was imported may have changed it
            sys.path.remove(str(folder))
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] in packages or module is before.get(name):
                continue
            if (path := _place(name, module, folder)) is not None:
                imports[str(path)] = _sha256(folder / path)
                del sys.modules[name]
        sys.modules.update(aside)


def _place(name: str, module: object, folder: Path) -> Path | None:
    """Where in a folder a module lies that was imported from there; None for any other."""
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or not Path(file).is_relative_to(folder) or not Path(file).is_file():
        return None
    path, parts = Path(file).relative_to(folder), tuple(name.split("."))
    return path if path.with_suffix("").parts in (parts, (*parts, "__init__")) else None


def _guarded(kind: type, where: str) -> type:
    """A checker class that takes arguments as :func:`judge_named` hands them over, and says which it is if it fails."""

    def guard(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            plain = {name: each.value if isinstance(each, _Given) else each for name, each in kwargs.items()}
            try:
                with redirect_stdout(sys.stderr):
                    return method(self, *args, **plain)
            except EvaluationError:
                raise
            except Exception as error:
                raise EvaluationError(
                    "a checker fails",
                    where=f"{where}, {method.__name__}",
                    got=_one_line(error),
                    expected="true or false of any reply, and the arguments that the documents give",
                    mend="mend it, or install what it needs; finished replies are kept beside the output",
                ) from error

        return call

    own = {name: guard(getattr(kind, name)) for name in _METHODS}
    return types.new_class(kind.__name__, (kind,), {}, lambda body: body.update(own | {_MARK: True}))


def _arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """A document's arguments of one instruction, so that lm-eval drops null alone."""
    return {name: value if value or value is None else _Given(value) for name, value in given.items()}


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
