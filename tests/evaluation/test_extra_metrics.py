import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import v_measure_score

from csalign.cli.eval_tables import eval_tables
from csalign.core.errors import ConfigError, DataError, ShapeError
from csalign.core.results import leaves
from csalign.evaluation import protocols
from csalign.evaluation.compare import compare
from csalign.evaluation.config import CompareConfig, EvalConfig
from csalign.evaluation.evaluate import evaluate
from csalign.evaluation.measure import describe, measure
from csalign.features.join import load_rows
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.metrics.explain import EXPLANATIONS, pattern_of
from csalign.runs.apply import apply
from csalign.runs.config import ApplyConfig
from csalign.training.config import TrainConfig
from csalign.training.train import train

OF_GENERATED = {
    "generated",
    "images",
    "encoder",
    "distribution.cmmd",
    "distribution.frechet",
    "distribution.frechet_unit",
}
KINDS = ("cat", "dog", "owl", "eel", "ant", "bee")


def saved(path: Path, rows: Any) -> Path:
    np.save(path, np.asarray(rows, np.float32))
    return path


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """Six kinds of images, five each, two captions an image, and an image without any."""
    rng = np.random.default_rng(0)
    kinds = np.append(np.repeat(np.arange(6), 5), 0)
    x = np.eye(6)[kinds] + 0.4 * rng.normal(size=(31, 6))
    y = np.repeat(x[:30], 2, axis=0) + 0.5 * rng.normal(size=(60, 6))
    (tmp_path / "pairs.csv").write_text("image_id\n" + "\n".join(str(i // 2) for i in range(60)))
    table = tmp_path / "kinds.csv"
    table.write_text("id,kind\n" + "\n".join(f"{i},{KINDS[kinds[i]]}" for i in range(30)))
    out = tmp_path / "animals"
    import_arrays(
        ImportConfig(
            images=saved(tmp_path / "x.npy", x),
            texts=saved(tmp_path / "y.npy", y),
            pairs=tmp_path / "pairs.csv",
            out=out,
        )
    )
    return out


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Two prompts a kind, whose ids are kind/number."""
    rng = np.random.default_rng(1)
    ids = [f"{kind}/{number}" for kind in KINDS for number in range(2)]
    rows = [f"{key},a {key}" for key in ids]
    (tmp_path / "prompts.csv").write_text("\n".join(["id,caption", *rows]))
    y = np.repeat(np.eye(6), 2, axis=0) + 0.3 * rng.normal(size=(12, 6))
    out = tmp_path / "prompts"
    import_arrays(
        ImportConfig(
            texts=saved(tmp_path / "p.npy", y), text_table=tmp_path / "prompts.csv", out=out
        )
    )
    return out


OF_SIDES = ("sides", "matrix.", "mean_recall", "subsets.", "effective_rank.")


def config_of(animals: Path, **options: Any) -> EvalConfig:
    values = {"features": animals, "resamples": 100, **options}
    return EvalConfig.resolve(None, values)


def test_every_figure_of_the_document_is_explained_and_nothing_else(
    animals: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = evaluate(config_of(animals))
    document = evaluate(
        config_of(
            animals,
            groups=tmp_path / "kinds.csv",
            relevance="kind",
            by="kind",
            correct="csls,inverted-softmax,centre",
            zero_shot=prompts,
            labels="kind",
            explain=True,
        )
    )
    eval_tables(document, EvalConfig())
    printed = capsys.readouterr().out
    for said in ("31 images, 60 texts", "with hubness correction csls", "Conneau et al."):
        assert said in printed
    assert "protocol all" not in printed  # the default
    explained = document.pop("explanations")

    assert json.loads(json.dumps(document)) == document
    corrections = {"corrected.csls", "corrected.inverted-softmax", "corrected.centre"}
    rare = ("gap.standard_errors", "twins", "fitted_on", *OF_SIDES)
    elsewhere = {key for key in EXPLANATIONS if key.startswith(rare)}
    assert set(explained) == set(EXPLANATIONS) - elsewhere - OF_GENERATED | corrections
    assert all(text["formula"] for text in explained.values())
    with pytest.raises(KeyError):
        pattern_of("gap.surprise")
    for key in ("graded", "by", "corrected", "zero_shot", "groups"):
        assert key not in plain
        del document[key]
    for key in ("zero_shot", "groups"):
        del document["intervals"][key]
    assert document == plain  # corrections and the like leave the plain figures alone
    assert len(plain["gap"]["spectrum"]["image"]) == 6
    low, high = plain["intervals"]["text_to_image"]["true_recall@5"]
    assert low <= plain["retrieval"]["text_to_image"]["true_recall@5"] <= high


def test_retrieval_by_group_adds_up_to_the_whole(animals: Path, tmp_path: Path) -> None:
    table = tmp_path / "few.csv"  # captions of one image agree; of some images nothing is told
    table.write_text("image_id,kind\n0,cat\n0,cat\n5,dog\n6,dog\n")
    document = evaluate(config_of(animals, by=f"{table}:kind"))
    values = document["by"]["values"]

    assert document["by"]["column"] == f"{table}:kind"
    assert {name: block["images"] for name, block in values.items()} == {
        "(none)": 27,
        "cat": 1,
        "dog": 2,
    }
    for name in ("image_to_text", "text_to_image"):
        for figure in ("R@1", "true_recall@5", "mrr", "map", "mean_rank"):
            parts = [(block["images"], block[name][figure]) for block in values.values()]
            mean = sum(count * value for count, value in parts) / 30
            assert mean == pytest.approx(document["retrieval"][name][figure])


def test_groups_of_one_image_grade_as_retrieval_does(animals: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.csv"
    alone.write_text("id,own\n" + "\n".join(f"{i},{i}" for i in range(29)))  # and two unknown
    document = evaluate(config_of(animals, groups=alone, relevance="own", intervals=False))

    assert document["graded"]["column"] == "own"
    for name in ("image_to_text", "text_to_image"):
        graded, plain = document["graded"][name], document["retrieval"][name]
        assert graded["map"] == pytest.approx(plain["map"])
    # One image is right, so that gain 1 / log2(rank + 1) is what is left of nDCG.
    assert graded["ndcg@10"] <= document["retrieval"]["text_to_image"]["R@10"]


def test_stored_columns_need_no_table(animals: Path) -> None:
    document = evaluate(config_of(animals, by="split", relevance="split"))

    assert set(document["by"]["values"]) == {"(none)"}
    graded, plain = document["graded"]["text_to_image"], document["retrieval"]["text_to_image"]
    assert graded["map"] == pytest.approx(plain["map"])  # no splits, so no groups


def class_of(tmp_path: Path) -> str:
    """The class by caption rather than by id."""
    table = tmp_path / "by-caption.csv"
    rows = [f"a {kind}/{number},{kind}" for kind in KINDS for number in range(2)]
    table.write_text("\n".join(["caption,class", *rows]))
    return str(table)


def test_zero_shot_equals_a_loop_and_classes_may_be_told_by_caption(
    animals: Path, prompts: Path, tmp_path: Path
) -> None:
    labels = f"{tmp_path / 'kinds.csv'}:kind"
    document = evaluate(config_of(animals, zero_shot=prompts, labels=labels))
    block = document["zero_shot"]

    images, texts = np.load(tmp_path / "x.npy"), np.load(tmp_path / "p.npy")
    unit = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    vectors = unit.reshape(6, 2, 6).mean(axis=1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    order = np.argsort(-(images[:30] @ vectors.T), axis=1)
    right = order == np.repeat(np.arange(6), 5)[:, None]
    assert (
        block
        == {
            "classes": 6,
            "prompts": 12,
            "images": 30,  # of the last nothing is told
            "top1": pytest.approx(right[:, 0].mean()),
            "top5": pytest.approx(right[:, :5].any(axis=1).mean()),
            "mean_per_class_recall": pytest.approx(right[:, 0].reshape(6, 5).mean(axis=1).mean()),
        }
    )
    low, high = document["intervals"]["zero_shot"]["top1"]
    assert low <= block["top1"] <= high
    for given in (class_of(tmp_path), f"{class_of(tmp_path)}:class"):
        told = evaluate(config_of(animals, zero_shot=prompts, labels=labels, class_of=given))
        assert told["zero_shot"] == block


def test_images_without_texts_are_classified_raw_and_through_an_adapter(
    animals: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(TrainConfig(features=animals, out=tmp_path / "run", steps=0)).run
    bare = tmp_path / "bare"
    import_arrays(ImportConfig(images=tmp_path / "x.npy", out=bare))
    apply(ApplyConfig(features=prompts, adapter=run, out=tmp_path / "mapped", dtype="float32"))
    apply(ApplyConfig(features=bare, adapter=run, out=tmp_path / "seen", dtype="float32"))
    labels = f"{tmp_path / 'kinds.csv'}:kind"

    alone = evaluate(config_of(bare, zero_shot=prompts, labels=labels, explain=True))
    paired = evaluate(config_of(animals, zero_shot=prompts, labels=labels))
    assert alone["zero_shot"] == paired["zero_shot"]
    assert "retrieval" not in alone
    through = evaluate(config_of(bare, adapter=run, zero_shot=prompts, labels=labels))
    mapped = evaluate(config_of(tmp_path / "seen", zero_shot=tmp_path / "mapped", labels=labels))
    assert through["zero_shot"] == mapped["zero_shot"]
    with pytest.raises(DataError, match="contains no texts, so there is no retrieval"):
        evaluate(config_of(bare, zero_shot=prompts, labels=labels, correct="csls"))
    eval_tables(alone, EvalConfig())
    assert "zero-shot classification: 30 images, 6 classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_shot": "x"}, "--zero-shot CLASSES requires --labels COLUMN"),
        ({"class_of": "x.csv"}, "pass both"),
        ({"groups": "x.csv"}, "name its column"),
        ({"correct": "csls,other"}, "--correct must be .*'other'"),
    ],
)
def test_options_that_say_nothing_are_refused(
    animals: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(config_of(animals, **options))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "id,other\n1,a\n",
            r"images have no column 'kind'.*t\.csv has .*other.*; the features have source, spl",
        ),
        ("id,kind\nx,a\n", "of none of the images .* such as '0'"),
        ("id,kind\n0,\n1,\n", "'kind' is empty for all 2 images .* name another column"),
        ("id,kind\n1,a\n1,b\n", r"t\.csv, row 3: has 'b' of '1', an earlier row has 'a'"),
        ("name,kind\n1,a\n", "has no column 'image_id'"),
    ],
)
def test_tables_that_do_not_fit_are_refused(
    animals: Path, tmp_path: Path, content: str, message: str
) -> None:
    table = tmp_path / "t.csv"
    table.write_text(content)

    with pytest.raises(DataError, match=message):
        evaluate(config_of(animals, groups=table, by="kind"))


def test_classes_that_do_not_fit_are_refused(animals: Path, prompts: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    options: dict[str, Any] = {"labels": f"{table}:kind", "zero_shot": prompts}

    table.write_text("id,kind\n0,cow\n1,cat\n")
    with pytest.raises(DataError, match="names 'cow' and 0 other labels that are not classes"):
        evaluate(config_of(animals, **options))
    with pytest.raises(DataError, match="text '0' names no class; use ids such as cat/0"):
        evaluate(config_of(animals, **options | {"zero_shot": animals}))
    (tmp_path / "c.csv").write_text("id,class\ncat/0,cat\n")
    with pytest.raises(DataError, match=r"c\.csv: has no 'class' of the text 'cat/1'"):
        evaluate(config_of(animals, **options, class_of=str(tmp_path / "c.csv")))
    bare = tmp_path / "bare"
    import_arrays(ImportConfig(images=tmp_path / "x.npy", out=bare))
    with pytest.raises(DataError, match="contains no texts; extract it from class prompts"):
        evaluate(config_of(animals, **options | {"zero_shot": bare}))
    table.write_text("id,kind\n0,dog\n1,cat\n")
    narrow = tmp_path / "narrow"
    (tmp_path / "ids.csv").write_text("id,caption\ncat/0,a\ndog/0,b\n")
    import_arrays(
        ImportConfig(
            texts=saved(tmp_path / "n.npy", np.eye(2)), text_table=tmp_path / "ids.csv", out=narrow
        )
    )
    with pytest.raises(ShapeError, match="prompts are 2 wide and images 6"):
        evaluate(config_of(animals, **options | {"zero_shot": narrow}))


def test_groups_are_measured_where_images_have_labels(
    animals: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    labels = f"{tmp_path / 'kinds.csv'}:kind"
    document = evaluate(config_of(animals, labels=labels))
    groups, around = document["groups"], document["intervals"]["groups"]

    assert "zero_shot" not in document
    assert "1 images without" in caplog.text
    counts = {key: groups[key] for key in ("column", "classes", "images", "texts")}
    assert counts == {"column": labels, "classes": 6, "images": 30, "texts": 60}
    measured = measure(config_of(animals, labels=labels))
    aligned, (tasks,) = measured.aligned, measured.groups
    kinds = np.repeat(np.arange(6), 5)
    both = np.concatenate([kinds, kinds[aligned.rows.text_image]])
    rows = np.concatenate([aligned.images[:30], aligned.texts])
    found = KMeans(6, n_init=10, random_state=0).fit_predict(rows)
    assert groups["v_measure"] == pytest.approx(v_measure_score(both, found))
    assert groups == {"column": labels, **tasks.summary()}
    assert groups["knn"]["majority"] == pytest.approx(1 / 6)
    for place in (("v_measure",), ("ari",), ("knn", "image_to_text"), ("knn", "mean")):
        value, ends = groups, around
        for key in place:
            value, ends = value[key], ends[key]
        assert ends[0] <= value <= ends[1]


def test_figures_of_both_sides_are_means_over_the_folds_of_a_protocol(
    animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(protocols.RULES, "coco-1k", protocols.Rule(30, folds=2, captions=2))
    every = load_rows(FeatureSet.open(animals), "all")
    paired = animals.parent / "paired"
    import_arrays(
        ImportConfig(
            images=saved(tmp_path / "z.npy", every.images[:30]),
            texts=tmp_path / "y.npy",
            pairs=tmp_path / "pairs.csv",
            out=paired,
        )
    )
    options: dict[str, Any] = {"labels": f"{tmp_path / 'kinds.csv'}:kind", "protocol": "coco-1k"}
    measured = measure(config_of(paired, **options))
    document = describe(measured)

    for key, tasks in (("mixed", measured.mixed), ("groups", measured.groups)):
        assert len(tasks) == 2
        place, own = leaves_of(document[key]), [leaves_of(fold.summary()) for fold in tasks]
        for name in set(own[0]) - {"classes", "images", "texts"}:
            assert place[name] == pytest.approx(np.mean([fold[name] for fold in own]))
    assert [document["groups"][key] for key in ("classes", "images", "texts")] == [6, 30, 60]
    low, high = document["intervals"]["mixed"]["ndcg@10"]
    assert low <= document["mixed"]["ndcg@10"] <= high


def leaves_of(block: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a block by place."""
    return {".".join(path): value for path, value in leaves(block) if not isinstance(value, str)}


def test_columns_that_name_no_groups_are_refused_or_serve_zero_shot_alone(
    animals: Path, prompts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = tmp_path / "own.csv"
    table.write_text("id,own,one\n" + "\n".join(f"{i},{i},a" for i in range(31)))
    for column, values in (("own", 31), ("one", 1)):
        message = f"'{column}' has {values} distinct values? in 31 images; .*name another column"
        with pytest.raises(DataError, match=message):
            evaluate(config_of(animals, groups=table, labels=column))
    few = tmp_path / "few.csv"
    few.write_text("id,kind\n0,cat\n5,dog\n")
    document = evaluate(config_of(animals, labels=f"{few}:kind", zero_shot=prompts))
    assert "zero_shot" in document
    assert "groups" not in document
    assert "has 2 distinct values in 2 images" in caplog.text


def test_a_gap_that_hides_the_other_side_is_worded(
    animals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apart = animals.parent / "apart"
    rows = [np.pad(np.load(tmp_path / f"{name}.npy"), ((0, 0), (0, 1))) for name in "xy"]
    rows[1][:, -1] = 9
    rows[0][:, -1] = -9
    import_arrays(
        ImportConfig(
            images=saved(tmp_path / "a.npy", rows[0]),
            texts=saved(tmp_path / "b.npy", rows[1]),
            pairs=tmp_path / "pairs.csv",
            out=apart,
        )
    )
    document = evaluate(config_of(apart))
    eval_tables(document, EvalConfig())
    printed = " ".join(capsys.readouterr().out.split())  # without line ends

    assert document["mixed"]["same_side@10"] == 1
    assert "one gallery of both sides" in printed
    assert "the gap hides the other side in a mixed index" in printed
    eval_tables(evaluate(config_of(animals, intervals=False)), EvalConfig())
    assert "hides the other side" not in capsys.readouterr().out


def test_compare_takes_documents_with_further_figures(
    animals: Path, prompts: Path, tmp_path: Path
) -> None:
    document = evaluate(
        config_of(
            animals,
            zero_shot=prompts,
            labels=f"{tmp_path / 'kinds.csv'}:kind",
            by="split",
            correct="centre",
        )
    )
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(document))
    rows = compare(CompareConfig(systems=(path, path)))["evaluations"]

    assert [row["verdict"] for row in rows] == ["baseline", "cannot tell"]
