"""Checkpoints, paths, stand-ins of files and texts as people have them: read, or said what is."""

import argparse
import gzip
import json
import logging
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from PIL import Image

from csalign.adapters.checkpoint import read_info
from csalign.core.enums import Modality
from csalign.core.errors import CsalignError, EncoderError
from csalign.core.paths import DOCUMENTS, require_kind
from csalign.core.records import read_object
from csalign.encoders.base import EncoderOptions, load_encoders
from csalign.ingest.config import ExtractConfig, ImportConfig
from csalign.ingest.extract import extract
from csalign.ingest.import_arrays import import_arrays

Clip = tuple[Path, Path]
CPU = EncoderOptions(torch.device("cpu"))
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4665a5\nsize 605157884\n"
VISUAL = "visual."


def prefixed(state: Any, prefix: str) -> dict[str, Any]:
    return {f"{prefix}{name}": values for name, values in state.items()}


def tower(state: Any, *, image: bool) -> dict[str, Any]:
    return {name: own for name, own in state.items() if name.startswith(VISUAL) == image}


def other(state: Any) -> dict[str, Any]:
    return {name: values + 1 for name, values in state.items()}


SAME: dict[str, Callable[[Any], Any]] = {
    "DistributedDataParallel": lambda s: prefixed(s, "module."),
    "torch.compile of DDP": lambda s: {"state_dict": prefixed(s, "_orig_mod.module.")},
    "open_clip training": lambda s: {
        "epoch": 3,
        "state_dict": prefixed(s, "module."),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
    },
    "Lightning": lambda s: {
        "state_dict": prefixed(s, "model.clip.") | {"loss.weight": torch.ones(3)}
    },
    "half of it wrapped": lambda s: (
        tower(s, image=False) | prefixed(tower(s, image=True), "module.")
    ),
    "every other name wrapped": lambda s: {
        f"{'module.' * (n % 2)}{k}": s[k] for n, k in enumerate(s)
    },
    "nested": lambda s: {"checkpoint": {"model_state_dict": prefixed(s, "net.")}},
    "equal twice": lambda s: {"model": s, "ema": {name: own.clone() for name, own in s.items()}},
    "half precision names of OpenAI": lambda s: s | {"context_length": torch.tensor(20)},
    "without the scale": lambda s: {k: own for k, own in s.items() if k != "logit_scale"},
}
NOT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "two sets": (lambda s: {"model": s, "ema": other(s)}, "twice, behind 'model' and 'ema'"),
    "image tower": (lambda s: tower(s, image=True), "the image tower alone; pass it as --image-en"),
    "text tower": (lambda s: tower(s, image=False), "the text tower alone; pass it as --text-enc"),
    "few missing": (
        lambda s: {k: own for k, own in s.items() if "ln_post" not in k},
        "lacks 2 of 62 tensors, such as visual.ln_post.weight",
    ),
    "deeper": (
        lambda s: s | {"visual.transformer.resblocks.2.ln_1.weight": torch.ones(24)},
        "it has 1 tensors more, such as visual.transformer.resblocks.2",
    ),
    "wider": (
        lambda s: s | {"visual.proj": torch.ones(24, 32)},
        "visual.proj has shape (24, 32), the model has (24, 16)",
    ),
    "8 bit": (
        lambda s: s | {"visual.proj": torch.ones(24, 16, dtype=torch.int8)},
        "visual.proj is quantised as torch.int8); save it unquantised",
    ),
    "transformers": (
        lambda _: {"vision_model.embeddings.class_embedding": torch.ones(24)},
        "has the layout of transformers; name the same model in open_clip",
    ),
    "timm": (lambda _: {"patch_embed.proj.weight": torch.ones(2, 2)}, "timm:MODEL+FILE"),
    "LoRA": (lambda _: {"base.q.lora_A.weight": torch.ones(2, 2)}, "it has LoRA weights; merge"),
    "a list": (lambda _: [1, 2], "contains no weights"),
}


@pytest.fixture(scope="module")
def state(tiny_clip: Clip) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(tiny_clip[1])


