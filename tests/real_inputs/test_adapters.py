"""Adapters on features of the same width that they do not fit: every command, every mismatch."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import csalign
from csalign.adapters.checkpoint import read_info
from csalign.cli.app import app
from csalign.core.enums import Modality
from csalign.core.records import write_record
from csalign.features.schema import EncoderInfo, read_manifest, write_manifest
from csalign.features.writer import FeatureWriter, Rows

WIDTH, ROWS = 8, 60
CONE = {Modality.IMAGE: 3 * np.eye(WIDTH)[0], Modality.TEXT: 3 * np.eye(WIDTH)[1]}
IMAGE = {"image_size": [224, 224], "mean": [0.5, 0.5, 0.5], "interpolation": "bicubic"}
TEXT = {"pooling": "mean", "layer": -1, "prefix": "", "max_length": 77, "precision": "float32"}
ENCODERS = {
    Modality.IMAGE: {"spec": "timm:I", "fingerprint": "1" * 64, "preprocessing": IMAGE},
    Modality.TEXT: {"spec": "hf:A", "fingerprint": "a" * 64, "preprocessing": TEXT},
}
NOBODY: dict[str, Any] = {"spec": "unknown", "fingerprint": None, "preprocessing": {}}


def clouds(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw pairs whose sides have a mean of their own, as those of CLIP have."""
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(ROWS, WIDTH))
    images, texts = (latent + CONE[side] + 0.1 * rng.normal(size=latent.shape) for side in Modality)
    return images, texts


