"""The ground floor: errors, paths, atomic files, locks, signals, processes; knows no domain."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("csalign")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+source"