def fingerprint(model: Path, weights: Path) -> str | None:
    image = load_encoders(f"open_clip:{model}+{weights}", None, CPU).image
    assert image is not None
    return image.info.fingerprint


@pytest.mark.parametrize("form", SAME)
def test_weights_are_found_behind_what_wraps_them(
    tiny_clip: Clip, state: Any, tmp_path: Path, form: str
) -> None:
    torch.save(SAME[form](state), tmp_path / "w.ckpt")
    spec = f"open_clip:{tiny_clip[0]}+{tmp_path / 'w.ckpt'}"
    texts = ["a dog", "two"]

    found, plain = (
        load_encoders(None, own, CPU).text
        for own in (spec, f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}")
    )

    assert found is not None
    assert plain is not None
    np.testing.assert_array_equal(found.embed(texts).embeddings, plain.embed(texts).embeddings)
    if form != "without the scale":
        assert found.info.fingerprint == plain.info.fingerprint


def test_files_of_one_checkpoint_are_read_by_their_index(
    tiny_clip: Clip, state: Any, tmp_path: Path
) -> None:
    files = {f"model-0000{k + 1}-of-00002.safetensors": list(state)[k::2] for k in (0, 1)}
    for file, names in files.items():
        safetensors.torch.save_file({name: state[name] for name in names}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {k: f for f, own in files.items() for k in own}}))

    assert fingerprint(tiny_clip[0], index) == fingerprint(*tiny_clip)
    with pytest.raises(EncoderError, match=r"one of 2 files, pass the \.index\.json beside"):
        fingerprint(tiny_clip[0], tmp_path / next(iter(files)))


@pytest.mark.parametrize("prefix", ["visual.", "", "module.visual."])
def test_an_image_tower_alone_encodes_images(
    tiny_clip: Clip, state: Any, tmp_path: Path, prefix: str
) -> None:
    own = {f"{prefix}{k.removeprefix(VISUAL)}": v for k, v in tower(state, image=True).items()}
    torch.save(own, tmp_path / "tower.pt")
    pixels = torch.rand(2, 3, 32, 32)

    found, plain = (
        load_encoders(f"open_clip:{tiny_clip[0]}+{path}", None, CPU).image
        for path in (tmp_path / "tower.pt", tiny_clip[1])
    )

    assert found is not None
    assert plain is not None
    np.testing.assert_array_equal(found.embed(pixels).embeddings, plain.embed(pixels).embeddings)


@pytest.mark.parametrize("form", NOT)
def test_what_are_no_weights_of_the_model_is_said(
    tiny_clip: Clip, state: Any, tmp_path: Path, form: str
) -> None:
    make, said = NOT[form]
    torch.save(make(state), tmp_path / "w.pt")
    spec = f"open_clip:{tiny_clip[0]}+{tmp_path / 'w.pt'}"

    with pytest.raises(EncoderError) as caught:
        load_encoders(spec, spec, CPU)

    assert said in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "w.pt"))


PICKLED: dict[str, Callable[[], Any]] = {
    "argparse.Namespace": lambda: {"state_dict": {}, "args": argparse.Namespace(lr=1)},
    "torch.nn.modules.linear.Linear": lambda: torch.nn.Linear(2, 2),
}


@pytest.mark.parametrize("kind", PICKLED)
def test_an_object_beside_weights_is_named_with_the_line_that_saves_them(
    tiny_clip: Clip, tmp_path: Path, kind: str
) -> None:
    torch.save(PICKLED[kind](), tmp_path / "w.pt")

    with pytest.raises(EncoderError) as caught:
        fingerprint(tiny_clip[0], tmp_path / "w.pt")

    assert f"contains a pickled {kind}, which may run code" in str(caught.value)
    assert f"torch.load('{tmp_path / 'w.pt'}', weights_only=False)" in str(caught.value)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("name", ["w.pt", "old.pt", "w.safetensors"])
