"""wpmerge: merge expert language models by knowing which of their modules carry which skill.

>>> import wpmerge as wp
>>> wp.WpmergeError.__name__
'WpmergeError'

The four functions and the artifacts that they hand over are loaded when they are first asked for, so that importing the
package, and ``wpmerge --help``, stay quick.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from wpmerge.errors import WpmergeError

if TYPE_CHECKING:
    from wpmerge.api import evaluate, fuse, merge, score
    from wpmerge.evaluation import Evaluation
    from wpmerge.fusing import FuseResult
    from wpmerge.plan import Plan
    from wpmerge.scores import Scores
    from wpmerge.writing import MergeSummary

__version__ = version("wpmerge")
__all__ = [
    "Evaluation",
    "FuseResult",
    "MergeSummary",
    "Plan",
    "Scores",
    "WpmergeError",
    "__version__",
    "evaluate",
    "fuse",
    "merge",
    "score",
]

_HOME = {
    "score": "api",
    "fuse": "api",
    "merge": "api",
    "evaluate": "api",
    "Scores": "scores",
    "Plan": "plan",
    "Evaluation": "evaluation",
    "FuseResult": "fusing",
    "MergeSummary": "writing",
}
"""What is loaded when it is asked for, and the module it is in."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
