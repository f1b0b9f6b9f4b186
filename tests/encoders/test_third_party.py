import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from csalign.core.enums import Modality
from csalign.core.errors import EncoderError
from csalign.encoders.base import EncoderOptions, load_encoders

CPU = torch.device("cpu")
MODULE = dedent(
    """
    import numpy as np
    import torch

    from csalign.encoders.base import Embedded
    from csalign.core.enums import Modality
    from csalign.features.schema import EncoderInfo


    class Images:
        batch_size = 4

        def __init__(self, argument, options):
            self.info = EncoderInfo(spec="mine", width=2, preprocessing={"argument": argument})

        def preprocess(self, image):
            return torch.tensor(np.array(image.resize((3, 2)))).permute(2, 0, 1).float()

        def embed(self, pixels):
            means = pixels.mean(dim=(1, 2)).double().numpy()[:, :2]
            return Embedded(means, list(pixels.flatten(2).mT.numpy()))


    class Texts:
        batch_size = 4

        def __init__(self, argument, options):
            self.info = EncoderInfo(spec="mine", width=1, preprocessing={"argument": argument})

        def embed(self, texts):
            lengths = np.array([[len(text)] for text in texts], np.float32)
            return Embedded(lengths, [np.ones((len(text), 5), np.float16) for text in texts])


    def make(argument, side, options):
        return (Images if side is Modality.IMAGE else Texts)(argument, options)
    """
)
MakeModule = Callable[[str], str]


