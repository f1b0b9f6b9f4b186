"""How a step tells how far it is, without knowing who listens."""

from collections.abc import Callable, Mapping

Progress = Callable[[str, int, int | None], None]
"""``progress(what, done, total)``: `what` names the work and its unit ("images"), `done` counts
from 0, `total` is None while unknown. Called often; must return quickly."""


def silent(what: str, done: int, total: int | None) -> None:
    """Report nothing, as a library should when nobody asked."""


def show_figures(progress: Progress, figures: Mapping[str, float]) -> None:
    """Tell the latest figures by name to whoever listens to `progress`, if they show any."""
    show = getattr(progress, "figures", None)
    if show is not None:
        show(figures)
