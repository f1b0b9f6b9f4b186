"""What is looked for, as rows that an index can be asked with."""

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from csalign.adapters.model import Adapter
from csalign.core.devices import pick_device
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, CsalignError, DataError, EncoderError, ShapeError
from csalign.encoders.base import Embedded, EncoderOptions, ImageEncoder, TextEncoder
from csalign.encoders.spec import is_trusted, load_encoders
from csalign.features.manifest import EncoderInfo
from csalign.features.tokens import pad_tokens
from csalign.search.build import PROBES_FILE
from csalign.search.config import SearchConfig
from csalign.search.manifest import IndexManifest
from csalign.sources.images import read_image
from csalign.sources.records.files import read_lines

STDIN = "-"
QUERIES_AT_A_TIME = 256
SAME = 0.98  # cosine of a caption's embeddings by what is taken for the same encoder

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]


class Queries(NamedTuple):
    """Some queries: how they are called, and their unit rows (q, d) in the shared space."""

    names: Sequence[str]
    rows: Floats


@dataclass(frozen=True)
class Asker:
    """Makes queries of what the command line gives.

    Attributes:
        config: of the search.
        manifest: of the index.
        adapter: of the index, None where it has none.
    """

    config: SearchConfig
    manifest: IndexManifest
    adapter: Adapter | None

    @cached_property
    def side(self) -> Modality:
        """What the queries are.

        Raises:
            ConfigError: there is not exactly one kind of query.
        """
        given = {
            "--text": self.config.text,
            "--image": self.config.image,
            "--embedding": self.config.embedding,
        }
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            raise ConfigError(
                f"{' and '.join(names) or 'nothing to look for'}: give one of --text, --image and "
                "--embedding; --text - reads many from stdin"
            )
        if self.config.query_side is not None and names != ["--embedding"]:
            raise ConfigError("--query-side is for --embedding alone")
        if names == ["--embedding"]:
            other = Modality.TEXT if self.manifest.side is Modality.IMAGE else Modality.IMAGE
            return other if self.config.query_side is None else Modality(self.config.query_side)
        return Modality.TEXT if names == ["--text"] else Modality.IMAGE

    def queries(self) -> Iterator[Queries]:
        """All queries, some at a time.

        Raises:
            ConfigError: the encoder's name has no form that is known.
            DataError: a query cannot be used; it is named.
            EncoderError: the encoder cannot be had, or is not that of the index.
            ShapeError: an embedding has another width than those of the index.
        """
        if self.config.embedding is not None:
            yield from self._of_array(self.config.embedding)
        elif self.side is Modality.TEXT:
            for part in _parts(self._lines(self.config.text)):
                yield self._made(part, self.texts.embed(part))
        else:
            for part in _parts(self._lines(self.config.image)):
                pixels = torch.stack([self.images.preprocess(_picture(path)) for path in part])
                groups = torch.split(pixels, self.images.batch_size)
                yield self._made(part, _joined([self.images.embed(group) for group in groups]))

    @cached_property
    def texts(self) -> TextEncoder:
        """The encoder of texts, known to be that of the index."""
        encoder: TextEncoder = self._load(Modality.TEXT)
        self._check(encoder.info, encoder)
        return encoder

    @cached_property
    def images(self) -> ImageEncoder:
        """The encoder of images, likewise."""
        encoder: ImageEncoder = self._load(Modality.IMAGE)
        self._check(encoder.info, None)
        return encoder

    def _load(self, side: Modality) -> Any:
        known = self._known(side)
        spec = self.config.encoder or known.spec
        try:
            if self.config.encoder is None and not is_trusted(spec):
                raise ConfigError("it is no encoder of open_clip, timm or hf by itself")
            with_tokens = self._with_tokens(side)
            options = EncoderOptions(
                pick_device(self.config.device),
                tokens=(side,) if with_tokens else (),
                token_space=known.token_space or "projected",
                max_tokens=known.preprocessing.get("max_tokens") if with_tokens else None,
            )
            if side is Modality.IMAGE:
                return load_encoders(spec, None, options).image
            return load_encoders(None, spec, options).text
        except CsalignError as error:
            if self.config.encoder is not None:
                raise
            raise EncoderError(
                f"{self.config.index}: its {side.plural} were embedded by {spec!r}, which cannot "
                f"be run here ({error}); name the encoder by --encoder, or give the query's own "
                "embedding by --embedding FILE.npy"
            ) from error

    def _known(self, side: Modality) -> EncoderInfo:
        known = self.manifest.encoders[side]
        if known is None:
            raise DataError(
                f"{self.config.index}: was built of features without {side.plural}, so it cannot "
                f"be asked by one; ask by {'text' if side is Modality.IMAGE else 'image'}"
            )
        return known

    def _with_tokens(self, side: Modality) -> bool:
        return self.adapter is not None and self.adapter.side(side).embeds_with_tokens

    def _check(self, found: EncoderInfo, texts: TextEncoder | None) -> None:
        """Raise EncoderError unless an encoder is that of the index."""
        known = self._known(Modality.IMAGE if texts is None else Modality.TEXT)
        if found.width != known.width:
            raise EncoderError(
                f"{found.spec}: gives embeddings {found.width} wide, those of {self.config.index} "
                f"are {known.width} wide; name their encoder by --encoder ({known.spec})"
            )
        if known.fingerprint is not None and found.fingerprint is not None:
            if found.fingerprint != known.fingerprint:
                raise EncoderError(
                    f"{found.spec}: has other weights (fingerprint {found.fingerprint[:12]}) than "
                    f"what embedded the features ({known.fingerprint[:12]}); name their encoder by "
                    "--encoder, or extract them again"
                )
        elif texts is not None and self.manifest.probes:
            self._check_probes(found.spec, texts)
        else:
            log.warning(
                "%s: the features record no fingerprint of their encoder, so it is taken on trust "
                "that this is it",
                found.spec,
            )

    def _check_probes(self, spec: str, texts: TextEncoder) -> None:
        stored = np.load(self.config.index / PROBES_FILE, allow_pickle=False)
        found = _unit(texts.embed(self.manifest.probes).embeddings)
        cosines = (_unit(stored) * found).sum(axis=1)
        worst = int(cosines.argmin())
        if not cosines[worst] >= SAME:
            raise EncoderError(
                f"{spec}: is not what embedded the features: its embedding of "
                f"{self.manifest.probes[worst]!r:.80} has cosine {cosines[worst]:.3f} with the "
                "stored one; name their encoder by --encoder"
            )

    def _lines(self, given: str | None) -> Iterator[str]:
        assert given is not None
        if given != STDIN:
            if not given.strip():
                raise DataError("the query is empty; say what to look for")
            yield given
            return
        for line in read_lines(Path("stdin"), sys.stdin.buffer, refuse_nul=True):
            if line.error is not None:
                raise DataError(f"stdin, row {line.number}: {line.error}")
            if line.text.strip():
                yield line.text.strip()

    def _made(self, names: Sequence[str], embedded: Embedded) -> Queries:
        rows = embedded.embeddings
        if self.adapter is None:
            return Queries(names, _unit(rows))
        if not self._with_tokens(self.side):
            return Queries(names, self.adapter.embed(self.side, rows))
        assert embedded.tokens is not None
        padded = pad_tokens(embedded.tokens)
        return Queries(names, self.adapter.embed_tokens(self.side, rows, *padded)[0])

    def _of_array(self, path: Path) -> Iterator[Queries]:
        if self._with_tokens(self.side):
            raise ConfigError(
                "--embedding: this index's adapter embeds with tokens, which an embedding has not; "
                f"ask by --{self.side}"
            )
        rows = _read_array(path)
        width = self._known(self.side).width
        if rows.shape[1] != width:
            raise ShapeError(
                f"{path}: is {rows.shape[1]} wide, the {self.side} embeddings of "
                f"{self.config.index} are {width} wide; embed by their encoder, or name the side "
                "by --query-side"
            )
        for start in range(0, len(rows), QUERIES_AT_A_TIME):
            part = np.asarray(rows[start : start + QUERIES_AT_A_TIME], np.float32)
            norms = np.linalg.norm(part, axis=1)
            bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
            if len(bad):
                raise DataError(
                    f"{path}, row {start + int(bad[0])}: is 0 or not finite, and so has no "
                    "direction; leave it out"
                )
            names = [str(start + row) for row in range(len(part))]
            yield self._made(names, Embedded(part, None))


