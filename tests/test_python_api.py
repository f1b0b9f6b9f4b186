"""Calls of the commands from Python, with paths and with arrays."""

import doctest
import inspect
import json
import pickle
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import csalign
from csalign.core.config import Config
from csalign.core.errors import ConfigError, CsalignError, DataError, ShapeError

Pair = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]

COMMANDS = {
    "apply": csalign.ApplyConfig,
    "bind": csalign.BindConfig,
    "compare": csalign.CompareConfig,
    "diagnose": csalign.DiagnoseConfig,
    "evaluate": csalign.EvalConfig,
    "export": csalign.ExportConfig,
    "extract": csalign.ExtractConfig,
    "generate": csalign.GenerateConfig,
    "import_arrays": csalign.ImportConfig,
    "index": csalign.IndexConfig,
    "inspect": csalign.InspectConfig,
    "search": csalign.SearchConfig,
    "split": csalign.SplitConfig,
    "train": csalign.TrainConfig,
    "tune": csalign.TuneConfig,
}
SHORT: dict[str, Any] = {"steps": 3, "hidden": 8}


@pytest.fixture(scope="module")
def pair() -> Pair:
    """120 pairs that share a latent, both sides 12 wide."""
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(120, 6))
    images, texts = (
        (latent @ rng.normal(size=(6, 12)) + 0.3 * rng.normal(size=(120, 12))).astype(np.float32)
        for _ in range(2)
    )
    return images, texts


@pytest.fixture(scope="module")
def fitted(pair: Pair) -> csalign.Adapter:
    return csalign.fit(*pair, **SHORT)


@pytest.fixture
def stored(pair: Pair, tmp_path: Path) -> Path:
    csalign.import_arrays(images=pair[0], texts=pair[1], out=tmp_path / "stored")
    return tmp_path / "stored"


def test_dir_lists_all_that_is_public() -> None:
    assert dir(csalign) == csalign.__all__
    assert {"fit", *COMMANDS} <= set(dir(csalign))


@pytest.mark.parametrize("name", sorted(set(csalign.__all__) - {"__version__"}))
def test_the_examples_of_every_public_name_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    module = import_module(f"csalign.{(csalign._HOMES | csalign._COMMANDS)[name]}")
    found = doctest.DocTestFinder(recurse=False).find(
        getattr(csalign, name), name, module, globs=vars(module).copy()
    )
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=flags)
    for example in found:
        runner.run(example, out=report.append)

    assert runner.tries > 0
    assert not runner.failures, "".join(report)


