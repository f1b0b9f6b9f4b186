"""Which sides train with tokens, and where those come from."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csalign.adapters.kinds import find_kind
from csalign.adapters.model import Adapter
from csalign.adapters.side import SideShape
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError
from csalign.features.join import Pairs
from csalign.features.reader import FeatureSet
from csalign.features.tokens import TokenCache, TokenRows
from csalign.training.config import TrainConfig
from csalign.training.initialization import kinds_of
from csalign.training.sampler import Order, uniform
from csalign.training.unpaired import Unpaired

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
Groups = tuple[Modality, int]

MIB = 1 << 20
SCATTERED = 4  # times that an epoch reads all tokens, above which to warn


def token_widths(features: FeatureSet, config: TrainConfig) -> dict[Modality, int]:
    """Width of the tokens of each side that trains with them; {} where none does.

    With a token term both sides do, else those whose kind mixes tokens into the embedding.

    Raises:
        ConfigError: tokens are asked for, but would change nothing, or go with another option.
        DataError: a side that needs tokens stores none.
        ShapeError: a side's tokens are of a width that its kind cannot take.
    """
    if not (config.token_weight or config.tokens):
        return {}
    kinds = kinds_of(config)
    classes = {side: find_kind(kind, allow=set(kinds.values())) for side, kind in kinds.items()}
    mixing = [side for side in Modality if classes[side].mixes_tokens()]
    if not (config.token_weight or mixing):
        raise ConfigError(
            f"tokens: no side embeds with them, being {' and '.join(sorted(set(kinds.values())))}; "
            "give one the kind transformer, or add a token term by --token-weight"
        )
    if config.sub_batch is not None:
        raise ConfigError(
            "sub-batch: rows with tokens go through an adapter all at once; leave it out, or use a "
            "smaller --batch-size"
        )
    if mixing:
        _refuse_mixtures(config, kinds[mixing[0]])
    widths = {}
    for side in Modality if config.token_weight else mixing:
        width = features.table(side).encoder.token_width
        if width is None:
            raise DataError(
                f"{features.path}: stores no {side} tokens; make it again with csalign extract "
                "--tokens both, or train without --token-weight and --tokens"
            )
        embeddings = features.table(side).width
        classes[side].check(SideShape(kinds[side], embeddings, embeddings, token_width=width))
        widths[side] = width
    return widths


def _refuse_mixtures(config: TrainConfig, kind: str) -> None:
    """What makes or takes rows that have no tokens cannot go beside a kind that mixes them in."""
    if config.mixing:
        raise ConfigError(
            f"mixing: a mixed pair has no tokens, which {kind} embeds with; leave --mixing out, "
            "or give another --adapter"
        )
    if config.unpaired:
        raise ConfigError(
            f"unpaired: rows of other sets go without tokens, which {kind} embeds with; leave "
            "--unpaired out, or give another --adapter"
        )


def warn_of_rows_without_tokens(adapter: Adapter, unpaired: Unpaired) -> None:
    """Say where training rows without a partner cannot help the distribution term."""
    for side in Modality:
        if adapter.side(side).embeds_with_tokens and unpaired.count(side):
            log.warning(
                "%d %s without a partner are left out, since they would be embedded without tokens",
                unpaired.count(side),
                side.plural,
            )


@dataclass(frozen=True)
class StoredTokens:
    """The tokens of a feature set, for training on some of its rows.

    Attributes:
        features: the feature set.
        widths: of the tokens of each side that trains with them.
        sources: of these sides; they share one cache.
        order: in which epochs show the images: any where all tokens fit into the cache, else so
            that few row groups are decoded again.
    """

    features: FeatureSet
    widths: Mapping[Modality, int]
    sources: Mapping[Modality, TokenRows]
    order: Order


def open_tokens(
    features: FeatureSet, widths: Mapping[Modality, int], rows: Pairs, config: TrainConfig
) -> StoredTokens | None:
    """Prepare to read the tokens of training rows; None where no side has any.

    Raises:
        ConfigError: the memory for tokens does not hold a row group of each side.
        SchemaError: a shard is damaged.
    """
    if not widths:
        return None
    cache = TokenCache(config.token_memory * MIB)
    sources = {side: TokenRows(features.table(side), cache) for side in widths}
    layout = _layout(rows, sources)
    if layout.size(layout.all_groups()) <= cache.budget:
        return StoredTokens(features, widths, sources, uniform)
    least = sum(max(group.bytes for group in source.groups) for source in sources.values())
    if least > cache.budget:
        raise ConfigError(
            f"token_memory: a row group of each side takes {-(-least // MIB)} MiB, more than "
            f"{config.token_memory}; raise --token-memory"
        )
    return StoredTokens(features, widths, sources, _block_order(layout, cache.budget))


@dataclass(frozen=True)
class _Layout:
    """Which row groups hold the tokens of each pair of training rows.

    Attributes:
        images: (p,) image row of each pair.
        groups: (p,) row group of each pair's tokens, by side.
        sizes: bytes of each row group.
    """

    images: Ints
    groups: Mapping[Modality, Ints]
    sizes: Mapping[Groups, int]

    def all_groups(self) -> set[Groups]:
        return {(side, group) for side, own in self.groups.items() for group in own.tolist()}

    def size(self, groups: set[Groups]) -> int:
        return sum(self.sizes[group] for group in groups)


def _layout(rows: Pairs, sources: Mapping[Modality, TokenRows]) -> _Layout:
    texts = np.flatnonzero(rows.text_image >= 0)
    pairs = {Modality.IMAGE: rows.text_image[texts], Modality.TEXT: texts}
    groups = {
        side: source.group_of(rows.table_rows(side)[pairs[side]])
        for side, source in sources.items()
    }
    sizes = {
        (side, number): group.bytes
        for side, source in sources.items()
        for number, group in enumerate(source.groups)
    }
    return _Layout(pairs[Modality.IMAGE], groups, sizes)


@dataclass(frozen=True)
class BlockOrder:
    """Blocks of images in random order, and the images of several blocks shuffled together.

    Each image comes once. As many blocks go together as need no more row groups than fit.

    Attributes:
        block_of: (n,), block of each image row, -1 where it has no text.
        needs: row groups that each block's images and texts are in.
        sizes: bytes of each row group.
        budget: bytes of row groups that fit at once.
    """

    block_of: Ints
    needs: list[set[Groups]]
    sizes: Mapping[Groups, int]
    budget: int

    def __call__(self, images: Ints, rng: np.random.Generator) -> Ints:
        """See `Order`."""
        windows = self._windows(rng)
        return np.lexsort((rng.random(len(images)), windows[self.block_of[images]]))

    def _windows(self, rng: np.random.Generator) -> Ints:
        """A number for each block, equal for those that are shuffled together."""
        window, held = 0, set[Groups]()
        windows = np.empty(len(self.needs), np.int64)
        for block in rng.permutation(len(self.needs)).tolist():
            both = held | self.needs[block]
            if held and sum(self.sizes[group] for group in both) > self.budget:
                window, both = window + 1, self.needs[block]
            held = both
            windows[block] = window
        return windows


def _block_order(layout: _Layout, budget: int) -> BlockOrder:
    """Blocks by the row groups of a side, or of both, whichever reads least in an epoch.

    A row group of the other side lies in several blocks, and is read for each. Blocks should fit,
    best several at once, since only what is there together is shuffled.
    """
    labels = list(layout.groups.values())
    if len(labels) > 1:
        labels.append(np.unique(np.stack(labels), axis=1, return_inverse=True)[1])
    orders = [_by(own, layout, budget) for own in labels]

    def cost(order: BlockOrder) -> tuple[int, int]:
        read = [layout.size(needs) for needs in order.needs]
        return -min(2, budget // max(read)), sum(read)

    best = min(orders, key=cost)
    times = cost(best)[1] / layout.size(layout.all_groups())
    if times > SCATTERED:
        log.warning(
            "the tokens of images and of their texts are stored in such different orders that an "
            "epoch reads them about %.0f times; raise --token-memory if you can",
            times,
        )
    return best


def _by(labels: Ints, layout: _Layout, budget: int) -> BlockOrder:
    """Blocks of images of one label; `labels` (p,) is of pairs."""
    _, blocks = np.unique(labels, return_inverse=True)
    block_of = np.full(layout.images.max() + 1, -1)
    block_of[layout.images[::-1]] = blocks[::-1]  # of an image's texts the first decides
    needs = [set[Groups]() for _ in range(blocks.max() + 1)]
    own = block_of[layout.images]
    for side, groups in layout.groups.items():
        for block, group in np.unique(np.stack([own, groups], 1), axis=0).tolist():
            needs[block].add((side, group))
    return BlockOrder(block_of, needs, layout.sizes, budget)
