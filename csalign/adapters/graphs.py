"""One side's adapter as a graph for other programs: ONNX, and torch.export's program."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from csalign.adapters.side import SideAdapter
from csalign.core.errors import ConfigError, OutputError

INPUT, OUTPUT = "embeddings", "aligned"
EXAMPLE_ROWS = 3  # neither 0 nor 1, which torch.export would take for constants

Array = npt.NDArray[Any]


class UnitRows(nn.Module):
    """A side's adapter as ``apply`` uses it: raw embeddings (n, d) -> unit rows (n, width)."""

    def __init__(self, side: SideAdapter) -> None:
        super().__init__()
        self.side = side

    def forward(self, embeddings: Tensor) -> Tensor:
        """Float32 in and out."""
        return normalize(self.side(embeddings), dim=1)


def write_onnx(side: SideAdapter, path: Path) -> None:
    """Write a side as an ONNX file of any number of rows, and check that file.

    Raises:
        ConfigError: onnx or onnxscript is not installed.
        OutputError: its kind cannot be written so.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError:
        raise _lacking("onnx") from None
    with _told(side, "ONNX"):
        program = torch.onnx.export(
            UnitRows(side).eval(),
            (_example(side),),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("rows")},),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(str(path), external_data=False)
        onnx.checker.check_model(str(path), full_check=True)


def run_onnx(path: Path, rows: Array) -> Array:
    """What ONNX Runtime makes of some rows, (n, width).

    Raises:
        ConfigError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise _lacking("onnxruntime") from None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: Array = session.run([OUTPUT], {INPUT: rows.astype(np.float32)})[0]
    return found


def write_program(side: SideAdapter, path: Path) -> None:
    """Write a side as a program of torch.export, of any number of rows.

    Raises:
        OutputError: its kind cannot be written so.
    """
    with _told(side, "torch.export"):
        shapes = ({0: torch.export.Dim("rows")},)
        program = torch.export.export(
            UnitRows(side).eval(), (_example(side),), dynamic_shapes=shapes
        )
        torch.export.save(program, path)


def run_program(path: Path, rows: Array) -> Array:
    """What such a program makes of some rows, (n, width); for one that was just written."""
    with _quiet():
        program = torch.export.load(path).module()
        with torch.inference_mode():
            found: Array = program(torch.from_numpy(rows.astype(np.float32))).numpy()
    return found


def _example(side: SideAdapter) -> Tensor:
    return torch.randn(EXAMPLE_ROWS, side.shape.input_width, generator=torch.Generator())


def _lacking(library: str) -> ConfigError:
    return ConfigError(f"onnx: needs {library}; install it with: pip install 'csalign[onnx]'")


@contextmanager
def _told(side: SideAdapter, form: str) -> Iterator[None]:
    """Turn whatever an exporter raises into one line."""
    try:
        with _quiet(), torch.no_grad():
            yield
    except Exception as error:  # what an exporter stumbles on is not bounded
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise OutputError(
            f"{side.shape.kind}: cannot be written by {form} ({reason:.200}); use --to safetensors"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