@pytest.mark.parametrize(("name", "config"), COMMANDS.items())
def test_help_lists_every_option_with_its_description(name: str, config: type[Config]) -> None:
    function = getattr(csalign, name)
    parameters = inspect.signature(function).parameters
    text = inspect.getdoc(function) or ""

    assert set(parameters) == {*config.model_fields, "progress"}
    for option, field in config.model_fields.items():
        assert f"\n    {option} (" in text
        is_rest = parameters[option].kind is inspect.Parameter.VAR_POSITIONAL
        if not field.is_required() and not is_rest:
            assert parameters[option].default == field.get_default(call_default_factory=True)
    assert "--" not in text.partition("Options, as keywords")[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_keyword_is_named_with_the_right_call(name: str) -> None:
    function = getattr(csalign, name)

    with pytest.raises(ConfigError, match=rf"csalign.{name}: .*for instance csalign\.{name}\("):
        function(surprise=1)
    with pytest.raises(ConfigError, match=rf"csalign.{name}: takes \w+Config, not Config"):
        function(Config())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: csalign.train("f", "r", step=3), "no option step; did you mean steps"),
        (lambda: csalign.train("f"), "missing out; for instance csalign.train"),
        (lambda: csalign.train("f", "r", 3), "takes at most 2 values by position, got 3"),
        (lambda: csalign.train("f", "r", features="g"), "features is given twice"),
        (lambda: csalign.train("f", "r", cs_weight=-1), "csalign.train: cs_weight"),
        (lambda: csalign.train("f", "r", learning_rate="fast"), "csalign.train: learning_rate"),
        (lambda: csalign.train(3, "r"), "csalign.train: features"),
        (lambda: csalign.generate("p"), "takes keywords only"),
        (lambda: csalign.import_arrays(*[np.ones((2, 2))] * 3), "takes two arrays"),
        (lambda: csalign.inspect(csalign.InspectConfig(path="f"), merge=True), "do not mix"),
    ],
)
def test_a_wrong_call_is_an_error_of_one_line(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        call()

    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize("as_path", [Path, str])
def test_a_source_is_given_as_a_path(
    as_path: Callable[[Path], Any], pair: Pair, tmp_path: Path
) -> None:
    (tmp_path / "c.txt").write_text("a dog\ntwo cats\n")
    model = "timm:test_vit+none"
    with pytest.raises(ConfigError, match="encodes images only"):
        csalign.extract(as_path(tmp_path / "c.txt"), text_encoder=model, out=tmp_path / "out")

    np.savez(tmp_path / "both.npz", image=pair[0], text=pair[1])
    both = as_path(tmp_path / "both.npz")
    for number, source in enumerate((both, [both])):
        assert csalign.import_arrays(source, out=tmp_path / f"{number}").pairs == 120
    assert csalign.import_arrays(source=both, out=tmp_path / "keyword").pairs == 120
    for number, sources in enumerate((pair, [pair])):
        assert csalign.import_arrays(*sources, out=tmp_path / f"arrays{number}").pairs == 120


def test_errors_that_name_options_say_how_python_spells_them(pair: Pair, stored: Path) -> None:
    with pytest.raises(CsalignError, match="--overwrite") as caught:
        csalign.import_arrays(*pair, out=stored)

    assert "overwrite=True" in caught.value.__notes__[0]


def test_keywords_positions_and_configs_give_equal_results(stored: Path, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in "abc"]
    by_config = csalign.train(csalign.TrainConfig(features=stored, out=runs[0], **SHORT))
    by_keyword = csalign.train(features=stored, out=runs[1], **SHORT)
    by_position = csalign.train(str(stored), str(runs[2]), **SHORT)

    own = {"run": "", "seconds": 0.0}
    first, second, third = (csalign.Result(r | own) for r in (by_config, by_keyword, by_position))
    assert first == second == third
    for call in (csalign.evaluate, csalign.diagnose):
        config = COMMANDS[call.__name__]
        expected = call(config(features=stored, adapter=runs[0]))
        assert call(features=stored, adapter=runs[0]) == expected
        assert call(str(stored), adapter=str(runs[0])) == expected
        assert call(str(stored), adapter=str(runs[0]))["command"] == expected["command"]
    assert csalign.inspect(stored) == csalign.inspect(csalign.InspectConfig(path=stored))
    assert csalign.compare(runs[0], runs[1]) == csalign.compare(
        csalign.CompareConfig(systems=(runs[0], runs[1]))
    )


def test_progress_is_silent_where_nobody_looks_and_taken_by_position_or_keyword(
    stored: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    def progress(what: str, done: int, total: int | None) -> None:
        seen.append(what)

    config = csalign.DiagnoseConfig(features=stored)
    csalign.diagnose(config)
    assert capfd.readouterr().err == ""
    csalign.diagnose(config, progress)
    by_position = len(seen)
    csalign.diagnose(stored, progress=progress)

    assert by_position > 0
    assert len(seen) == 2 * by_position


def test_every_result_says_how_it_came_about(stored: Path) -> None:
    result = csalign.evaluate(stored, intervals=False)

    assert list(result)[-4:] == ["csalign_version", "date", "command", "warnings"]
    assert result["command"] == f"csalign.evaluate(features='{stored}', intervals=False)"
    assert result["csalign_version"] == csalign.__version__
    assert result["warnings"] == []


def test_warnings_are_part_of_the_result(
    pair: Pair, fitted: csalign.Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    result = csalign.evaluate(*pair, adapter=fitted, intervals=False)

    assert [text.partition(",")[0] for text in result["warnings"]] == [
        "adapter: trained on rows that are measured here (split all of arrays)"
    ]
    assert f"warning: {result['warnings'][0]}" in repr(result)
    assert "csalign-" not in caplog.text  # the name of a temporary folder


def test_two_arrays_give_recall_before_and_after(pair: Pair, fitted: csalign.Adapter) -> None:
    before = csalign.evaluate(*pair)
    after = csalign.evaluate(*pair, adapter=fitted)

    assert after["retrieval"]["mean_recall"] > before["retrieval"]["mean_recall"] + 0.3
    assert before["features"] == after["features"] == "arrays"
    assert before["adapter"] is None
    assert after["adapter"] == "adapter"
    assert "120 images, 120 texts, 120 pairs" in repr(after)
    assert "image to text R@1 %" in repr(after)


def test_arrays_take_a_label_for_each_image(pair: Pair) -> None:
    labels = np.arange(120) % 3
    found = csalign.evaluate(*pair, labels=labels, intervals=False)

    assert found == csalign.evaluate(*pair, labels=[*map(str, labels)], intervals=False)
    assert found["groups"]["v_measure"] < 0.3
    with pytest.raises(ShapeError, match="has 3 values, for 120 images"):
        csalign.evaluate(*pair, labels=labels[:3])


def test_a_diagnosis_shows_its_words_first(pair: Pair) -> None:
    found = csalign.diagnose(pair)

    assert repr(found).splitlines()[1].strip() == found["forecast"]["words"][0]


def test_a_fitted_baseline_is_not_called_trained(pair: Pair) -> None:
    found = csalign.evaluate(*pair, adapter="standardised", intervals=False)["warnings"]

    assert len(found) == 1
    assert found[0].startswith("standardised: fitted on the rows that are measured here (split all")


def test_compare_measures_adapters_on_the_arrays_beside_them(
    pair: Pair, fitted: csalign.Adapter
) -> None:
    held_out = (pair[0][:50], pair[1][:50])
    result = csalign.compare(held_out, fitted)

    assert result.to_frame()["name"].tolist() == ["arrays (no adapter)", "adapter"]
    assert [row["verdict"] for row in result["evaluations"]] == ["baseline", "better"]
    assert not [text for text in result["warnings"] if "encoder" in text]  # arrays name none
    assert csalign.compare([held_out, fitted]) == result


@pytest.mark.parametrize(
    "kind", ["numpy", "torch", "half", "bfloat16", "lists", "float64", "vectors", "frame", "column"]
)
def test_arrays_of_any_kind_are_the_same_rows(kind: str, pair: Pair) -> None:
    whole = tuple(np.round(rows * 4) / 4 + 0.125 for rows in pair)  # exact in every format
    convert: dict[str, Callable[[Any], Any]] = {
        "numpy": lambda rows: rows,
        "torch": torch.from_numpy,
        "half": lambda rows: rows.astype(np.float16),
        "bfloat16": lambda rows: torch.from_numpy(rows).to(torch.bfloat16).requires_grad_(),
        "lists": lambda rows: rows.tolist(),
        "float64": lambda rows: rows.astype(np.float64),
        "vectors": lambda rows: list(torch.from_numpy(rows)),
        "frame": lambda rows: pd.DataFrame(rows, index=range(1, 121)),
        "column": lambda rows: pd.DataFrame({"v": list(rows)}, index=range(1, 121))["v"],
    }
    found = csalign.evaluate(*map(convert[kind], whole), intervals=False)

    assert found == csalign.evaluate(*whole, intervals=False)
    assert found == csalign.evaluate(images=whole[0], texts=whole[1], intervals=False)


def test_several_texts_of_an_image_are_given_by_row_or_by_shape(pair: Pair) -> None:
    images, texts = pair
    several = np.repeat(texts, 2, axis=0) + 0.01
    by_row = csalign.evaluate(images, several, np.repeat(np.arange(120), 2), intervals=False)
    by_shape = csalign.evaluate(features=(images, several.reshape(120, 2, 12)), intervals=False)

    assert by_row == by_shape
    assert by_row["counts"] == {"images": 120, "texts": 240, "pairs": 240}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, y: (x, np.repeat(y, 3, 0)), ShapeError, r"numpy.repeat\(numpy.arange\(120\), 3"),
        (lambda x, y: (np.repeat(x, 3, 0), y), ShapeError, "swapped"),
        (lambda x, y: (x, y[:50]), ShapeError, "120 images and 50 texts"),
        (lambda x, y: (x[:, :5], y), ShapeError, "5 wide"),
        (lambda x, y: (x, y, np.arange(120) + 1), DataError, "image_of_text, row 119"),
        (lambda x, y: (x, y, np.arange(119)), ShapeError, r"image_of_text: has shape \(119,\)"),
        (lambda x, y: (x, np.where(np.arange(12) == 3, np.nan, y)), DataError, "text '0'.*finite"),
        (lambda x, y: (np.where(np.arange(120)[:, None] == 7, 0, x), y), DataError, "image '7'"),
        (lambda x, y: (x, y.astype(str)), ShapeError, "texts: contains text"),
        (lambda x, y: (x.reshape(-1, 4, 3), y), ShapeError, "images: has shape"),
    ],
)
def test_arrays_that_cannot_be_pairs_are_refused(
    change: Callable[..., Any], error: type[Exception], message: str, pair: Pair
) -> None:
    with pytest.raises(error, match=message) as caught:
        csalign.evaluate(*change(*pair))

    assert "csalign-" not in str(caught.value)  # the name of a temporary folder


