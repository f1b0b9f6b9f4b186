import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from rich.cells import cell_len
from typer.testing import CliRunner, Result

import csalign as library
from csalign import inspect
from csalign.cli import artifact_tables, eval_tables, tables
from csalign.cli.app import app
from csalign.cli.diagnosis_tables import diagnosis_table, verdict
from csalign.core.figures import FIGURES, figure_of
from csalign.evaluation.compare import compare
from csalign.evaluation.config import CompareConfig, DiagnoseConfig, EvalConfig, InspectConfig
from csalign.evaluation.diagnose import diagnose
from csalign.evaluation.evaluate import evaluate
from csalign.indexing.build import index
from csalign.indexing.config import IndexConfig, SearchConfig
from csalign.indexing.search import find
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.runs.config import ExportConfig
from csalign.runs.export import export
from csalign.training.bind import bind
from csalign.training.bind_config import BindConfig
from csalign.training.config import TrainConfig, TuneConfig
from csalign.training.train import train
from csalign.training.tuning.tune import tune

WIDTHS = (80, 100, 120)
LONG = "a-run-with-a-name-of-sixty-characters-such-as-loops-do-make"


class Shown(NamedTuple):
    """A result, its table, and what must be complete on the screen."""

    result: Callable[[], Any]
    table: Callable[[Any, Any], None]
    settings: Any
    words: list[str]


