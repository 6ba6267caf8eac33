"""wpmerge: merge expert language models by knowing which of their modules carry which skill."""

from importlib.metadata import version

__version__ = version("wpmerge")
