"""Align two sets of precomputed embeddings with InfoNCE and the Cauchy-Schwarz divergence.

Where things live; imports point down this list only::

    cli                      the commands: options, progress, tables, exit codes
    training, generation     train and tune; images from text
    evaluation               eval, compare, diagnose, inspect
    indexing                 index and search
    ingest, runs             extract and import; load, apply and export
    report                   pages with plots, model cards
    encoders                 frozen encoders behind one interface
    features                 feature sets on disk: schema, manifest, writer, reader, join by id
    sources                  what users bring: image folders, caption tables, arrays
    adapters                 the maps into the shared space, their initialisation, their files
    metrics                  retrieval and the modality gap
    objective                kernels, the divergence, InfoNCE
    core                     errors, paths, atomic files, locks, signals, processes, results

From Python, two arrays, or what the commands wrote::

    adapter = csalign.fit(images, texts)                    # NumPy arrays or torch tensors
    print(csalign.evaluate(images, texts))                  # before
    print(csalign.evaluate(images, texts, adapter=adapter))  # after
    csalign.train("features", "run", steps=200)             # or train(TrainConfig(...))

Every command is a function that takes its options as keywords: `extract`, `import_arrays`,
`split`, `inspect`, `train`, `tune`, `apply`, `evaluate`, `compare`, `diagnose`, `index`, `search`,
`export` and `generate`; ``help(csalign.train)`` lists them. `load_adapter`, `wrap` and
`SentenceAdapter` use a run in other programs. Importing csalign loads none of the heavy libraries;
using a name does.
"""

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any

from csalign.core import __version__

if TYPE_CHECKING:
    from csalign.adapters.checkpoint import load_adapter
    from csalign.adapters.model import Adapter
    from csalign.adapters.sentences import SentenceAdapter
    from csalign.adapters.wrappers import wrap
    from csalign.core.enums import Modality
    from csalign.core.results import Result
    from csalign.evaluation.compare import compare
    from csalign.evaluation.config import CompareConfig, DiagnoseConfig, EvalConfig, InspectConfig
    from csalign.evaluation.diagnose import diagnose
    from csalign.evaluation.evaluate import evaluate
    from csalign.evaluation.inspect import inspect
    from csalign.generation.config import GenerateConfig
    from csalign.generation.generate import generate
    from csalign.indexing.build import index
    from csalign.indexing.config import IndexConfig, SearchConfig
    from csalign.indexing.search import search
    from csalign.ingest.config import ExtractConfig, ImportConfig, SplitConfig
    from csalign.ingest.extract import extract
    from csalign.ingest.import_arrays import import_arrays
    from csalign.ingest.split import split
    from csalign.runs.apply import apply
    from csalign.runs.config import ApplyConfig, ExportConfig
    from csalign.runs.export import export
    from csalign.training.config import TrainConfig, TuneConfig
    from csalign.training.fit import fit
    from csalign.training.train import train
    from csalign.training.tuning.tune import tune

_HOMES = {
    "Adapter": "csalign.adapters.model",
    "ApplyConfig": "csalign.runs.config",
    "CompareConfig": "csalign.evaluation.config",
    "DiagnoseConfig": "csalign.evaluation.config",
    "EvalConfig": "csalign.evaluation.config",
    "ExportConfig": "csalign.runs.config",
    "ExtractConfig": "csalign.ingest.config",
    "GenerateConfig": "csalign.generation.config",
    "ImportConfig": "csalign.ingest.config",
    "IndexConfig": "csalign.indexing.config",
    "InspectConfig": "csalign.evaluation.config",
    "Modality": "csalign.core.enums",
    "Result": "csalign.core.results",
    "SearchConfig": "csalign.indexing.config",
    "SentenceAdapter": "csalign.adapters.sentences",
    "SplitConfig": "csalign.ingest.config",
    "TrainConfig": "csalign.training.config",
    "TuneConfig": "csalign.training.config",
    "apply": "csalign.runs.apply",
    "compare": "csalign.evaluation.compare",
    "diagnose": "csalign.evaluation.diagnose",
    "evaluate": "csalign.evaluation.evaluate",
    "export": "csalign.runs.export",
    "extract": "csalign.ingest.extract",
    "fit": "csalign.training.fit",
    "generate": "csalign.generation.generate",
    "import_arrays": "csalign.ingest.import_arrays",
    "index": "csalign.indexing.build",
    "inspect": "csalign.evaluation.inspect",
    "load_adapter": "csalign.adapters.checkpoint",
    "search": "csalign.indexing.search",
    "split": "csalign.ingest.split",
    "train": "csalign.training.train",
    "tune": "csalign.training.tuning.tune",
    "wrap": "csalign.adapters.wrappers",
}

__all__ = [
    "Adapter",
    "ApplyConfig",
    "CompareConfig",
    "DiagnoseConfig",
    "EvalConfig",
    "ExportConfig",
    "ExtractConfig",
    "GenerateConfig",
    "ImportConfig",
    "IndexConfig",
    "InspectConfig",
    "Modality",
    "Result",
    "SearchConfig",
    "SentenceAdapter",
    "SplitConfig",
    "TrainConfig",
    "TuneConfig",
    "__version__",
    "apply",
    "compare",
    "diagnose",
    "evaluate",
    "export",
    "extract",
    "fit",
    "generate",
    "import_arrays",
    "index",
    "inspect",
    "load_adapter",
    "search",
    "split",
    "train",
    "tune",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """Import a public name from the module that owns it, on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'csalign' has no attribute {name!r}")
    from csalign.core import calls

    calls.default_progress = _progress_for_people
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names, for completion."""
    return __all__


def _progress_for_people() -> AbstractContextManager[Any]:
    """Return a callback that shows progress on a terminal or in a notebook, and nothing else."""
    from rich.console import Console

    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        return nullcontext(lambda what, done, total: None)
    from csalign.cli.progress import shown_progress

    return shown_progress(console, quiet=False)
