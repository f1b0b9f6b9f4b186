"""The names of the kinds of adapters and of the baselines, known without importing torch."""

from importlib.metadata import entry_points
from pathlib import Path

from csalign.core.config import did_you_mean
from csalign.core.errors import ConfigError

GROUP = "csalign.adapters"  # of the entry points of installed packages
NAMES = ("linear", "mlp", "glu", "low-rank", "identity", "transformer")
"""Kinds that csalign has itself."""
BASELINES = ("mean-shift", "standardised", "closed-form")
"""Baselines that are fitted where an adapter is named; see `csalign.runs.baselines`."""


def is_baseline(run: Path | str | None) -> bool:
    """Return whether the name of a run is that of a baseline; a folder of that name comes first."""
    return str(run) in BASELINES and not Path(str(run)).exists()


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