def test_a_file_that_ends_early_is_incomplete(
    tiny_clip: Clip, state: Any, tmp_path: Path, name: str, share: float
) -> None:
    path = tmp_path / name
    if name.endswith(".pt"):
        torch.save(state, path, _use_new_zipfile_serialization=name == "w.pt")
    else:
        safetensors.torch.save_file(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])

    with pytest.raises(EncoderError, match=r"incomplete or damaged\); download or copy it again"):
        fingerprint(tiny_clip[0], path)


def test_an_archive_of_torchscript_is_named_with_the_line_that_converts_it(
    tiny_clip: Clip, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and OpenAI's files are in it
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-B-32.pt")

    with pytest.raises(EncoderError, match=r"TorchScript archive.*torch\.jit\.load\('.*state_dict"):
        fingerprint(tiny_clip[0], tmp_path / "ViT-B-32.pt")


STAND_INS = {
    "is a Git LFS pointer": LFS.encode(),
    "is a git-annex pointer": b"/annex/objects/MD5E-s4--ab.npy\n",
    "is a web page": b"\n<!DOCTYPE html><html><title>Sign in</title>",
    "is the error message of a server": b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code>',
    "is compressed": gzip.compress(b"x" * 99),
    "begins with zeros alone": bytes(5000),
    "is empty": b"",
}


@pytest.mark.parametrize("said", STAND_INS)
@pytest.mark.parametrize(
    "name",
    ["a.jpg", "a.npy", "a.parquet", "a.safetensors", "a.pt", "t.csv", "adapter.json", "weights"],
)
def test_what_stands_where_a_file_should_be_is_named(
    tiny_clip: Clip, tmp_path: Path, name: str, said: str
) -> None:
    path = tmp_path / "in" / name
    path.parent.mkdir()
    path.write_bytes(STAND_INS[said])
    spec, out = f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}", tmp_path / "out"

    use: dict[str, Callable[[], Any]] = {
        "a.jpg": lambda: extract(ExtractConfig(source=str(path.parent), out=out, encoder=spec)),
        "t.csv": lambda: extract(ExtractConfig(source=str(path), out=out, encoder=spec)),
        "adapter.json": lambda: read_info(path.parent),
        "weights": lambda: fingerprint(tiny_clip[0], path),
    }

    with pytest.raises(CsalignError) as caught:
        use.get(name, lambda: import_arrays(ImportConfig(images=path, out=out)))()

    assert said in str(caught.value) or (said == "is empty" and name in ("t.csv", "adapter.json"))
    assert name in str(caught.value)


@pytest.mark.parametrize("kind", ["adapter.json", "manifest.json", "index.json"])
def test_folders_of_pointers_are_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / kind).write_text(LFS)
    require_kind(tmp_path, next(k for k, name in DOCUMENTS.items() if name == kind))
    with pytest.raises(CsalignError, match=f"{kind}: is a Git LFS pointer.*git lfs pull"):
        read_object(tmp_path / kind, "make it again")


def nfd(name: str) -> str:
    return unicodedata.normalize("NFD", name)