def test_arrays_stand_for_paths_in_every_command(
    pair: Pair, fitted: csalign.Adapter, tmp_path: Path
) -> None:
    aligned = csalign.apply(pair, fitted, tmp_path / "aligned")
    built = csalign.index(features=pair, adapter=fitted, out=tmp_path / "index")
    found = csalign.search(pair, embedding=pair[0][:2], query_side="image", top=1)

    assert aligned.pairs == 120
    assert built["rows"] == 120
    assert [one["hits"][0]["id"] for one in found["queries"]] == ["0", "1"]
    assert csalign.search(tmp_path / "index", embedding=pair[1][0])["rows"] == 120
    assert csalign.search(tmp_path / "index", embedding=pair[1][0].tolist())["rows"] == 120
    assert csalign.diagnose(pair, adapter=fitted)["pairs"] == 120


def test_fit_keeps_the_run_where_one_is_named(pair: Pair, tmp_path: Path) -> None:
    adapter = csalign.fit(*pair, out=tmp_path / "run", **SHORT)

    expected = csalign.load_adapter(tmp_path / "run").embed_images(pair[0])
    np.testing.assert_array_equal(adapter.embed_images(pair[0]), expected)
    with pytest.raises(ConfigError, match="no option step"):
        csalign.fit(*pair, step=3)
    with pytest.raises(ShapeError, match="images: contains text, not embeddings"):
        csalign.fit("image.npy", "text.npy")