def write(
    folder: Path,
    image: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    *,
    seed: int = 1,
    scale: float = 1.0,
    dtype: str = "float32",
) -> Path:
    """Write pairs whose encoders differ from `ENCODERS` as said."""
    changes = {Modality.IMAGE: image or {}, Modality.TEXT: text or {}}
    infos = {
        side: EncoderInfo(**{**ENCODERS[side], "width": WIDTH, **changes[side]})
        for side in Modality
    }
    folder.mkdir()
    ids = [str(row) for row in range(ROWS)]
    with FeatureWriter(folder, infos, dtype) as writer:
        for side, rows in zip(Modality, clouds(seed), strict=True):
            columns = {"id": ids} | ({"image_id": ids} if side is Modality.TEXT else {})
            writer.write(side, Rows(columns, scale * rows))
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, trained on features of the encoders A and I."""
    root = tmp_path_factory.mktemp("fits")
    csalign.train(write(root / "features", seed=0), root / "run", steps=2, hidden=8)
    csalign.apply(root / "features", root / "run", root / "aligned")
    np.save(root / "query.npy", clouds(2)[1][:1])
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with `run` and `features` in it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cli(line: str) -> tuple[int, str]:
    """Run a command; return its exit code, and what it says, in one line."""
    result = CliRunner().invoke(app, line.split(), env={"COLUMNS": "4000"})
    return result.exit_code, " ".join(result.output.split())


COMMANDS = {
    "eval": "eval FEATURES --adapter run --report out.html",
    "apply": "apply FEATURES --adapter run --out out",
    "apply to arrays": "apply FEATURES --adapter run --out out --format npy",
    "index": "index FEATURES --adapter run --out out",
    "diagnose": "diagnose FEATURES --adapter run --report out.html",
    "compare": "compare run --features FEATURES",
    "search": "search FEATURES --adapter run --embedding query.npy --report out.html",
    "export": "export run --features FEATURES --to safetensors --out out",
}
# What differs from training, and what the message names of both.
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "other weights, same name": (
        {},
        {"fingerprint": "b" * 64},
        r"the text embeddings come from hf:A \(weights b{12}\), run was trained on hf:A "
        r"\(weights a{12}\); extract again with --text-encoder hf:A, train on these features, or "
        r"insist with --any-encoder",
    ),
    "random weights": (
        {"spec": "timm:I+none", "fingerprint": "9" * 64},
        {},
        r"image embeddings come from timm:I\+none \(weights 9{12}\), .* timm:I \(weights 1{12}\)",
    ),
    "other name, weights unknown": (
        {},
        {"spec": "hf:B", "fingerprint": None},
        r"come from hf:B, run was trained on hf:A; extract again with --text-encoder hf:A,",
    ),
    "other image size": (
        {"preprocessing": {**IMAGE, "image_size": [336, 336]}},
        {},
        r"timm:I \(image_size \[336, 336\]\), .* timm:I \(image_size \[224, 224\]\)",
    ),
    "other mean and interpolation": (
        {"preprocessing": {**IMAGE, "mean": [0.48, 0.46, 0.41], "interpolation": "bilinear"}},
        {},
        r"interpolation bilinear, mean \[0.48, .*interpolation bicubic, mean \[0.5, 0.5, 0.5\]",
    ),
    "other pooling": (
        {},
        {"spec": "hf:A?pooling=cls", "preprocessing": {**TEXT, "pooling": "cls"}},
        r"hf:A\?pooling=cls \(pooling cls\), run was trained on hf:A \(pooling mean\)",
    ),
    "other layer": (
        {},
        {"preprocessing": {**TEXT, "layer": -2}},
        r"\(layer -2\), .* \(layer -1\)",
    ),
    "other prefix": (
        {},
        {"preprocessing": {**TEXT, "prefix": "query: "}},
        r"\(prefix query: \), .* \(prefix ''\)",
    ),
    "other context length, weights unknown": (
        {},
        {"fingerprint": None, "preprocessing": {**TEXT, "max_length": 32}},
        r"\(max_length 32\), .* \(max_length 77\)",
    ),
    "sides swapped": (
        ENCODERS[Modality.TEXT],
        ENCODERS[Modality.IMAGE],
        r"image embeddings come from hf:A \(weights a{12}\), .* timm:I \(weights 1{12}\)",
    ),
    "texts of another encoder, images unknown": (
        NOBODY,
        {"spec": "hf:B", "fingerprint": "b" * 64},
        r"the text embeddings come from hf:B \(weights b{12}\)",
    ),
    "aligned already": (
        {"spec": "timm:I | run", "fingerprint": None, "preprocessing": {"adapter_sha256": "f"}},
        {"spec": "hf:A | run", "fingerprint": None, "preprocessing": {"adapter_sha256": "f"}},
        r"are aligned already \(timm:I \| run\); use the features they come from, or insist with",
    ),
    "one side aligned already": (
        {},
        {"spec": "unknown | run", "fingerprint": None, "preprocessing": {}},
        r"the text embeddings are aligned already \(unknown \| run\); use the features they come",
    ),
}


@pytest.mark.parametrize("mismatch", OTHERS)
@pytest.mark.parametrize("command", COMMANDS)
def test_other_features_are_refused_by_name_and_nothing_is_written(
    place: Path, command: str, mismatch: str
) -> None:
    image, text, named = OTHERS[mismatch]
    write(Path("other"), image, text)
    before = sorted(place.iterdir())
    code, said = cli(COMMANDS[command].replace("FEATURES", "other"))

    assert code == 1
    assert re.search(named, said), said
    assert "--any-encoder" in said
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_who_insists_gets_the_result_and_a_warning(place: Path, command: str) -> None:
    write(Path("other"), {}, {"fingerprint": "b" * 64})
    code, said = cli(COMMANDS[command].replace("FEATURES", "other") + " --any-encoder")

    assert code == 0, said
    assert said.count("warning: other: the text embeddings come from hf:A (weights bbb") == 1


# What differs without harm.
SAME: dict[str, dict[str, Any]] = {
    "the same": {},
    "half precision": {"dtype": "float16"},
    "not of norm 1": {"scale": 40.0},
    "renamed": {"text": {"spec": "hf:/home/me/copy"}},
    "run in bfloat16, tokenizer elsewhere": {
        "text": {"preprocessing": {**TEXT, "precision": "bfloat16", "tokenizer": "/x/y"}}
    },
    "preprocessing partly recorded": {"image": {"preprocessing": {"image_size": [224, 224]}}},
    "a setting of another version": {"image": {"preprocessing": {**IMAGE, "resize": "x"}}},
}


@pytest.mark.parametrize("case", SAME)
def test_the_same_encoder_is_accepted_in_silence(place: Path, case: str) -> None:
    write(Path("same"))
    write(Path("other"), **SAME[case])
    code, said = cli("eval other --adapter run")
    figures = [
        csalign.evaluate(one, adapter="run")["gap"]["centroid_distance"]
        for one in ("same", "other")
    ]

    assert code == 0
    assert "warning: other: may" not in said
    assert figures[0] == pytest.approx(figures[1], rel=1e-2)


# What cannot be known is warned of, once.
UNKNOWN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "both sides imported": (
        NOBODY,
        NOBODY,
        r"other: may come from other encoders than run was trained on \(image: no encoder "
        r"recorded, there timm:I; text: no encoder recorded, there hf:A\)",
    ),
    "texts imported": (
        {},
        NOBODY,
        r"other: may come .* run was trained on \(text: no encoder recorded, there hf:A\)",
    ),
    "named at import": (
        {},
        {"fingerprint": None, "preprocessing": {}},
        r"run was trained on \(text: hf:A by its name, weights unknown\)",
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown_encoders_are_warned_of_once(place: Path, command: str, case: str) -> None:
    image, text, named = UNKNOWN[case]
    write(Path("other"), image, text)
    code, said = cli(COMMANDS[command].replace("FEATURES", "other"))

    assert code == 0, said
    assert len(re.findall(named, said)) == 1, said


def test_a_run_of_an_older_version_compares_names(place: Path) -> None:
    info = read_info(Path("run"))
    old = {"encoder_fingerprints": None, "encoder_settings": None, "csalign_version": "0.1.0"}
    write_record(Path("run/adapter.json"), info.model_copy(update=old))
    Path("run/environment.json").unlink()
    write(Path("same"))
    write(Path("other"), {}, {"spec": "hf:B"})

    assert "text: hf:A by its name, weights unknown" in cli("eval same --adapter run")[1]
    assert "come from hf:B, run was trained on hf:A;" in cli("eval other --adapter run")[1]


# How rows that apply wrote come back.
@pytest.mark.parametrize(
    "line",
    [
        "import out/images.npy out/texts.npy",
        "import out/images.npy out/texts.npy --image-encoder timm:I --text-encoder hf:A",
        "import --images features/images --texts out/texts.npy",
        "import --images aligned/images --texts aligned/texts",
        "import clip --pair-by order",
    ],
)
def test_aligned_rows_that_are_imported_stay_aligned(place: Path, line: str) -> None:
    for form, out in (("npy", "out"), ("clip-retrieval", "clip")):
        csalign.apply("features", "run", out, format=form)
    assert cli(f"{line} --out again")[0] == 0
    encoders = read_manifest(Path("again")).encoders
    code, said = cli("apply again --adapter run --out twice")

    assert encoders.text is not None
    assert encoders.text.spec == "hf:A | run"
    assert code == 1
    assert re.search(r"again: the (text|image) embeddings are aligned already \(", said), said
    assert not Path("twice").exists()


def test_aligned_queries_fit_an_index_of_aligned_rows_only(place: Path) -> None:
    csalign.apply("features", "run", "out", format="npy")
    csalign.index("features", "mapped", adapter="run")
    csalign.index("aligned", "stored")
    code, said = cli("search mapped --embedding out/texts.npy --top 1")

    assert code == 1
    assert "the query: the text embeddings are aligned already (hf:A | run); use the feat" in said
    assert cli("search stored --embedding out/texts.npy --top 1")[0] == 0


def test_words_for_aligned_rows_are_answered_with_the_index_that_takes_them(place: Path) -> None:
    assert "next: csalign eval out" in cli("apply features --adapter run --out out")[1]
    how = "index the features that they came from: csalign index FEATURES --adapter run"
    code, said = cli("index out --out stored")
    assert code == 0
    assert how in said
    assert "next: csalign search stored --embedding query.npy" in said
    for line in ("search stored dog", "search out dog", "search stored --image dog.png"):
        code, said = cli(line)
        assert (code, how in said) == (1, True), said


def test_a_label_of_an_encoder_is_not_offered_as_one_to_load(place: Path) -> None:
    label = {"spec": "efficientnet-lite0 (ImageNet), pooled", "fingerprint": None}
    csalign.train(write(Path("labelled"), label), "own", steps=0)
    code, said = cli("eval features --adapter own")

    assert code == 1
    assert "import embeddings of that encoder, or train on these features, or insist" in said
    assert "--image-encoder" not in said


def test_features_that_are_imported_again_keep_their_encoders(place: Path) -> None:
    assert cli("import --images features/texts --texts features/images --out swapped")[0] == 0
    code, said = cli("eval swapped --adapter run")

    assert code == 1
    assert "image embeddings come from hf:A (weights aaaaaaaaaaaa), run was trained on " in said


def test_a_second_stage_says_which_run_comes_first(place: Path) -> None:
    csalign.train("aligned", "second", steps=0)
    write(Path("other"))
    code, said = cli("eval other --adapter second")

    assert code == 1
    assert "come from timm:I, second was trained on timm:I | run; align them with csalign" in said


def test_further_sets_of_another_encoder_are_not_trained_on(place: Path) -> None:
    write(Path("more"), {}, {"fingerprint": "b" * 64})
    train = "train features --unpaired more --out new --steps 2 --hidden 8"
    code, said = cli(train)

    assert code == 1
    assert "more: the text embeddings come from hf:A (weights bbbbbbbbbbbb), features come" in said
    assert not Path("new").exists()
    assert not Path("new.partial").exists()
    assert cli(f"{train} --any-encoder")[0] == 0


def test_an_index_is_searched_with_its_own_encoder(
    tiny_clip: tuple[Path, Path], place: Path
) -> None:
    spec = "open_clip:{}+{}".format(*tiny_clip)
    Path("captions.txt").write_text("\n".join(f"a {word}" for word in ("cat", "dog", "cup")))
    assert cli(f"extract captions.txt --text-encoder {spec} --image-encoder none --out f")[0] == 0
    manifest = read_manifest(Path("f"))
    assert manifest.encoders.text is not None
    assert cli("index f --side text --out same")[0] == 0
    changes: dict[str, dict[str, Any]] = {
        "cut": {"preprocessing": {**manifest.encoders.text.preprocessing, "context_length": 5}},
        "adapted": {"spec": f"{spec} | run"},
    }
    for name, change in changes.items():
        own = manifest.encoders.text.model_copy(update=change)
        encoders = manifest.encoders.model_copy(update={"text": own})
        write_manifest(Path("f"), manifest.model_copy(update={"encoders": encoders}))
        assert cli(f"index f --side text --out {name}")[0] == 0

    def search(index: str, *options: str) -> tuple[int, str]:
        return cli(f"search {index} --text cat --encoder {' '.join([spec, *options])}")

    assert search("same")[0] == 0
    code, said = search("cut")
    assert code == 1
    assert re.search(r"\(context_length \d\d\), cut was built from", said), said
    assert "(context_length 5); name that encoder with --encoder" in said
    assert search("cut", "--any-encoder")[0] == 0
    code, said = search("adapted")
    assert code == 1
    assert "adapted was built from open_clip:tiny-clip.json+tiny-clip.safetensors | run" in said


def test_runs_of_different_encoders_are_compared_on_features_of_one_only(place: Path) -> None:
    write(Path("other"), {}, {"fingerprint": "b" * 64})
    csalign.train("other", "another", steps=0)

    code, said = cli("compare run another")
    assert code == 0
    assert "not paired" in said
    code, said = cli("compare run another --features features")
    assert code == 1
    assert "another was trained on hf:A (weights bbbbbbbbbbbb)" in said
