"""Kinds of adapters by name, and the adapter of both sides."""

import importlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize

from csalign.adapters.builtin import (
    Glu,
    Identity,
    Kernel,
    Linear,
    LowRank,
    Mapped,
    Mlp,
    Parts,
    Transformer,
)
from csalign.adapters.canonical import ClosedForm
from csalign.adapters.kinds import GROUP, check_kind
from csalign.adapters.side import SideAdapter, SideShape, to_tensor
from csalign.core.arrays import Array, Mask
from csalign.core.atomic import translate_os_errors
from csalign.core.enums import AnySide, Modality, side_of
from csalign.core.errors import ConfigError, CsalignError, DataError, ShapeError, reason_of
from csalign.features.arrays import as_rows

if TYPE_CHECKING:
    from csalign.adapters.checkpoint import AdapterInfo

DEFAULT_WIDTH = 256  # of the shared space, unless something else decides

KINDS: Final[dict[str, type[SideAdapter]]] = {
    "linear": Linear,
    "mlp": Mlp,
    "glu": Glu,
    "low-rank": LowRank,
    "identity": Identity,
    "transformer": Transformer,
}


def is_builtin(shape: SideShape) -> bool:
    """Return whether csalign itself has the code of an adapter, of all of its parts if it has any.

    "kernel", "parts" and "mapped" are fitted or put together, and no kinds to train.
    """
    return shape.kind in {*KINDS, "kernel", "parts", "mapped"} and all(map(is_builtin, shape.parts))