def test_a_run_of_arrays_says_how_to_measure_it(pair: Pair, tmp_path: Path) -> None:
    csalign.fit(*pair, out=tmp_path / "run", **SHORT)
    for call in (csalign.evaluate, csalign.compare):
        with pytest.raises(DataError, match=r"arrays in memory.*csalign\.compare\(\(images, text"):
            call(tmp_path / "run")

    assert csalign.evaluate(*pair, adapter=tmp_path / "run")["counts"]["pairs"] == 120


def test_a_command_is_one_function_that_can_be_pickled() -> None:
    assert csalign.train is csalign.train
    assert pickle.loads(pickle.dumps(csalign.evaluate)) is csalign.evaluate
    with pytest.raises(AttributeError, match="no attribute 'evalute'"):
        getattr(csalign, "evalute")  # noqa: B009


def test_results_are_tables_too(stored: Path, pair: Pair, tmp_path: Path) -> None:
    run = csalign.train(stored, tmp_path / "run", **SHORT)
    table = csalign.evaluate(stored).to_frame()
    row = table[(table["part"] == "image_to_text") & (table["figure"] == "R@1")].iloc[0]
    hits = csalign.search(stored, embedding=pair[1][:2], top=3).to_frame()
    study = csalign.tune(stored, tmp_path / "study", trials=2, search="noise", **SHORT)

    assert row["low"] <= row["value"] <= row["high"]
    assert run.to_frame()["weights"].tolist() == ["start", "kept"]
    assert len(hits) == 6
    assert hits.columns[0] == "query"
    assert study.to_frame()["number"].tolist() == [0, 1]
    assert csalign.compare(run.run).to_frame()["name"].tolist() == ["run"]
    assert csalign.inspect(stored).to_frame().loc[0, "counts.images"] == 120


@pytest.mark.parametrize("name", ["image", "images", "text", "texts"])
def test_a_side_is_named_by_word(name: str, pair: Pair, fitted: csalign.Adapter) -> None:
    side = csalign.Modality.of(name)
    expected = fitted.embed(side, pair[0])

    np.testing.assert_array_equal(fitted.embed(name, pair[0]), expected)
    by_method = fitted.embed_images if side == "image" else fitted.embed_texts
    np.testing.assert_array_equal(by_method(pair[0].tolist()), expected)
    assert fitted.side(name) is fitted.side(side)


def test_the_sides_of_an_adapter_differ(pair: Pair, fitted: csalign.Adapter) -> None:
    assert not np.allclose(fitted.embed("image", pair[0]), fitted.embed("text", pair[0]))


def test_inspecting_a_document_names_the_call_that_wrote_it(stored: Path, tmp_path: Path) -> None:
    written = csalign.evaluate(stored, intervals=False)
    (tmp_path / "eval.json").write_text(json.dumps(written))
    found = csalign.inspect(tmp_path / "eval.json")

    assert found["written_with"] == written["command"]
    assert found["written_on"] == written["date"]
    assert found["command"].startswith("csalign.inspect(")
    assert csalign.compare(tmp_path / "eval.json")["evaluations"][0]["verdict"] == "baseline"
