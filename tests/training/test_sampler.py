from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest

from csalign.core.enums import Modality
from csalign.features.join import PairedRows
from csalign.training.network.sampler import BatchRows, PairSampler


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


def draws(sampler: PairSampler, epochs: int) -> list[BatchRows]:
    rng = np.random.default_rng(0)
    return [batch for _ in range(epochs) for batch in sampler.epoch(4, rng)]


def test_captions_are_equal_but_for_case_and_outer_space_and_unknown_ones_by_embedding() -> None:
    rows = make_rows([["A cat"], [" a CAT "], ["a dog"], [None], [None]])
    rows.texts[4] = rows.texts[3]
    keys = rows.caption_keys

    assert keys[0] == keys[1]
    assert keys[3] == keys[4]
    assert len(set(keys.tolist())) == 3


@pytest.mark.parametrize("captions", ["first", "sample"])
def test_an_epoch_shows_every_image_once_with_captions_of_its_own(
    captions: Literal["first", "sample"],
) -> None:
    rows = make_rows([["a", "b"], [], ["c"], ["d", "e", "f"]])
    sampler = PairSampler(rows, captions, other_weight=0.3, once=True)
    seen = set()
    for batch in draws(sampler, 50):
        assert batch.others is not None
        assert sorted(batch.images.tolist()) == [0, 2, 3]
        assert rows.text_image[batch.texts].tolist() == batch.images.tolist()
        for image, text, other in zip(batch.images, batch.texts, batch.others, strict=True):
            assert other != text
            assert (other == -1) if image == 2 else (rows.text_image[other] == image)
            seen.add((int(text), int(other)))

    firsts = {(0, 1), (2, -1), (3, 4), (3, 5)}
    rest = {(1, 0), (4, 3), (4, 5), (5, 3), (5, 4)}
    assert seen == (firsts if captions == "first" else firsts | rest)


def test_without_weight_there_are_no_other_captions() -> None:
    sampler = PairSampler(make_rows([["a", "b"], ["c"]]), "first", other_weight=0.0, once=True)

    assert all(batch.others is None for batch in draws(sampler, 3))


def test_a_shared_caption_comes_once_an_epoch_from_each_of_its_images_in_turn() -> None:
    rows = make_rows([["junk", "tag"]] * 30 + [["a"], ["b"]])
    sampler = PairSampler(rows, "first", other_weight=0.3, once=True)
    rng = np.random.default_rng(0)
    epochs = [list(sampler.epoch(32, rng)) for _ in range(60)]

    assert all(len(batch.images) == 3 for (batch,) in epochs)
    assert len({int(image) for (batch,) in epochs for image in batch.images}) > 20
    (batch,) = PairSampler(rows, "first", other_weight=0.3, once=False).epoch(32, rng)
    assert len(batch.images) == 32


def test_other_captions_of_a_batch_are_not_repeated() -> None:
    rows = make_rows([["a", "tag"], ["b", "TAG"], ["c", "sky"]])
    sampler = PairSampler(rows, "first", other_weight=0.3, once=True)

    for batch in draws(sampler, 20):
        assert batch.others is not None
        assert sorted((batch.others >= 0).tolist()) == [False, True, True]


def test_pairs_of_the_closed_form_weigh_by_place_and_frequency() -> None:
    rows = make_rows([["junk", "x"], ["junk"], ["junk", "y"]])
    (images, texts), weights = PairSampler(
        rows, "first", other_weight=0.5, once=True
    ).weighted_pairs()

    assert images.tolist() == [0, 0, 1, 2, 2]
    assert texts.tolist() == [0, 1, 2, 3, 4]
    assert weights.tolist() == pytest.approx([1 / 3, 0.5, 1 / 3, 1 / 3, 0.5])
    (_, texts), weights = PairSampler(rows, "first", other_weight=0, once=False).weighted_pairs()
    assert texts.tolist() == [0, 2, 3]
    assert weights.tolist() == [1, 1, 1]
    _, weights = PairSampler(rows, "sample", other_weight=0, once=False).weighted_pairs()
    assert weights.tolist() == [1] * 5


def test_batches_of_an_epoch_are_of_like_size() -> None:
    rows = make_rows([[f"c{i}"] for i in range(21)])
    sampler = PairSampler(rows, "first", other_weight=1, once=True)
    sizes = [len(batch.images) for batch in sampler.epoch(10, np.random.default_rng(0))]

    assert sizes == [7, 7, 7]


