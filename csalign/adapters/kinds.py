"""The names of the kinds of adapters, known without importing torch."""

from importlib.metadata import entry_points

from csalign.core.errors import ConfigError
from csalign.core.mistakes import did_you_mean

GROUP = "csalign.adapters"  # of the entry points of installed packages
NAMES = ("linear", "mlp", "glu", "low-rank", "identity", "transformer")
"""Kinds that csalign has itself."""


def check_kind(kind: str) -> None:
    """Raise ConfigError if a kind is neither a known name nor ``package.module:Class``."""
    if kind in NAMES or entry_points(group=GROUP, name=kind):
        return
    module, colon, name = kind.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), name)):
        raise ConfigError(
            f"{kind}: no such kind of adapter; there are {', '.join(NAMES)}, those of installed "
            f"packages, and PACKAGE.MODULE:CLASS{did_you_mean(kind, NAMES)}"
        )
