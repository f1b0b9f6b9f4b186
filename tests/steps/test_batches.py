from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest

from csalign.steps.batches import PairSampler
from csalign.store.join import PairedRows


def make_rows(captions: Sequence[Sequence[str | None]]) -> PairedRows:
    """Image i has captions[i]."""
    texts = [caption for own in captions for caption in own]
    owners = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
    embeddings = np.arange(2 * len(texts), dtype=np.float32).reshape(-1, 2)
    return PairedRows(
        name="rows",
        images=np.zeros((len(captions), 2), np.float32),
        texts=embeddings,
        image_ids=pa.array([str(i) for i in range(len(captions))]),
        text_ids=pa.array([str(j) for j in range(len(texts))]),
        captions=pa.array(texts, pa.string()),
        text_image=owners.astype(np.int64),
    )


def draws(sampler: PairSampler, epochs: int, batch_size: int = 4) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.concatenate(
        [batch.texts for _ in range(epochs) for batch in sampler.epoch(batch_size, rng)]
    )


def test_captions_are_equal_but_for_case_and_outer_space_and_unknown_ones_by_embedding() -> None:
    rows = make_rows([["A cat"], [" a CAT "], ["a dog"], [None], [None]])
    rows.texts[4] = rows.texts[3]
    keys = rows.caption_keys

    assert keys[0] == keys[1]
    assert keys[3] == keys[4]
    assert len(set(keys.tolist())) == 3


def test_an_epoch_shows_every_image_once_with_a_caption_of_its_own() -> None:
    rows = make_rows([["a", "b"], [], ["c"], ["d", "e", "f"]])
    for batch in PairSampler(rows, other_weight=1.0, once=True).epoch(10, np.random.default_rng(1)):
        assert sorted(batch.images.tolist()) == [0, 2, 3]
        assert rows.text_image[batch.texts].tolist() == batch.images.tolist()


def test_a_shared_caption_comes_once_an_epoch_from_each_of_its_images_in_turn() -> None:
    rows = make_rows([["junk"]] * 30 + [["a"], ["b"]])
    sampler = PairSampler(rows, other_weight=0.3, once=True)
    rng = np.random.default_rng(0)
    epochs = [np.concatenate([batch.images for batch in sampler.epoch(2, rng)]) for _ in range(60)]

    assert all(len(epoch) == 3 for epoch in epochs)
    assert len({int(image) for epoch in epochs for image in epoch}) > 20
    assert len(draws(PairSampler(rows, other_weight=0.3, once=False), 1)) == 32


@pytest.mark.parametrize(("weight", "share"), [(0.0, 1.0), (0.3, 1 / 1.6), (1.0, 1 / 3)])
def test_the_first_caption_is_drawn_in_proportion_to_its_weight(
    weight: float, share: float
) -> None:
    sampler = PairSampler(make_rows([["a", "b", "c"]]), other_weight=weight, once=True)
    drawn = draws(sampler, 4_000)

    assert (drawn == 0).mean() == pytest.approx(share, abs=0.03)
    assert (drawn == 1).mean() == pytest.approx((drawn == 2).mean(), abs=0.03)


def test_pairs_of_the_closed_form_weigh_by_place_and_frequency() -> None:
    rows = make_rows([["junk", "x"], ["junk"], ["junk", "y"]])
    (images, texts), weights = PairSampler(rows, other_weight=0.5, once=True).weighted_pairs()

    assert images.tolist() == [0, 0, 1, 2, 2]
    assert texts.tolist() == [0, 1, 2, 3, 4]
    assert weights.tolist() == pytest.approx([1 / 3, 0.5, 1 / 3, 1 / 3, 0.5])
    (_, texts), weights = PairSampler(rows, other_weight=0.0, once=False).weighted_pairs()
    assert texts.tolist() == [0, 2, 3]
    assert weights.tolist() == [1, 1, 1]


def test_batches_of_an_epoch_are_of_like_size() -> None:
    rows = make_rows([[f"c{i}"] for i in range(21)])
    sizes = [
        len(batch.images)
        for batch in PairSampler(rows, other_weight=1, once=True).epoch(
            10, np.random.default_rng(0)
        )
    ]

    assert sizes == [7, 7, 7]