def find_kind(kind: str, *, allow: Collection[str] = ()) -> type[SideAdapter]:
    """Find the class of a kind.

    Installed entry points are found by name. Any other module is imported, which runs its code,
    only if the caller allows exactly that kind: a run folder from a stranger names kinds too.

    Raises:
        ConfigError: no such kind, it is not allowed, or it is not a `SideAdapter`.
    """
    if kind in KINDS:
        return KINDS[kind]
    module, _, name = kind.partition(":")
    entry = next(iter(entry_points(group=GROUP, name=kind)), None)
    if entry is None:
        check_kind(kind)
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
        ConfigError: no such kind, or a custom one does not keep to the interface.
        ShapeError: the kind does not support that shape.
    """
    if shape.kind == "parts":
        return Parts(shape, [build_side(part, allow=allow) for part in shape.parts])
    if shape.kind == "mapped":
        return Mapped(shape, build_side(shape.parts[0], allow=allow))
    if shape.kind == "kernel":
        return Kernel(shape)
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

    Raises:
        ConfigError: no such kind, or neither side has anything to learn.
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
    """Raise any exception of third-party code as a ConfigError of one line."""
    try:
        yield
    except CsalignError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise ConfigError(f"{kind}: failed to {action} ({reason})") from error


def _module_name(side: str) -> str:
    """Name the module of a side, apart from what a module has itself, such as "train"."""
    return str(side) if side in [*Modality] else f"side:{side}"


class Adapter(nn.Module):
    """Adapters of two sides or more; `fit` and `load_adapter` return one.

    Args:
        shapes: of each side by name, with one shared width.
        allow: kinds ``package.module:Class`` that may be imported; see `find_kind`.

    Attributes:
        info: the content of ``adapter.json``, of one that was loaded or fitted; else None.

    Raises:
        ConfigError: no such kind, or it may not be imported.
        ShapeError: a kind does not support its shape, or the widths of the sides differ.

    >>> import csalign, numpy
    >>> images, texts = numpy.random.default_rng(0).normal(size=(2, 30, 4))
    >>> adapter = csalign.fit(images, texts, steps=2)
    >>> bool((adapter.embed_images(images) == adapter.embed("image", images)).all())
    True
    """

    info: "AdapterInfo | None" = None

    image: SideAdapter
    text: SideAdapter

    def __init__(self, shapes: Mapping[Any, SideShape], *, allow: Collection[str] = ()) -> None:
        super().__init__()
        first, *others = shapes.items()
        for side, shape in others:
            if shape.width != first[1].width:
                raise ShapeError(
                    f"the {first[0]} side maps to width {first[1].width}, the {side} side to "
                    f"{shape.width}; give both one width"
                )
        self._hold({side: build_side(shape, allow=allow) for side, shape in shapes.items()})

    @classmethod
    def of_sides(cls, sides: Mapping[Any, SideAdapter]) -> "Adapter":
        """Make an adapter of sides of one width, in evaluation mode."""
        adapter = cls.__new__(cls)
        nn.Module.__init__(adapter)
        adapter._hold(sides)
        return adapter.eval()

    def _hold(self, sides: Mapping[str, SideAdapter]) -> None:
        self.names: tuple[AnySide, ...] = tuple(map(side_of, sides))
        for side, own in sides.items():
            self.add_module(_module_name(side_of(side)), own)

    @property
    def shapes(self) -> dict[AnySide, SideShape]:
        """The shapes of all sides, from which an equal adapter can be built."""
        return {side: self.side(side).shape for side in self.names}

    @property
    def shares(self) -> list[float]:
        """Shares of the parts in cosines, which sum to 1; [1.0] without parts."""
        first = self.side(self.names[0])
        return first.shares.tolist() if isinstance(first, Parts) else [1.0]

    def side(self, name: str) -> SideAdapter:
        """Return the adapter of one side, such as "image"; ConfigError if there is none."""
        if name not in self.names:
            if {*self.names} == {*Modality}:
                name = Modality.of(name)
            elif (found := side_of(name)) in self.names:
                name = found
            else:
                raise ConfigError(f"{name!r} is not a side; use {' or '.join(self.names)}")
        side: SideAdapter = self.get_submodule(_module_name(name))  # type: ignore[assignment]
        return side

    def start_from(self, form: ClosedForm) -> None:
        """Make both sides compute a closed form.

        Raises:
            ValueError: the kind of a side cannot compute that map.
        """
        self.image.start_from(form.image_mean, form.image_weight, form.image_bias)
        self.text.start_from(form.text_mean, form.text_weight, form.text_bias)

    def parameter_counts(self) -> dict[str, int]:
        """Count the parameters of each side, trained or fitted; 0 for a frozen one."""
        return {
            str(side): sum(p.numel() for p in self.side(side).parameters()) for side in self.names
        }

    @torch.inference_mode()
    def embed(self, modality: str, embeddings: Any, *, batch_size: int = 8_192) -> Array:
        """Align the embeddings of one side.

        Args:
            modality: which side they come from, such as "image" or "text".
            embeddings: (n, input_width), any float dtype, finite, no row of norm 0: a NumPy array,
                a torch tensor, or lists of lists.
            batch_size: rows per forward pass.

        Returns:
            (n, width) float32, unit rows.

        Raises:
            ConfigError: no such side.
            ShapeError: the width is not the one that the adapter was trained on.
            DataError: a row has no direction: it is 0 or not finite.
        """
        name = f"{side_of(modality)} embeddings"
        embeddings = as_rows(embeddings, name)
        side = self._side_for(modality, embeddings)
        self.eval()
        out = np.empty((len(embeddings), side.shape.width), np.float32)
        for start in range(0, len(embeddings), batch_size):
            rows = to_tensor(embeddings[start : start + batch_size], side.mean.device)
            norms, own = rows.norm(dim=1), normalize(side(rows), dim=1)
            out[start : start + batch_size] = own.cpu().numpy()
            _check_directions(norms.cpu().numpy(), name, start)
        return out

    def embed_images(self, embeddings: Any, *, batch_size: int = 8_192) -> Array:
        """Align the embeddings of images: (n, d) -> unit rows (n, width) float32; see `embed`."""
        return self.embed(Modality.IMAGE, embeddings, batch_size=batch_size)

    def embed_texts(self, embeddings: Any, *, batch_size: int = 8_192) -> Array:
        """Align the embeddings of texts: (n, d) -> unit rows (n, width) float32; see `embed`."""
        return self.embed(Modality.TEXT, embeddings, batch_size=batch_size)

    def save(self, folder: Path | str) -> None:
        """Write the weights and the description into a folder that `load_adapter` reads.

        Args:
            folder: is made if it does not exist; files of the same names in it are replaced.

        Raises:
            OutputError: it cannot be written.
        """
        from csalign.adapters.checkpoint import save_adapter, unknown_info

        path = Path(folder)
        with translate_os_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        save_adapter(path, self, self.info or unknown_info(self.shapes))

    @torch.inference_mode()
    def embed_tokens(
        self, modality: str, embeddings: Array, tokens: Array, mask: Mask
    ) -> tuple[Array, Array]:
        """Align the embeddings and tokens of one batch of a side.

        Args:
            modality: which side they come from.
            embeddings: (n, input_width), any float dtype, finite, no row of norm 0.
            tokens: (n, t, token_width), likewise where `mask` is true; anything elsewhere.
            mask: (n, t), true where there is a token.

        Returns:
            (n, width) and (n, t, width) float32: unit rows, 0 where there is no token.

        Raises:
            ShapeError: a width differs from training, or the shapes do not fit together.
        """
        side = self._side_for(modality, embeddings)
        takes = side.shape.token_width
        if tokens.shape != (len(embeddings), *tokens.shape[1:2], takes) or (
            mask.shape != tokens.shape[:2]
        ):
            raise ShapeError(
                f"{modality}: {len(embeddings)} embeddings, tokens of shape {tokens.shape} and a "
                f"mask of shape {mask.shape} do not fit together; the adapter takes tokens of "
                f"width {takes}"
            )
        self.eval()
        device = side.mean.device
        aligned = side.forward_tokens(
            to_tensor(embeddings, device),
            to_tensor(tokens, device),
            torch.from_numpy(np.array(mask)).to(device),
        )
        rows, own = (normalize(part, dim=-1).cpu().numpy() for part in aligned)
        return rows, own

    def _side_for(self, modality: str, embeddings: Array) -> SideAdapter:
        side = self.side(modality)
        if embeddings.ndim != 2 or embeddings.shape[1] != side.shape.input_width:
            raise ShapeError(
                f"{modality} embeddings have shape {embeddings.shape}, the adapter takes width "
                f"{side.shape.input_width}; use the encoder that it was trained on"
            )
        return side


def _check_directions(norms: Array, name: str, start: int) -> None:
    """Raise DataError if a norm (n,) is 0 or not finite; rows are numbered from `start`."""
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if len(bad):
        reason = "has norm 0" if norms[bad[0]] == 0 else "is not finite"
        raise DataError(f"{name}, row {start + bad[0]}: {reason}; encode it again or omit it")
