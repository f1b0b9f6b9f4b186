"""Kinds of adapters by name: csalign's own, installed ones, and ``package.module:Class``."""

import importlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any, Final

import torch

from csalign.adapters.linear import Glu, Linear, Mlp
from csalign.adapters.low_rank import Identity, LowRank
from csalign.adapters.side import SideAdapter, SideShape
from csalign.adapters.transformer import Transformer
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, CsalignError, ShapeError

GROUP = "csalign.adapters"
"""Entry point group whose names are kinds."""

KINDS: Final[dict[str, type[SideAdapter]]] = {
    "linear": Linear,
    "mlp": Mlp,
    "glu": Glu,
    "low-rank": LowRank,
    "identity": Identity,
    "transformer": Transformer,
}

DEFAULT_WIDTH = 256  # of the shared space, where nothing asks for more


def find_kind(kind: str, *, allow: Collection[str] = ()) -> type[SideAdapter]:
    """The class of a kind.

    What is installed under an entry point may be used by name. Any other module is imported, which
    runs its code, only if the caller allows exactly that kind: a run folder that somebody sent
    names kinds too.

    Args:
        kind: see `SideShape`.
        allow: kinds ``package.module:Class`` that the user asked for.

    Raises:
        ConfigError: there is no such kind, it is not allowed, or is no `SideAdapter`.
    """
    if kind in KINDS:
        return KINDS[kind]
    found: Any
    for entry in entry_points(group=GROUP, name=kind):
        with _told(kind, "import"):
            found = entry.load()
        break
    else:
        found = _import_class(kind, allow)
    if not (isinstance(found, type) and issubclass(found, SideAdapter)):
        raise ConfigError(f"{kind}: is {found!r}, not a subclass of csalign's SideAdapter")
    return found


def _import_class(kind: str, allow: Collection[str]) -> Any:
    module, colon, name = kind.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), name)):
        raise ConfigError(
            f"{kind}: no such kind of adapter; there are {', '.join(KINDS)}, those of installed "
            "packages, and PACKAGE.MODULE:CLASS"
        )
    if kind not in allow:
        raise ConfigError(
            f"{kind}: is code from outside csalign, which runs when it is loaded; allow this kind "
            "by its name if you trust it"
        )
    with _told(kind, "import"):
        return getattr(importlib.import_module(module), name)


def build_side(shape: SideShape, *, allow: Collection[str] = ()) -> SideAdapter:
    """Build one side's adapter, its weights random or 0.

    Args:
        shape: what to build.
        allow: as in `find_kind`.

    Raises:
        ConfigError: there is no such kind, or somebody's own does not keep to the interface.
        ShapeError: the kind cannot be of that shape.
    """
    kind = find_kind(shape.kind, allow=allow)
    if shape.kind in KINDS:
        return kind(shape)
    with _told(shape.kind, "build"):
        side = kind(shape).eval()
        with torch.no_grad():
            found = side(torch.ones(2, shape.input_width)).shape
    if tuple(found) != (2, shape.width):
        raise ConfigError(
            f"{shape.kind}: gives shape {tuple(found)} for 2 embeddings, not (2, {shape.width})"
        )
    return side.train()


def shared_width(
    kinds: Mapping[Modality, str],
    widths: Mapping[Modality, int],
    asked: int | None,
    *,
    allow: Collection[str] = (),
) -> int:
    """Width of the space that two kinds can share.

    A kind that keeps its encoder's width decides; else what is asked for, else 256 or the
    narrower encoder's width, whichever is less.

    Args:
        kinds: of both sides.
        widths: of both sides' embeddings.
        asked: the user's wish, if any.
        allow: as in `find_kind`.

    Raises:
        ConfigError: there is no such kind, or neither side has anything to learn.
        ShapeError: the sides, or one and what is asked for, cannot have one width.
    """
    classes = {side: find_kind(kinds[side], allow=allow) for side in Modality}
    if all(kind is Identity for kind in classes.values()):
        raise ConfigError(
            "identity on both sides leaves nothing to train; give one side another kind"
        )
    fixed = [side for side in Modality if classes[side].keeps_width]
    if not fixed:
        return asked or min(DEFAULT_WIDTH, *widths.values())
    width = widths[fixed[0]]
    if len({widths[side] for side in fixed}) > 1:
        raise ShapeError(
            f"{' and '.join(kinds[side] for side in fixed)} keep each encoder's width, but image "
            f"embeddings are {widths[Modality.IMAGE]} wide and text embeddings "
            f"{widths[Modality.TEXT]}; give one side a kind that maps, such as linear or mlp"
        )
    if asked not in (None, width):
        raise ShapeError(
            f"{kinds[fixed[0]]} keeps the {width} of the {fixed[0]} embeddings, but a shared space "
            f"of {asked} is asked for; leave the width out, or give the {fixed[0]} side a kind "
            "that maps, such as linear or mlp"
        )
    return width


@contextmanager
def _told(kind: str, what: str) -> Iterator[None]:
    """Turn whatever other people's code raises into one line."""
    try:
        yield
    except CsalignError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{kind}: failed to {what} ({type(error).__name__}: {reason})") from error