@pytest.fixture
def make_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeModule:
    """A function that makes a module of that content importable and returns its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(extra: str = "") -> str:
        name = f"encoders_of_{tmp_path.name}".replace("-", "_")
        package = tmp_path / name
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "mine.py").write_text(MODULE + dedent(extra))
        return f"{name}.mine"

    return make


def noise(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)) for _ in range(count)]


def test_a_callable_of_a_module_makes_both_sides(make_module: MakeModule) -> None:
    spec = f"{make_module('')}:make+some/argument+x"
    options = EncoderOptions(CPU, tokens=tuple(Modality), token_space="hidden", max_tokens=4)

    image, text = load_encoders(spec, spec, options)

    assert image is not None
    assert text is not None
    pixels = torch.stack([image.preprocess(own) for own in noise(3)])
    images, texts = image.embed(pixels), text.embed(["abc", "", "abcdef"])
    assert images.embeddings.shape == (3, 2)
    assert images.embeddings.dtype == np.float32
    assert texts.embeddings.ravel().tolist() == [3, 0, 6]
    assert images.tokens is not None
    assert texts.tokens is not None
    assert [own.shape for own in images.tokens] == [(4, 3)] * 3
    assert [own.shape for own in texts.tokens] == [(3, 5), (0, 5), (4, 5)]
    assert texts.tokens[0].dtype == np.float32
    assert (image.batch_size, text.batch_size) == (4, 4)
    for encoder, width in ((image, 3), (text, 5)):
        assert encoder.info.spec == spec
        assert (encoder.info.token_width, encoder.info.token_space) == (width, "hidden")
        assert encoder.info.preprocessing == {"argument": "some/argument+x", "max_tokens": 4}


def test_tokens_nobody_asked_for_are_dropped(make_module: MakeModule) -> None:
    encoder = load_encoders(None, f"{make_module('')}:make", EncoderOptions(CPU)).text

    assert encoder is not None
    assert encoder.embed(["a"]).tokens is None
    assert encoder.info.token_width is None
    assert encoder.info.token_space is None


def test_an_entry_point_is_found_by_its_name(make_module: MakeModule, tmp_path: Path) -> None:
    module = make_module("")
    folder = tmp_path / "mine-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(
        f"[csalign.encoders]\nmine = {module}:make\nbroken = {module}:gone\n"
    )

    encoder = load_encoders("mine:a/b:c+d", None, EncoderOptions(CPU)).image

    assert encoder is not None
    assert encoder.info.preprocessing == {"argument": "a/b:c+d"}
    with pytest.raises(EncoderError, match=r"broken:x: failed to import \(AttributeError: "):
        load_encoders("broken:x", None, EncoderOptions(CPU))


def test_nothing_is_imported_that_is_not_named(make_module: MakeModule) -> None:
    module = make_module("")

    load_encoders("timm:test_vit+none", None, EncoderOptions(CPU))

    assert module not in sys.modules


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ("import no_such_thing", "failed to import (ModuleNotFoundError: No module named 'no_su"),
        ("1 / 0", "failed to import (ZeroDivisionError: division by zero)"),
        ("make = 3", "has no callable 'make'"),
        ("def make(a): pass", "failed to load (TypeError: make() takes 1 positional"),
        ("def make(*a): raise KeyError('x\\ny')", "failed to load (KeyError: 'x"),
        ("def make(*a): return None", "failed to describe (AttributeError: 'NoneType' object"),
        ("Texts.batch_size = 0", "its batch_size is 0, not a positive int"),
        ("Texts.__init__ = lambda self, *a: setattr(self, 'info', 3)", "its info is int, not an"),
        ("Texts.embed = lambda self, texts: 1 / 0", "failed to embed texts (ZeroDivisionError"),
        ("Texts.embed = lambda self, texts: np.ones(3)", "it returns ndarray (3,) of float64, not"),
        ("Texts.embed = lambda self, texts: (np.ones((1, 1)), None)", "ndarray (1, 1) of float64"),
        ("Texts.embed = lambda self, texts: (np.ones((2, 1), int), None)", "ndarray (2, 1) of int"),
        ("Texts.embed = lambda self, texts: (torch.ones(2, 1), None)", "Tensor (2, 1) of torch.fl"),
        ("Texts.embed = lambda self, texts: (np.ones((2, 3)), [])", "tokens of 0 items for 2"),
        ("Texts.embed = lambda self, texts: (np.ones((2, 3)), None)", "it returns no tokens"),
        (
            "Texts.embed = lambda self, texts: (np.ones((2, 1)), [np.ones((1, 2)), np.ones(2)])",
            "its tokens are ndarray (2,) of float64, not (t, d_t) floats of one width",
        ),
        (
            "Texts.embed = lambda self, texts: (np.ones((2, 3)), [np.ones((1, 2))] * 2)",
            "its info says width 1, its embeddings have 3",
        ),
        (
            "Texts.embed = lambda self, t: (np.full((2, 1), np.nan), [np.ones((1, 2))] * 2)",
            "its embeddings are not finite",
        ),
    ],
)
def test_what_is_wrong_with_an_encoder_is_one_line(
    make_module: MakeModule, extra: str, problem: str
) -> None:
    spec = f"{make_module(extra)}:make"

    with pytest.raises(EncoderError) as caught:
        load_encoders(None, spec, EncoderOptions(CPU, tokens=[Modality.TEXT]))

    assert str(caught.value).startswith(f"{spec}: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pixels_have_to_be_a_tensor(make_module: MakeModule) -> None:
    spec = f"{make_module('Images.preprocess = lambda self, image: np.array(image)')}:make"

    with pytest.raises(EncoderError, match=r"its preprocess returns ndarray \(48, 64, 3\)"):
        load_encoders(spec, None, EncoderOptions(CPU))


def test_later_batches_are_held_to_the_shape_of_the_first(make_module: MakeModule) -> None:
    extra = """
    def embed(self, texts):
        return Embedded(np.ones((len(texts), 1 + (len(texts) > 2))), None)
    Texts.embed = embed
    """
    encoder: Any = load_encoders(None, f"{make_module(extra)}:make", EncoderOptions(CPU)).text

    with pytest.raises(EncoderError, match="its embeddings changed width: 1, 2"):
        encoder.embed(["a", "b", "c"])
