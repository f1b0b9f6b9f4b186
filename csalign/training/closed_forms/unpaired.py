"""CCA on pairs and on matches of unpaired rows, which each round draws under the last map."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from csalign.adapters.assignment import WIDTH, Clusters
from csalign.adapters.canonical import ClosedForm, PairMoments, mutual_neighbours
from csalign.adapters.side import CHUNK_ROWS, UnitRows
from csalign.core.arrays import Array
from csalign.core.enums import Modality
from csalign.features.join import Pairs, hash_rows
from csalign.training.closed_forms.settings import (
    POWERS,
    Candidate,
    Setting,
    best_of,
    nearby,
    ridge_at,
)
from csalign.training.data import Unpaired
from csalign.training.network.sampler import PairSampler
from csalign.training.network.validation import Measured

log = logging.getLogger(__name__)

MOST_UNPAIRED = 100_000  # per side, drawn at random; moments need no more
MOST_CLUSTERED = 20_000  # of those
BLOCK = 4_096  # rows of each side that are matched at once
BLOCKS = 2  # per round
LAST_BLOCKS = 4  # of the matches that further fits use
FEW_PAIRS = 400
SHARES, SHARES_OF_FEW = (0.3, 0.5, 0.7), (0.5, 0.7, 0.8)
TRIAL_ROUNDS = 2  # after which the best share alone continues
ROUNDS = 10
PATIENCE = 3  # rounds without a gain


class Matches(NamedTuple):
    """Unpaired rows matched by a map, as stored."""

    images: Array  # (k, d) float32
    texts: Array  # (k, e) float32, row i matched with image i
    share: float  # their weight, beside that of all pairs of 1 - share


class _Block(NamedTuple):
    rows: tuple[Array, Array]  # stored rows (b, d) and (c, e)
    centred: tuple[Tensor, Tensor]  # unit rows less the mean of all

    def match(self, form: ClosedForm) -> tuple[Tensor, Tensor]:
        """Match the rows of both sides under the weights of a form."""
        x, y = self.centred
        return mutual_neighbours(x @ form.image_weight.T, y @ form.text_weight.T)


@dataclass(frozen=True)
class Pools:
    """Distinct unpaired rows of both sides, at most `MOST_UNPAIRED` each, and their moments."""

    unpaired: Unpaired
    units: tuple[UnitRows, UnitRows]  # of images and of texts
    seed: int  # of all that is drawn

    @cached_property
    def _moments(self) -> list[tuple[Array, Tensor, Tensor]]:
        """Row numbers, mean and covariance of each side, in one pass over its rows."""
        return [self._side_moments(*own) for own in zip(Modality, self.units, strict=True)]

    def _side_moments(self, side: Modality, units: UnitRows) -> tuple[Array, Tensor, Tensor]:
        total = self.unpaired.count(side)
        chosen = np.arange(total)
        if total > MOST_UNPAIRED:
            rng = np.random.default_rng([self.seed, 2])
            chosen = np.sort(rng.choice(total, MOST_UNPAIRED, replace=False))
        seen: set[int] = set()
        kept, mean, second = [], torch.zeros(1), torch.zeros(1)
        for start in range(0, len(chosen), CHUNK_ROWS):
            rows = chosen[start : start + CHUNK_ROWS]
            values = self.unpaired.take(side, rows)
            keys, first = np.unique(hash_rows(values), return_index=True)
            is_new = np.zeros(len(rows), np.bool_)
            is_new[first] = [key not in seen for key in keys.tolist()]
            seen.update(keys.tolist())
            kept.append(rows[is_new])
            unit = units(values[is_new])
            mean, second = mean + unit.double().sum(0), second + (unit.T @ unit).double()
        rows = np.concatenate(kept)
        mean, second = mean / len(rows), second / len(rows)
        return rows, mean.float(), second - torch.outer(mean, mean)

    @cached_property
    def clustered(self) -> tuple[Tensor, Tensor]:
        """Unit rows of both sides, (n, d) and (m, e), at most `MOST_CLUSTERED` each."""
        rng = np.random.default_rng([self.seed, 4])
        images, texts = (
            self._units(side, rng.permutation(rows)[:MOST_CLUSTERED])[1]
            for side, (rows, *_) in zip(Modality, self._moments, strict=True)
        )
        return images, texts

    def clusters(self, width: int) -> Clusters:
        """Return those rows to match clusters of, in a space of at most a width."""
        return Clusters(*self.clustered, self.seed, min(width, WIDTH))

    def first_pairs(self, rows: Pairs, sampler: PairSampler) -> tuple[Tensor, Tensor]:
        """Return unit rows of the images of a sampler, and of the first caption of each."""
        (images, texts), _ = sampler.weighted_pairs()
        first = np.unique(images, return_index=True)[1]
        x, y = self.units
        return x(rows.images[images[first]]), y(rows.texts[texts[first]])

    def _units(self, side: Modality, rows: Array) -> tuple[Array, Tensor]:
        """Return some rows of a side as stored, in ascending order, and their unit rows."""
        values = self.unpaired.take(side, np.sort(rows))
        return values, self.units[side is Modality.TEXT](values)

    def blocks(self, most: int, *key: int) -> Iterator[_Block]:
        """Yield random blocks of both sides, disjoint where there are enough rows."""
        rng = np.random.default_rng([self.seed, 3, *key])
        orders = [rng.permutation(rows) for rows, *_ in self._moments]
        for number in range(max(1, min(most, max(map(len, orders)) // BLOCK))):
            stored, centred = [], []
            for side, order, (_, mean, _) in zip(Modality, orders, self._moments, strict=True):
                start = number % max(1, len(order) // BLOCK) * BLOCK
                rows, unit = self._units(side, order[start : start + BLOCK])
                stored.append(rows)
                centred.append(unit - mean)
            yield _Block((stored[0], stored[1]), (centred[0], centred[1]))

    def mix(self, pairs: PairMoments) -> PairMoments:
        """Average the covariances of each side with those of its unpaired rows."""
        (_, _, images), (_, _, texts) = self._moments
        cov_xx, cov_yy = (pairs.cov_xx + images) / 2, (pairs.cov_yy + texts) / 2
        return PairMoments(pairs.mean_x, pairs.mean_y, cov_xx, cov_yy, pairs.cov_xy)

    def follow(
        self, pairs: PairMoments, form: ClosedForm, setting: Setting, width: int
    ) -> tuple[ClosedForm, Matches]:
        """Make the rounds that a search chose; return the last one's map, and its matches."""
        mixed = self.mix(pairs)
        for number, (ridge, power) in enumerate(setting.path, 1):
            moments = _toward(mixed, form, self.blocks(BLOCKS, number), setting.share)
            (form,) = moments.cca(ridge=ridge, powers=(power,), width=width)
        found = []
        for block in self.blocks(LAST_BLOCKS, setting.rounds + 1):
            places = block.match(form)
            found.append([own[at.numpy()] for own, at in zip(block.rows, places, strict=True)])
        images, texts = (np.concatenate(own) for own in zip(*found, strict=True))
        return form, Matches(images, texts, setting.share)