SPELLINGS = {
    "one composed, one not": ("café.png", nfd("café.png")),
    "percent": ("a%20b%26c.png", "a b&c.png"),
    "stored with percent": ("a b.png", "a%20b.png"),
    "backslash": ("sub\\deep\\x.png", "sub/deep/x.png"),
    "case": ("Sub/IMG_1.PNG", "sub/img_1.png"),
    "quotes": ("'x.png'", "x.png"),
    "folder too": ("B\u00fccher%202/x.png", nfd("B\u00fccher 2/x.png")),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("beside", [True, False])
def test_images_are_found_where_their_paths_differ_in_spelling_alone(
    tiny_clip: Clip, tmp_path: Path, caplog: Any, spelling: str, beside: bool
) -> None:
    written, stored = SPELLINGS[spelling]
    folder = tmp_path / "pictures"
    (folder / stored).parent.mkdir(parents=True)
    Image.new("RGB", (40, 32), (80, 40, 200)).save(folder / stored)
    Image.new("RGB", (40, 32), (0, 90, 0)).save(folder / "exact.png")
    table = (folder if beside else tmp_path) / "captions.jsonl"
    rows = [{"image": written, "caption": "one"}, {"image": "exact.png", "caption": "two"}]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))

    with caplog.at_level(logging.WARNING):
        result = extract(
            ExtractConfig(
                source=str(folder if beside else table),
                images=None if beside else folder,
                encoder=f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}",
                out=tmp_path / "out",
            )
        )

    assert (result.images, result.texts, result.pairs) == (2, 2, 2)
    assert "spelled otherwise on the disk" in caplog.text
    images = pq.read_table(tmp_path / "out" / "images").to_pylist()
    texts = pq.read_table(tmp_path / "out" / "texts").to_pylist()
    owner = {row["caption"]: row["image_id"] for row in texts}["one"]
    assert next(row["source"] for row in images if row["id"] == owner).endswith(stored)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (
            "C:\\data\\in\\x.png",
            "is a path of Windows, write where the file is here; did you mean 'x.png'?",
        ),
        ("A.png", "did you mean 'a.PNG' or 'a.png'?"),
        ("..\\..\\x.png", "unknown image"),
        ("%2e%2e/x.png", "unknown image"),
        ("nothing.png", "correct the path, which starts from"),
    ],
)
def test_a_path_that_may_mean_no_or_several_files_is_said(
    tiny_clip: Clip, tmp_path: Path, written: str, said: str
) -> None:
    for name in ("x.png", "in/x.png", "in/a.png", "in/a.PNG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 32)).save(tmp_path / name)
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": written, "caption": "one"}))
    encoder = f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}"

    with pytest.raises(CsalignError) as caught:
        extract(
            ExtractConfig(
                source=str(tmp_path / "t.jsonl"),
                images=tmp_path / "in",
                encoder=encoder,
                out=tmp_path / "out",
            )
        )

    assert said in str(caught.value)


def test_a_source_that_is_misspelt_is_suggested(tmp_path: Path) -> None:
    (tmp_path / nfd("Büro")).mkdir()

    with pytest.raises(CsalignError, match=r"no such file or folder; did you mean '.*Bu.ro'"):
        extract(ExtractConfig(source=str(tmp_path / "büro"), out=tmp_path / "out"))


def test_captions_that_are_cut_are_counted_also_in_resumed_parts(
    tiny_clip: Clip, tmp_path: Path, caplog: Any
) -> None:
    captions = ["a dog " * 9 + "runs", "a dog " * 9, "two", "cat " * 40, "", "a dog " * 10]
    (tmp_path / "c.txt").write_text("\n".join(captions))
    spec = f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}"
    options: dict[str, Any] = {
        **{"source": str(tmp_path / "c.txt"), "text_encoder": spec, "image_encoder": "none"},
        **{"out": tmp_path / "out", "part_rows": 2},
    }
    extract(ExtractConfig(**options, shard="0/2"))

    with caplog.at_level(logging.WARNING):
        extract(ExtractConfig(**options, shard="1/2"))

    assert (
        "3 of 5 captions (60.0 %) are longer than the 20 tokens that "
        f"{spec} encodes, and were cut there (the longest has 42 tokens)" in caplog.text
    )


@pytest.mark.parametrize("form", [".csv", ".parquet"])
def test_a_side_that_is_skipped_is_not_missed(
    tiny_clip: Clip, tmp_path: Path, caplog: Any, form: str
) -> None:
    table = pd.DataFrame({"caption": ["a crane", "a dog"], "class": ["0", "1"]})
    path = tmp_path / f"prompts{form}"
    table.to_csv(path, index=False) if form == ".csv" else table.to_parquet(path)
    spec = f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}"
    options: dict[str, Any] = {"source": str(path), "text_encoder": spec, "image_encoder": "none"}

    assert extract(ExtractConfig(**options, out=tmp_path / "out")).texts == 2
    assert "no column looks like" not in caplog.text


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    config = transformers.BertConfig(
        **{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8},
        **{"intermediate_size": 8, "max_position_embeddings": 12},
    )
    folder = tmp_path / "bert"
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "a": 4, "dog": 5}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return folder


