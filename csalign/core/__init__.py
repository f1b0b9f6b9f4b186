"""The ground floor: errors, paths, atomic files, locks, signals, processes; knows no domain."""

from importlib.metadata import version

__version__ = version("csalign")