def _toward(
    mixed: PairMoments, form: ClosedForm, blocks: Iterator[_Block] | list[_Block], share: float
) -> PairMoments:
    """Add the cross-covariance of the matches of some blocks under a form."""
    found = []
    for block in blocks:
        rows, columns = block.match(form)
        x, y = block.centred
        found.append((x[rows].T @ y[columns]).double() / len(rows))
    matched = torch.stack(found).mean(0)
    return mixed.with_cross((1 - share) * mixed.cov_xy + share * matched)


def search(
    pools: Pools,
    folds: Sequence[PairMoments],
    start: Candidate,
    width: int,
    measure: Callable[[list[ClosedForm]], Measured],
    *,
    few: bool,
    progress: Callable[[Candidate], None],
) -> Candidate:
    """Find the share of matches and the rounds that do best on validation; `start` if none does.

    In each round every fold matches the same blocks of unpaired rows under its own map. The share
    that is best after some rounds continues alone.
    """
    mixed = [pools.mix(fold) for fold in folds]
    walks = {share: [start] for share in (SHARES_OF_FEW if few else SHARES)}
    best = start
    for number in range(1, ROUNDS + 1):
        blocks = list(pools.blocks(BLOCKS if len(folds) == 1 else 1, number))
        for share, walk in walks.items():
            last = walk[-1]
            moments = [
                _toward(own, form, blocks, share)
                for own, form in zip(mixed, last.forms, strict=True)
            ]
            found = []
            for step in nearby(last.step) if number <= TRIAL_ROUNDS else [last.step]:
                ridge = ridge_at(step)
                fitted = [list(own.cca(ridge=ridge, powers=POWERS, width=width)) for own in moments]
                for power, forms in zip(POWERS, zip(*fitted, strict=True), strict=True):
                    path = (*last.setting.path, (ridge, power))
                    setting = last.setting.model_copy(update={"share": share, "path": path})
                    found.append(Candidate(setting, step, [*forms], measure([*forms])))
                    progress(found[-1])
            walk.append(best_of(found))
            log.debug("share %g, round %d: %s", share, number, walk[-1].measured.score)
        best = best_of([best, *(walk[-1] for walk in walks.values())])
        if number == TRIAL_ROUNDS:
            ahead = max(
                walks, key=lambda share: best_of(walks[share][1:]).measured.score.mean_recall
            )
            walks = {ahead: walks[ahead]}
        if number >= TRIAL_ROUNDS and number >= best.setting.rounds + PATIENCE:
            break
    return best