def test_all_captions_of_a_batch_come_with_their_images_and_none_twice() -> None:
    rows = make_rows([["a", "tag", "x"], [], ["b", "TAG"], ["c"]])
    sampler = PairSampler(rows, "all", other_weight=0.3, once=True)
    for batch in draws(sampler, 20):
        assert batch.owner is not None
        assert batch.others is None
        assert not len(batch.further)
        assert batch.images[batch.owner].tolist() == rows.text_image[batch.texts].tolist()
        shown = sorted(rows.captions[int(text)].as_py().lower() for text in batch.texts)
        assert shown == ["a", "b", "c", "tag", "x"]
    (batch,) = PairSampler(rows, "all", other_weight=0.3, once=False).epoch(
        4, np.random.default_rng(0)
    )
    assert sorted(batch.texts.tolist()) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("weight", "left"), [(0.0, ["sky", "tag", "x"]), (0.3, ["x"])])
def test_the_captions_that_no_pair_shows_are_further_ones(weight: float, left: list[str]) -> None:
    rows = make_rows([["a", "tag", "x"], ["b", "sky"]])
    sampler = PairSampler(rows, "first", other_weight=weight, once=True)
    found = set()
    for batch in draws(sampler, 20):
        found.add(tuple(sorted(rows.captions[int(text)].as_py() for text in batch.further)))

    assert tuple(left) in found
    assert all(len(captions) == len(left) for captions in found)


@pytest.mark.parametrize("captions", ["first", "sample", "all"])
@pytest.mark.parametrize("once", [False, True])
def test_leaving_images_out_gives_the_batches_of_the_others_alone(
    captions: Literal["first", "sample", "all"], once: bool
) -> None:
    names = [["a", "b"], ["c"], [], ["a", "d", "e"], ["f"], ["c", "g"], ["h"], ["i", "a"]]
    left_out = [1, 3]
    every = make_rows(names)
    rest = make_rows([own for image, own in enumerate(names) if image not in left_out])
    mask = np.isin(np.arange(len(names)), left_out)
    kept = np.flatnonzero(~mask)
    rest = replace(rest, texts=every.texts[~mask[every.text_image]])
    options = {"other_weight": 0.3, "once": once}
    samplers = (
        PairSampler(every, captions, leave_out=mask, **options),  # type: ignore[arg-type]
        PairSampler(rest, captions, **options),  # type: ignore[arg-type]
    )
    assert len(samplers[0]) == len(samplers[1]) == 5
    for one, other in zip(*(draws(sampler, 20) for sampler in samplers), strict=True):
        assert one.images.tolist() == kept[other.images].tolist()
        for name in ("texts", "further"):
            found, expected = getattr(one, name), getattr(other, name)
            assert every.texts[found].tolist() == rest.texts[expected].tolist()
        for name in ("owner", "others"):
            assert (getattr(one, name) is None) == (getattr(other, name) is None)
        if one.owner is not None:
            assert other.owner is not None
            assert one.owner.tolist() == other.owner.tolist()
        if one.others is not None:
            assert other.others is not None
            assert (one.others >= 0).tolist() == (other.others >= 0).tolist()
    (pairs, weights), (others, expected) = (sampler.weighted_pairs() for sampler in samplers)
    assert weights.tolist() == expected.tolist()
    assert pairs[0].tolist() == kept[others[0]].tolist()
    assert every.texts[pairs[1]].tolist() == rest.texts[others[1]].tolist()


def test_taking_images_keeps_their_texts_and_which_captions_are_equal() -> None:
    rows = make_rows([["a", "b"], ["c"], [], ["a"], ["d", "c"]])
    found = rows.take(np.array([True, False, True, True, True]))

    assert found.texts.tolist() == rows.texts[[0, 1, 3, 4, 5]].tolist()
    assert found.text_image.tolist() == [0, 0, 2, 3, 3]
    assert found.table_rows(Modality.IMAGE).tolist() == [0, 2, 3, 4]
    assert found.table_rows(Modality.TEXT).tolist() == [0, 1, 3, 4, 5]
    assert found.caption_keys.tolist() == [0, 1, 0, 3, 4]
