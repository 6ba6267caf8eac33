"""The type checker behind jaxtyping's import hook: beartype, with an int where a float is asked for being fine."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
