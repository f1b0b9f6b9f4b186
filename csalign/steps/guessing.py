"""Pairs guessed among unpaired rows: those that are each other's nearest under what is known."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from csalign.adapters.canonical import PairMoments
from csalign.adapters.model import Adapter
from csalign.adapters.neighbours import mutual_neighbours
from csalign.enums import Modality
from csalign.steps.unpaired import Unpaired

Array = npt.NDArray[Any]

MAX_ROWS = 20_000  # a side; the work grows with the product of both
SHARE = 0.3  # of the guessed pairs in the moments, however many they are


@dataclass(frozen=True)
class Guesser:
    """Unpaired rows of both sides, to find pairs among.

    Attributes:
        images: (n, d), n >= 1.
        texts: (m, e), no row twice, m >= 1.
    """

    images: Array
    texts: Array

    @classmethod
    def of(cls, unpaired: Unpaired, seed: int) -> "Guesser | None":
        """At most `MAX_ROWS` rows a side; None unless both sides have some.

        A text that many images share counts once, or its copies would compete for one partner.
        """
        rng = np.random.default_rng(seed)
        if not all(unpaired.count(side) for side in Modality):
            return None
        images = unpaired.sample(Modality.IMAGE, MAX_ROWS, rng)
        texts = unpaired.sample(Modality.TEXT, MAX_ROWS, rng)
        return cls(images, texts[distinct(texts)])

    def mixed_into(
        self, moments: PairMoments, adapter: Adapter, roots: tuple[bool, bool]
    ) -> PairMoments:
        """Moments with those of the pairs that are mutual neighbours in an adapter's space.

        Args:
            moments: of the known pairs.
            adapter: whose space.
            roots: whether the square root is taken of images and texts.
        """
        images, texts = mutual_neighbours(
            torch.from_numpy(adapter.embed(Modality.IMAGE, self.images)),
            torch.from_numpy(adapter.embed(Modality.TEXT, self.texts)),
        )
        if not len(images):
            return moments
        pairs = images.numpy(), texts.numpy()
        weights = np.ones(len(images))
        return moments.mixed(PairMoments.of(self.images, self.texts, pairs, weights, roots), SHARE)


def distinct(rows: Array) -> npt.NDArray[np.int64]:
    """Positions, ascending, of the first of each group of equal rows."""
    whole = np.ascontiguousarray(rows).view(
        np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))
    )
    return np.sort(np.unique(whole[:, 0], return_index=True)[1])
