"""The type checker behind jaxtyping's import hook: beartype, with an int where a float is asked for being fine.

A function inside another is made anew whenever the outer one runs, and preparing its checks took a third of a score's
time: it is checked only if its signature names a shape.
"""

from collections.abc import Callable
from typing import Any, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    inner = "<locals>" in function.__qualname__
    return _check(function) if not inner or any(map(names_shape, function.__annotations__.values())) else function


def names_shape(hint: Any) -> bool:
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(names_shape, get_args(hint)))
