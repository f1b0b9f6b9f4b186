"""Align two sets of precomputed embeddings with InfoNCE and the Cauchy-Schwarz divergence.

Where things live; imports run one way, down this list::

    cli        the commands: options, progress, tables, exit codes
    steps      extract, import, train, apply, eval, index, search...: one module a command
    encoders   frozen encoders behind one interface
    store      feature sets on disk: schema, manifest, writer, reader, join by id
    sources    what users bring: captions tables, image folders, arrays
    adapters   the maps into the shared space, their closed-form start, their files
    decoders   frozen decoders that make images of embeddings
    nearest    vectors on disk that answer which are nearest
    report     pages with plots, and sheets of images
    metrics    retrieval and the modality gap
    objective  kernels, the divergence, InfoNCE
    config, results, files, locations, errors, enums, progress: what all of them use

From Python: ``csalign.train(csalign.TrainConfig(features=..., out=...))``; likewise `extract`,
`import_arrays`, `inspect`, `tune`, `apply`, `evaluate`, `diagnose`, `generate`, `index`, `search`
and `export`; `load_adapter`, `wrap` and `SentenceAdapter` put a run into other programs. Importing
csalign loads none of the heavy libraries; using a name does.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from csalign.adapters.checkpoint import load_adapter
    from csalign.adapters.clip import wrap
    from csalign.adapters.sentences import SentenceAdapter
    from csalign.config import (
        ApplyConfig,
        DiagnoseConfig,
        EvalConfig,
        ExportConfig,
        ExtractConfig,
        GenerateConfig,
        ImportConfig,
        IndexConfig,
        SearchConfig,
        TrainConfig,
        TuneConfig,
    )
    from csalign.enums import Modality
    from csalign.steps.apply import apply
    from csalign.steps.diagnose import diagnose
    from csalign.steps.evaluate import evaluate
    from csalign.steps.export import export
    from csalign.steps.extract import extract
    from csalign.steps.generate import generate
    from csalign.steps.import_arrays import import_arrays
    from csalign.steps.index import index
    from csalign.steps.inspect import inspect
    from csalign.steps.search import search
    from csalign.steps.train import train
    from csalign.steps.tune import tune

__version__ = version("csalign")

_HOMES = {
    "ApplyConfig": "csalign.config",
    "DiagnoseConfig": "csalign.config",
    "EvalConfig": "csalign.config",
    "ExportConfig": "csalign.config",
    "ExtractConfig": "csalign.config",
    "GenerateConfig": "csalign.config",
    "ImportConfig": "csalign.config",
    "IndexConfig": "csalign.config",
    "Modality": "csalign.enums",
    "SearchConfig": "csalign.config",
    "SentenceAdapter": "csalign.adapters.sentences",
    "TrainConfig": "csalign.config",
    "TuneConfig": "csalign.config",
    "apply": "csalign.steps.apply",
    "diagnose": "csalign.steps.diagnose",
    "evaluate": "csalign.steps.evaluate",
    "export": "csalign.steps.export",
    "extract": "csalign.steps.extract",
    "generate": "csalign.steps.generate",
    "import_arrays": "csalign.steps.import_arrays",
    "index": "csalign.steps.index",
    "inspect": "csalign.steps.inspect",
    "load_adapter": "csalign.adapters.checkpoint",
    "search": "csalign.steps.search",
    "train": "csalign.steps.train",
    "tune": "csalign.steps.tune",
    "wrap": "csalign.adapters.clip",
}

__all__ = [
    "ApplyConfig",
    "DiagnoseConfig",
    "EvalConfig",
    "ExportConfig",
    "ExtractConfig",
    "GenerateConfig",
    "ImportConfig",
    "IndexConfig",
    "Modality",
    "SearchConfig",
    "SentenceAdapter",
    "TrainConfig",
    "TuneConfig",
    "__version__",
    "apply",
    "diagnose",
    "evaluate",
    "export",
    "extract",
    "generate",
    "import_arrays",
    "index",
    "inspect",
    "load_adapter",
    "search",
    "train",
    "tune",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """Import a public name from the module that owns it, on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'csalign' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
