"""Trained adapters in other programs: behind an open_clip model, and as ONNX graphs."""

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from csalign.adapters.checkpoint import load_adapter
from csalign.adapters.model import Adapter
from csalign.adapters.side import SideAdapter
from csalign.core.arrays import Array
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, OutputError, ShapeError, reason_of

INPUT, OUTPUT = "embeddings", "aligned"
EXAMPLE_ROWS = 3  # not 0 or 1, which torch.export would treat as constants


class AlignedClip(nn.Module):
    """An encoder of images and texts followed by an adapter, with open_clip's methods."""

    def __init__(self, encoder: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        for side in Modality:
            if side not in adapter.names:
                raise ConfigError(
                    f"wrap: the adapter has no {side.plural}, its sides are "
                    f"{', '.join(adapter.names)}; use its embed"
                )
            if adapter.side(side).embeds_with_tokens:
                raise ConfigError(
                    f"the adapter embeds {side.plural} with their tokens, which encode_{side} does "
                    "not give; train one without --tokens and --token-weight"
                )
        self.encoder = encoder
        self.adapter = adapter
        self.eval()

    def encode_image(self, image: Tensor, normalize: bool = True) -> Tensor:
        """Align preprocessed images (n, 3, h, w): (n, width) float32, always of norm 1."""
        return self._aligned(Modality.IMAGE, self.encoder.encode_image(image))  # type: ignore[operator]

    def encode_text(self, text: Any, normalize: bool = True) -> Tensor:
        """Align tokenized texts: unit rows (n, width) float32; see `encode_image`."""
        return self._aligned(Modality.TEXT, self.encoder.encode_text(text))  # type: ignore[operator]

    def _aligned(self, side: Modality, embeddings: Tensor) -> Tensor:
        own = self.adapter.side(side)
        if embeddings.shape[-1] != own.shape.input_width:
            raise ShapeError(
                f"the model's {side} embeddings are {embeddings.shape[-1]} wide, the adapter takes "
                f"{own.shape.input_width}; use the model that it was trained on"
            )
        return normalize(own(embeddings), dim=-1)


def wrap(
    model: nn.Module, run: Adapter | Path | str, *, allow: Collection[str] = ()
) -> AlignedClip:
    """Wrap an open_clip model with an adapter, so that its tools use the aligned space.

    Args:
        model: from ``open_clip.create_model``, or any other with ``encode_image`` and
            ``encode_text``.
        run: a run folder, a name on the hub, or the result of `load_adapter` or `fit`.
        allow: as for `load_adapter`.

    Raises:
        ConfigError: the adapter embeds with tokens.
        DataError: no adapter at `run`.
        SchemaError: its files are damaged.

    >>> import csalign, numpy, torch
    >>> images, texts = numpy.random.default_rng(0).normal(size=(2, 30, 4))
    >>> model = torch.nn.Module()
    >>> model.encode_image = model.encode_text = torch.nn.Linear(3, 4)
    >>> aligned = csalign.wrap(model, csalign.fit(images, texts, steps=2))
    >>> aligned.encode_image(torch.ones(5, 3)).shape
    torch.Size([5, 4])
    """
    adapter = run if isinstance(run, Adapter) else load_adapter(run, allow=allow)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return AlignedClip(model, adapter.to(device))


class _UnitRows(nn.Module):
    """The adapter of a side, with normalised outputs: (n, d) -> unit rows (n, width)."""

    def __init__(self, side: SideAdapter) -> None:
        super().__init__()
        self.side = side

    def forward(self, embeddings: Tensor) -> Tensor:
        return normalize(self.side(embeddings), dim=1)


def write_onnx(side: SideAdapter, path: Path) -> None:
    """Write a side as an ONNX file that accepts any number of rows, and check that file.

    Raises:
        ConfigError: onnx or onnxscript is not installed.
        OutputError: its kind cannot be expressed in ONNX.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise _missing(error) from None
    example = torch.randn(EXAMPLE_ROWS, side.shape.input_width, generator=torch.Generator())
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _UnitRows(side).eval(),
                (example,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("rows")},),
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            program.save(str(path), external_data=False)
            onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the exporter raises many types
        raise OutputError(
            f"{side.shape.kind}: cannot be written as ONNX ({reason_of(error):.200}); use "
            "--to safetensors"
        ) from error


def run_onnx(path: Path, rows: Array) -> Array:
    """Run an ONNX file on rows (n, d) by ONNX Runtime; (n, width) float32.

    Raises:
        ConfigError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise _missing(error) from None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: Array = session.run([OUTPUT], {INPUT: rows.astype(np.float32)})[0]
    return found


def _missing(error: ImportError) -> ConfigError:
    return ConfigError(f"onnx: needs {error.name}; install it with: pip install 'csalign[onnx]'")