def test_a_transformers_encoder_counts_what_it_cuts(bert: Path) -> None:
    encoder: Any = load_encoders(None, f"hf:{bert}", CPU).text
    encoder.cut.clear()

    encoder.embed(["a dog", "a " * 10, "a " * 11, "dog " * 30])

    assert encoder.cut == [13, 32]


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tok*"):
        path.unlink()


def st_modules(folder: Path, *modules: tuple[str, str]) -> None:
    listed = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules
    ]
    (folder / "modules.json").write_text(json.dumps(listed))


def old_layout(folder: Path) -> None:
    inner = folder / "0_Transformer"
    inner.mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(inner / path.name)
    st_modules(folder, ("0_Transformer", "Transformer"), ("1_Pooling", "Pooling"))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tokenizer": (no_tokenizer, "has no tokenizer, or one that knows no word"),
    "weights": (lambda f: (f / "model.safetensors").write_text(LFS), "is a Git LFS pointer"),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text(LFS), "is a Git LFS pointer"),
    "old layout": (old_layout, "its transformer is in 0_Transformer; pass hf:"),
    "dense": (
        lambda f: st_modules(f, ("", "Transformer"), ("2_Dense", "Dense")),
        "has 2_Dense (sentence_transformers.models.Dense), which is not supported",
    ),
    "CNN": (lambda f: st_modules(f, ("", "Transformer"), ("1_CNN", "CNN")), "has 1_CNN"),
    "adapter": (
        lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "roberta"}'),
        "is a PEFT adapter of roberta; pip install peft, or save model.merge_and_unload()",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_of_transformers_that_lacks_something_says_what(bert: Path, what: str) -> None:
    damage, said = BROKEN[what]
    damage(bert)

    with pytest.raises(EncoderError) as caught:
        load_encoders(None, f"hf:{bert}", CPU)

    assert said in str(caught.value)


VECTORS = np.random.default_rng(0).normal(size=(6, 1200)).astype("float32")
TEXTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "JSON": (lambda row: json.dumps(row.tolist()), "df['embedding'].map(json.loads)"),
    "NumPy": (lambda row: str(row), "numpy.fromstring(v.strip('[]'), sep=' ')"),
    "bytes": (lambda row: row.tobytes(), "numpy.frombuffer(v, 'float32')"),
    "a list of one": (lambda row: [row.tolist()], "df['embedding'].str[0]"),
}


@pytest.mark.parametrize("form", TEXTS)
def test_vectors_in_another_form_bring_the_line_that_converts_them(
    tmp_path: Path, form: str
) -> None:
    write, said = TEXTS[form]
    frame = pd.DataFrame({"id": range(6), "embedding": [write(row) for row in VECTORS[:, :8]]})
    frame.to_parquet(tmp_path / "x.parquet")

    with pytest.raises(CsalignError) as caught:
        import_arrays(ImportConfig(images=tmp_path / "x.parquet", out=tmp_path / "out"))

    assert said in str(caught.value)


def test_vectors_that_numpy_shortened_are_lost(tmp_path: Path) -> None:
    pd.DataFrame({"embedding": [str(row) for row in VECTORS]}).to_parquet(tmp_path / "x.parquet")

    with pytest.raises(CsalignError, match="numbers are lost; write the vectors again"):
        import_arrays(ImportConfig(images=tmp_path / "x.parquet", out=tmp_path / "out"))


@pytest.mark.parametrize("first", [0, 1])
def test_a_column_per_dimension_is_a_side(tmp_path: Path, first: int) -> None:
    columns = {
        f"{side}_emb_{k + first}": sign * VECTORS[:, k]
        for side, sign in (("img", 1), ("txt", -1))
        for k in reversed(range(12))
    }
    pd.DataFrame(columns | {"caption": list("abcdef")}).to_parquet(tmp_path / "x.parquet")

    import_arrays(ImportConfig(source=tmp_path / "x.parquet", out=tmp_path / "out"))

    for side, sign in ((Modality.IMAGE, 1), (Modality.TEXT, -1)):
        rows = pq.read_table(tmp_path / "out" / side.plural)["embedding"].to_pylist()
        np.testing.assert_array_equal(np.array(rows, np.float32), sign * VECTORS[:, :12])
