"""How a step tells how far it is, without knowing who listens."""

from collections.abc import Callable

Progress = Callable[[str, int, int | None], None]
"""``progress(what, done, total)``: `what` names the work and its unit ("images"), `done` counts
from 0, `total` is None while unknown. Called often; must return quickly."""


def silent(what: str, done: int, total: int | None) -> None:
    """Report nothing, as a library should when nobody asked."""