def _parts(lines: Iterator[str]) -> Iterator[list[str]]:
    while part := list(islice(lines, QUERIES_AT_A_TIME)):
        yield part


def _picture(path: str) -> Any:
    try:
        return read_image(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (DataError, ValueError) as error:
        raise DataError(f"{path}: {error}; give another image") from None


def _read_array(path: Path) -> npt.NDArray[Any]:
    """Rows (n, d) of a .npy file, mapped where it is local."""
    try:
        if isinstance(path, Path):
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            with path.open("rb") as file:
                rows = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path}: cannot be read as .npy ({error}); save it by numpy.save"
        ) from None
    if not isinstance(rows, np.ndarray) or not np.issubdtype(rows.dtype, np.floating):
        raise DataError(f"{path}: holds no array of floats; save it by numpy.save")
    found: npt.NDArray[Any] = rows[None] if rows.ndim == 1 else rows
    if found.ndim != 2 or not found.shape[0]:
        raise ShapeError(f"{path}: has shape {rows.shape}; give (d,) or (n, d)")
    return found


def _joined(parts: Sequence[Embedded]) -> Embedded:
    tokens = [own for part in parts for own in part.tokens or ()]
    return Embedded(np.concatenate([part.embeddings for part in parts]), tokens or None)


def _unit(rows: npt.NDArray[Any]) -> Floats:
    wide = rows.astype(np.float32)
    unit: Floats = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return unit
