"""Find kinds of adapters by name: built-in, installed, or ``package.module:Class``."""

import importlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Final

import torch

from csalign.adapters.builtin import Glu, Identity, Linear, LowRank, Mlp, Transformer
from csalign.adapters.side import SideAdapter, SideShape
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, CsalignError, ShapeError

GROUP = "csalign.adapters"  # of entry points, whose names are kinds
DEFAULT_WIDTH = 256  # of the shared space, unless something else decides

KINDS: Final[dict[str, type[SideAdapter]]] = {
    "linear": Linear,
    "mlp": Mlp,
    "glu": Glu,
    "low-rank": LowRank,
    "identity": Identity,
    "transformer": Transformer,
}


def find_kind(kind: str, *, allow: Collection[str] = ()) -> type[SideAdapter]:
    """Find the class of a kind.

    Installed entry points are found by name. Any other module is imported, which runs its code,
    only if the caller allows exactly that kind: a run folder from a stranger names kinds too.

    Args:
        kind: see `SideShape`.
        allow: kinds ``package.module:Class`` that the user asked for.

    Raises:
        ConfigError: there is no such kind, it is not allowed, or it is not a `SideAdapter`.
    """
    if kind in KINDS:
        return KINDS[kind]
    module, colon, name = kind.partition(":")
    entry = next(iter(entry_points(group=GROUP, name=kind)), None)
    if entry is None:
        if not colon or not all(part.isidentifier() for part in (*module.split("."), name)):
            raise ConfigError(
                f"{kind}: no such kind of adapter; there are {', '.join(KINDS)}, those of "
                "installed packages, and PACKAGE.MODULE:CLASS"
            )
        if kind not in allow:
            raise ConfigError(
                f"{kind}: is code from outside csalign, which runs when it is loaded; allow this "
                "kind by its name if you trust it"
            )
    with _translate_errors(kind, "import"):
        found = entry.load() if entry else getattr(importlib.import_module(module), name)
    if not (isinstance(found, type) and issubclass(found, SideAdapter)):
        raise ConfigError(f"{kind}: is {found!r}, not a subclass of csalign's SideAdapter")
    return found


def build_side(shape: SideShape, *, allow: Collection[str] = ()) -> SideAdapter:
    """Build the adapter of one side, with random or zero weights; `allow` as in `find_kind`.

    Raises:
        ConfigError: there is no such kind, or a custom one does not keep to the interface.
        ShapeError: the kind does not support that shape.
    """
    kind = find_kind(shape.kind, allow=allow)
    if shape.kind in KINDS:
        return kind(shape)
    with _translate_errors(shape.kind, "build"):
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
    """Choose the width of the space that two kinds share.

    A kind that keeps its encoder's width decides; otherwise the given width, or else 256 or the
    width of the narrower encoder, whichever is smaller.

    Args:
        kinds: of both sides.
        widths: of the embeddings of both sides.
        asked: the width that the user gave, if any.
        allow: as in `find_kind`.

    Raises:
        ConfigError: there is no such kind, or neither side has anything to learn.
        ShapeError: the sides, or one of them and the given width, contradict each other.
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
            f"of {asked} is asked for; omit the width, or give the {fixed[0]} side a kind that "
            "maps, such as linear or mlp"
        )
    return width


@contextmanager
def _translate_errors(kind: str, action: str) -> Iterator[None]:
    """Turn any exception of third-party code into a ConfigError of one line."""
    try:
        yield
    except CsalignError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{kind}: failed to {action} ({type(error).__name__}: {reason})"
        ) from error