def csalign(*arguments: object, **env: str) -> Result:
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, words, env={"COLUMNS": "80", **env}, catch_exceptions=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature set with splits and colours, two runs on it, an index, and a study."""
    root = tmp_path_factory.mktemp("tables")
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(300, 8))
    for name in ("images", "texts"):
        rows = latent @ rng.normal(size=(8, 16)) + 0.7 * rng.normal(size=(300, 16))
        np.save(root / f"{name}.npy", rows.astype(np.float32))
    np.save(root / "query.npy", rng.normal(size=(2, 16)).astype(np.float32))
    splits = ["train"] * 200 + ["val"] * 40 + ["test"] * 60
    caption = "a caption of several words with 一只熊 in it"
    lines = [f"{row},{caption} {row},{split}" for row, split in enumerate(splits)]
    (root / "texts.csv").write_text("\n".join(["image_id,caption,split", *lines]))
    colours = ("red", "blue", "一只熊在雪地里", "green")
    lines = [f"{row},{colours[row % 4]}" for row in range(300)]
    (root / "info.csv").write_text("\n".join(["image_id,colour", *lines]))
    arrays = {name: root / f"{name}.npy" for name in ("images", "texts")}
    import_arrays(ImportConfig(**arrays, pairs=root / "texts.csv", out=root / "set"))
    for seed, name in enumerate(("run", LONG)):
        out = root / name
        options = {"steps": 5, "hidden": 8, "seed": seed, "ensemble": "off"}
        train(TrainConfig(features=root / "set", out=out, **options))
    index(IndexConfig(features=root / "set", side="text", out=root / "index"))
    tune(TuneConfig(features=root / "set", out=root / "study", epochs=1, trials=4, hidden=8))
    return root


def figures_in(document: dict[str, Any], place: str, names: tuple[str, ...]) -> list[str]:
    """What is shown of some figures of a block, as words."""
    found = []
    for name in names:
        figure = figure_of(f"{place}.{name}")
        found += [figure.heading, figure.show(document[name])]
    return found


@pytest.fixture(scope="module")
def shown(folder: Path) -> dict[str, Shown]:
    """The results of the commands, computed once."""
    features, run = folder / "set", folder / "run"
    options = {"features": features, "adapter": run, "resamples": 100}
    plain = EvalConfig(**options, groups=folder / "info.csv", by="colour", relevance="colour",
                       labels="colour", correct=("csls", "inverted-softmax"))  # fmt: skip
    every = EvalConfig(**options, all_figures=True, explain=True)
    document, complete = evaluate(plain), evaluate(every)
    retrieval = document["retrieval"]
    expected = ["image to text", "text to image", "一只熊在雪地里", "inverted-softmax"]
    for direction in eval_tables.DIRECTIONS:
        expected += figures_in(retrieval[direction], "retrieval.x", eval_tables.ESSENTIAL)
        for block in document["by"]["values"].values():
            expected += figures_in(block[direction], "retrieval.x", eval_tables.ESSENTIAL)
        expected += figures_in(document["graded"][direction], "graded.x", ("map", "ndcg@10"))
    expected += figures_in(document["gap"], "gap", eval_tables.GAP)
    expected += figures_in(retrieval, "retrieval", ("mean_recall",))
    for place in (document["mixed"]["image"], document["mixed"]["text"], document["mixed"]):
        expected += figures_in(place, "mixed", eval_tables.MIXED)
    expected += figures_in(document["groups"], "groups", eval_tables.GROUPS[:-1])
    expected += figures_in(
        document["groups"]["knn"], "groups.knn", tuple(document["groups"]["knn"])
    )
    expected += ["image queries", "groups by 'colour': 4 classes, 60 images"]
    low, high = document["intervals"]["image_to_text"]["R@1"]
    expected.append(f"± {50 * (high - low):.2f}")
    more = [
        "effective rank, text",
        "Fréchet distance, centroids ↓",
        "MMD ↓",
        "hubness",
        "MRR % ↑",
        "definitions",
        "Voorhees",
    ]
    labelled = {"groups": folder / "info.csv", "labels": "colour"}
    comparing = CompareConfig(systems=(run, folder / LONG, run), **labelled)
    compared = compare(comparing)
    rows = compared["evaluations"]
    known = [f"{row[key]:.4f}" for row in rows for key in ("centroid_distance", "frechet")]
    names = ("mean_recall", "mixed_ndcg@10", "same_side@10", "knn")
    known += [f"{100 * row[name]:.2f}" for row in rows for name in names]
    known += ["mixed NDCG@10 % ↑", "same-side share %", f"{rows[0]['v_measure']:.4f}"]
    known += [
        eval_tables.MEAN.show_difference(**rows[1]["difference"]["mean_recall"]),
        "baseline",
        LONG,
    ]
    alone = CompareConfig(systems=(run,))
    searching = TuneConfig(features=features, out=folder / "study", epochs=1, trials=4, hidden=8)
    study = tune(searching)
    settings = {key.replace("_", "-") for trial in study.trials for key in trial.settings}
    trained = TrainConfig(features=features, out=folder / "again", steps=2, hidden=8)
    training = train(trained)
    analysis = DiagnoseConfig(features=features, adapter=run)
    diagnosed = diagnose(analysis)
    wide = np.load(folder / "images.npy"), np.load(folder / "texts.npy")[:, :6]
    foretelling = DiagnoseConfig(features=features)
    foretold = library.diagnose(features=wide)
    query = SearchConfig(index=folder / "index", embedding=folder / "query.npy", top=3)
    described = inspect(run)
    exporting = ExportConfig(run=run, out=folder / "exported", to="safetensors")
    exported = export(exporting)
    document_of = InspectConfig(path=run)
    renamed = {"share": "text", "rename": "image=photo"}
    binding = BindConfig(first=run, second=run, out=folder / "bound", **renamed)
    bound = bind(binding)
    return {
        "eval": Shown(lambda: document, eval_tables.eval_tables, plain, expected),
        "all": Shown(lambda: complete, eval_tables.eval_tables, every, more),
        "compare": Shown(lambda: compared, eval_tables.compare_table, comparing, known),
        "alone": Shown(lambda: compare(alone), eval_tables.compare_table, alone, ["run"]),
        "tune": Shown(
            lambda: study,
            tables.tune_tables,
            searching,
            [*(settings - {"steps"}), "0 (default)", "1 (closed form)", "vs default"],
        ),
        "train": Shown(
            lambda: training,
            tables.train_table,
            trained,
            [
                *("mean recall % ↑", f"{100 * training.validation['kept']['mean_recall']:.2f}"),
                *("width", "on all 240 pairs"),
            ],
        ),
        "bind": Shown(
            lambda: bound,
            tables.bind_table,
            binding,
            ["image, text, photo", "agreement", f"{bound['rows']:,} different rows"],
        ),
        "diagnose": Shown(
            lambda: diagnosed,
            diagnosis_table,
            analysis,
            [f"{diagnosed['gap']['frechet']:.4f}", "cosine of gradients", "this run: 7"],
        ),
        "foretold": Shown(
            lambda: foretold,
            diagnosis_table,
            foretelling,
            ["without it", "foretold", f"{foretold['forecast']['mutual_knn']:.3f}"],
        ),
        "search": Shown(lambda: find(query), tables.found, query, ["caption of several"]),
        "inspect": Shown(
            lambda: described,
            artifact_tables.inspect_table,
            document_of,
            [
                f"{described['parameters']['text']:,}",
                "trained on",
                "closed form",
                "on all 240 pairs",
            ],
        ),
        "export": Shown(lambda: exported, tables.export_table, exporting, ["README.md"]),
    }


COMMANDS = (
    "eval",
    "all",
    "compare",
    "alone",
    "tune",
    "train",
    "bind",
    "diagnose",
    "foretold",
    "search",
    "inspect",
)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_label_and_number_is_whole(
    command: str,
    width: int,
    shown: dict[str, Shown],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    result, table, settings, words = shown[command]
    table(result(), settings)
    printed = capsys.readouterr().out
    lines = printed.splitlines()

    for word in words:
        assert any(word in line for line in lines), f"{word}\n{printed}"
    for line in lines:
        assert line == line.rstrip()
        is_path = "/" in line or line.startswith("next: ")  # which must stay in one piece
        assert is_path or cell_len(line) <= width, line
    assert "…" not in printed


def test_one_system_has_no_difference(
    shown: dict[str, Shown], capsys: pytest.CaptureFixture[str]
) -> None:
    result, table, settings, _ = shown["alone"]
    table(result(), settings)
    printed = capsys.readouterr().out

    assert "difference" not in printed
    assert "baseline" not in printed


def test_what_decides_is_in_one_table_of_compare(
    shown: dict[str, Shown], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result, table, settings, _ = shown["compare"]
    first, second, _ = result()["evaluations"]
    renamed = [{**first, "name": "features (no adapter)"}, {**second, "name": "run"}]
    table({"evaluations": renamed}, settings)
    first_table, *others = capsys.readouterr().out.split("\n\n")

    for word in ("mean recall %", "difference", "verdict", "baseline", second["verdict"]):
        assert word in first_table
    assert "i2t R@1" in others[0]
    assert "verdict" not in "".join(others)


def test_figures_from_before_the_adapter_are_beside_those_after_it(
    shown: dict[str, Shown], capsys: pytest.CaptureFixture[str]
) -> None:
    result, table, settings, _ = shown["eval"]
    document = result()
    before = {"retrieval": {**document["retrieval"], "mean_recall": 0.125}, "gap": document["gap"]}
    table({**document, "before": before}, settings)
    printed = capsys.readouterr().out
    distance = f"{document['gap']['centroid_distance']:.4f}"
    row = next(line for line in printed.splitlines() if "centroid distance" in line)

    assert "(before: 12.50)" in printed
    assert "image to text, before" in printed
    assert re.search(r"before +after\n", printed)
    assert row.count(distance) == 2


def test_only_the_trial_of_the_closed_form_is_named_so(
    shown: dict[str, Shown], capsys: pytest.CaptureFixture[str]
) -> None:
    result, table, settings, _ = shown["tune"]
    table(result(), settings)

    assert set(re.findall(r"(\d) \(closed form\)", capsys.readouterr().out)) == {"1"}


def test_systems_of_one_name_are_told_apart(
    shown: dict[str, Shown], capsys: pytest.CaptureFixture[str]
) -> None:
    result, table, settings, _ = shown["compare"]
    table(result(), settings)
    printed = capsys.readouterr().out

    assert "run #1" in printed
    assert "run #3" in printed
    assert eval_tables._distinct(["a", "a", "b"], ["x/a", "y/a", "b"]) == [
        "a (x/a)",
        "a (y/a)",
        "b",
    ]


def test_mean_recall_is_under_retrieval_and_the_protocol_only_if_not_the_default(
    folder: Path,
) -> None:
    arguments = ("eval", folder / "set", "--adapter", folder / "run", "--no-intervals")
    plain, verbose = csalign(*arguments).stdout, csalign(*arguments, "-v").stdout

    assert plain.index("mean recall") < plain.index("modality gap")
    assert "protocol" not in plain
    assert "protocol all" in verbose
    assert "MMD" not in plain
    assert "MMD" in csalign(*arguments, "--all-figures").stdout


def test_commands_say_what_they_wrote_and_what_comes_next(folder: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "out", tmp_path / "page.html"
    arrays = ("--images", folder / "images.npy", "--texts", folder / "texts.npy")
    imported = csalign("import", *arrays, "--out", out).stdout
    raw = csalign("eval", out, "--no-intervals").stdout
    trained = csalign("train", folder / "set", "--out", tmp_path / "run", "--steps", 0).stdout
    quiet = csalign("eval", out, "--no-intervals", "-q").stdout
    diagnosed = csalign("diagnose", out, "--report", page).stdout
    as_json = csalign("eval", out, "--no-intervals", "--json").stdout

    assert f"wrote {out}: 300 images, 300 texts, 300 pairs" in imported
    assert f"csalign split {out} --val 0.1 --test 0.1\n" in imported
    assert imported.splitlines()[-1] == f"next: csalign train {out} --out run"
    assert raw.splitlines()[-1] == f"next: csalign train {out} --out run"
    assert f"wrote {tmp_path / 'run'}" in trained
    after = f"next: csalign eval {folder / 'set'} --adapter {tmp_path / 'run'} --split test"
    assert trained.splitlines()[-1] == after
    assert "next:" not in quiet
    assert f"wrote {page}" in diagnosed
    json.loads(as_json)


def test_a_set_with_validation_names_the_call_that_adds_a_test_split_once(
    folder: Path, tmp_path: Path
) -> None:
    out, arrays = tmp_path / "out", (folder / "images.npy", folder / "texts.npy")
    imported = csalign("import", *arrays, "--out", out, "--val", 0.2, "--seed", 3).stdout
    how = f"csalign split {out} --val 0.2 --test 0.1 --seed 3 --overwrite"
    assert f"{how}\n" in imported
    trained = csalign("train", out, "--out", tmp_path / "run", "--steps", 0)
    assert (trained.stdout + trained.stderr).count("no test split") == 1
    assert how in trained.stderr

    assert "train 210, val 60, test 30" in csalign(*how.split()[1:]).stdout


def test_lines_on_a_terminal_break_between_words() -> None:
    path = "nowhere/" * 6
    message = csalign("eval", path, FORCE_COLOR="1", TERM="xterm", COLUMNS="40").stderr
    message = re.sub(r"\x1b\[[?\d;]*\w", "", message)
    lines = message[message.index("csalign:") :].splitlines()

    assert len(lines) > 1
    assert any(path.rstrip("/") in line for line in lines)
    assert all(len(line) <= 40 for line in lines if "nowhere" not in line)
    whole = csalign("eval", path).stderr
    assert " ".join(line.strip() for line in lines) == whole.strip()


def test_a_set_says_its_splits_and_the_first_failures(
    make_images: Callable[..., Path], tiny_clip: tuple[Path, Path], tmp_path: Path
) -> None:
    photos = make_images(*(f"{letter}.png" for letter in "abcdef"))
    for number in range(5):
        (photos / f"broken{number}.jpg").write_bytes(b"none")
    encoder = f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}"
    done = csalign(
        *("extract", photos, "--image-encoder", encoder, "--text-encoder", "none"),
        *("--max-failures", 1, "--out", tmp_path / "set"),
    )

    assert "6 images, 0 texts, 0 pairs" in done.stdout
    assert "5 inputs skipped" in done.stdout
    assert done.stdout.count("broken") == 3
    assert "and 2 more" in done.stdout
    assert f"next: csalign index {tmp_path / 'set'} --out index" in done.stdout


def test_inspect_of_a_run_has_the_lines_that_matter(folder: Path) -> None:
    done = csalign("inspect", folder / "run")
    lines = done.stdout.splitlines()
    names = [name for line in lines[1:-1] if (name := line.split("  ")[1])]

    assert len(names) <= 12
    assert lines[0] == f"{folder / 'run'}: run, valid"
    assert names[:6] == [
        *("trained on", "encoders", "adapters", "widths", "parameters", "closed form"),
    ]
    assert lines[-1] == f"next: csalign eval {folder / 'set'} --adapter {folder / 'run'}"
    document = json.loads(csalign("inspect", folder / "run", "--json").stdout)
    assert document["validation"][0]["step"] == 0


def test_inspect_says_how_far_an_unfinished_set_is(
    make_images: Callable[..., Path], tiny_clip: tuple[Path, Path], tmp_path: Path
) -> None:
    photos, out = make_images(*(f"{letter}.png" for letter in "abcdefgh")), tmp_path / "set"
    encoder = f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}"
    options = ("--image-encoder", encoder, "--text-encoder", "none", "--part-rows", 1)
    for number in (0, 1, 3):
        done = csalign("extract", photos, *options, "--out", out, "--shard", f"{number}/4")
        assert done.exit_code == 0, done.stderr
    assert "missing 2/4" in done.stdout
    for path in (out, out.with_name("set.partial")):
        found = csalign("inspect", path)
        assert found.exit_code == 0
        assert "3 of 4 shards done, missing 2/4" in found.stdout
    step = found.stdout.splitlines()[-1].removeprefix("next: csalign ").split()
    assert csalign(*step).exit_code == 0
    assert "8 images" in csalign("inspect", out).stdout


def test_inspect_says_what_other_artifacts_are(folder: Path, tmp_path: Path) -> None:
    run, page = folder / "run", tmp_path / "page.html"
    options = ("eval", folder / "set", "--adapter", run, "--resamples", 100)
    (tmp_path / "eval.json").write_text(csalign(*options, "--json").stdout)
    csalign("diagnose", folder / "set", "--report", page)
    csalign("export", run, "--to", "onnx", "--out", tmp_path / "onnx")

    for path, said in (
        (tmp_path / "eval.json", "evaluation, a document of --json"),
        (page, "page.html: page"),
        (tmp_path / "onnx", "export of an adapter (onnx)"),
        (folder / "study", "4"),
        (folder / "index", "index of 300 texts"),
    ):
        done = csalign("inspect", path)
        assert done.exit_code == 0, done.stderr
        assert said in done.stdout
        assert "next: " in done.stdout
        json.loads(csalign("inspect", path, "--json").stdout)
    wrong = csalign("inspect", folder / "images.npy")
    assert wrong.exit_code == 1
    assert "csalign import" in wrong.stderr


def test_a_diagnosis_takes_the_weight_of_the_run_and_words_it(folder: Path) -> None:
    document = diagnose(DiagnoseConfig(features=folder / "set", adapter=folder / "run"))
    plain = diagnose(DiagnoseConfig(features=folder / "set"))
    said = " ".join(verdict(document))

    assert document["cs_weight"] == 0.1
    assert plain["cs_weight"] == 1.0
    share = f"{100 * document['gap']['centroid_share']:.0f} % of the gap is a centroid offset"
    assert share in said
    assert "at a minimum the two gradients cancel" in said
    assert "at a minimum" not in " ".join(verdict(plain))


def test_two_forms_of_json_are_refused_and_recipes_have_one(folder: Path) -> None:
    query = ("--embedding", folder / "images.npy")
    done = csalign("search", folder / "index", *query, "--json", "--jsonl")

    assert done.exit_code == 2
    assert "--json and --jsonl" in done.stderr
    assert "few-pairs" in json.loads(csalign("recipes", "--json").stdout)
    assert json.loads(csalign("recipes", "few-pairs", "--json").stdout)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_signs_degrade_where_stdout_lacks_them(
    folder: Path, encoding: str, form: tuple[str, ...]
) -> None:
    arguments = ["eval", str(folder / "set"), "--resamples", "100", *form]
    done = CliRunner(charset=encoding).invoke(app, arguments, catch_exceptions=False)

    assert done.exit_code == 0
    done.stdout_bytes.decode(encoding)
    if not form:
        assert "R@1 % ^" in done.stdout


def test_every_figure_is_in_the_reference_by_its_name() -> None:
    readme = Path("csalign/metrics/README.md").read_text(encoding="utf-8")
    for figure in FIGURES.values():
        name = re.sub(
            r"^(true recall|R)@\d+", r"\1@K", figure.label.partition(",")[0].partition(" (")[0]
        )
        assert name.removesuffix(" of unit rows") in readme, figure.label
