"""The version of csalign."""

from importlib.metadata import version

__version__ = version("csalign")
