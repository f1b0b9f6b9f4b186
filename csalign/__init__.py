"""Align two sets of precomputed embeddings with InfoNCE and the Cauchy-Schwarz divergence.

Where things live; imports point down this list only::

    calls                    the commands as Python functions, of keywords and of arrays
    cli                      the commands: options, progress, tables, exit codes
    training, generation     train, tune and bind; images from text
    evaluation               eval, compare, diagnose, inspect
    indexing                 index and search
    ingest, runs             extract and import; load, apply and export
    report                   pages with plots, model cards
    encoders                 frozen encoders behind one interface
    features                 feature sets on disk: schema, manifest, writer, reader, join by id
    sources                  what users bring: image folders, caption tables, arrays
    adapters                 the maps into the shared space, their initialisation, their files
    metrics                  retrieval, the modality gap, mixed galleries, groups
    objective                kernels, the divergence, InfoNCE
    core                     errors, paths, atomic files, locks, signals, processes, results

From Python, two arrays, or what the commands wrote::

    adapter = csalign.fit(images, texts)                    # NumPy arrays or torch tensors
    print(csalign.compare((images, texts), adapter))        # before and after
    csalign.train("features", "run", steps=200)             # or train(TrainConfig(...))

Every command is a function that takes its options as keywords: `extract`, `import_arrays`,
`split`, `inspect`, `train`, `tune`, `bind`, `apply`, `evaluate`, `compare`, `diagnose`, `index`,
`search`, `export` and `generate`; ``help(csalign.train)`` lists them. `load_adapter`, `wrap` and
`SentenceAdapter` use a run in other programs. Importing csalign loads none of the heavy libraries;
using a name does.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from csalign.core import __version__ as __version__

if TYPE_CHECKING:
    from collections.abc import Callable

    from csalign.adapters.checkpoint import load_adapter as load_adapter
    from csalign.adapters.model import Adapter as Adapter
    from csalign.adapters.sentences import SentenceAdapter as SentenceAdapter
    from csalign.adapters.wrappers import wrap as wrap
    from csalign.calls import fit as fit
    from csalign.core import results
    from csalign.core.enums import Modality as Modality
    from csalign.core.results import Result as Result
    from csalign.evaluation.config import CompareConfig as CompareConfig
    from csalign.evaluation.config import DiagnoseConfig as DiagnoseConfig
    from csalign.evaluation.config import EvalConfig as EvalConfig
    from csalign.evaluation.config import InspectConfig as InspectConfig
    from csalign.generation.config import GenerateConfig as GenerateConfig
    from csalign.indexing.config import IndexConfig as IndexConfig
    from csalign.indexing.config import SearchConfig as SearchConfig
    from csalign.ingest.config import ExtractConfig as ExtractConfig
    from csalign.ingest.config import ImportConfig as ImportConfig
    from csalign.ingest.config import SplitConfig as SplitConfig
    from csalign.runs.config import ApplyConfig as ApplyConfig
    from csalign.runs.config import ExportConfig as ExportConfig
    from csalign.training.bind_config import BindConfig as BindConfig
    from csalign.training.config import TrainConfig as TrainConfig
    from csalign.training.config import TuneConfig as TuneConfig

    apply: Callable[..., results.FeaturesResult]
    bind: Callable[..., Result]
    compare: Callable[..., results.CompareResult]
    diagnose: Callable[..., Result]
    evaluate: Callable[..., results.EvalResult]
    export: Callable[..., Result]
    extract: Callable[..., results.FeaturesResult]
    generate: Callable[..., results.GenerateResult]
    import_arrays: Callable[..., results.FeaturesResult]
    index: Callable[..., Result]
    inspect: Callable[..., Result]
    search: Callable[..., results.SearchResult]
    split: Callable[..., results.SplitResult]
    train: Callable[..., results.TrainResult]
    tune: Callable[..., results.TuneResult]

_COMMANDS = {
    "apply": "runs.apply",
    "bind": "training.bind",
    "compare": "evaluation.compare",
    "diagnose": "evaluation.diagnose",
    "evaluate": "evaluation.evaluate",
    "export": "runs.export",
    "extract": "ingest.extract",
    "generate": "generation.generate",
    "import_arrays": "ingest.import_arrays",
    "index": "indexing.build",
    "inspect": "evaluation.inspect",
    "search": "indexing.search",
    "split": "ingest.split",
    "train": "training.train",
    "tune": "training.tuning.tune",
}
_HOMES = {
    **dict.fromkeys(("CompareConfig", "DiagnoseConfig", "EvalConfig"), "evaluation.config"),
    **dict.fromkeys(("IndexConfig", "SearchConfig"), "indexing.config"),
    **dict.fromkeys(("ExtractConfig", "ImportConfig", "SplitConfig"), "ingest.config"),
    **dict.fromkeys(("ApplyConfig", "ExportConfig"), "runs.config"),
    **dict.fromkeys(("TrainConfig", "TuneConfig"), "training.config"),
    "Adapter": "adapters.model",
    "BindConfig": "training.bind_config",
    "GenerateConfig": "generation.config",
    "InspectConfig": "evaluation.config",
    "Modality": "core.enums",
    "Result": "core.results",
    "SentenceAdapter": "adapters.sentences",
    "fit": "calls",
    "load_adapter": "adapters.checkpoint",
    "wrap": "adapters.wrappers",
}

__all__ = sorted(["__version__", *_COMMANDS, *_HOMES])

# OpenMP reads it when torch is loaded. Threads that spin at every barrier make a step several times
# slower on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __getattr__(name: str) -> Any:
    """Import a public name from the module that owns it, on first use."""
    home = _COMMANDS.get(name) or _HOMES.get(name)
    if home is None:
        message = f"module 'csalign' has no attribute {name!r}"
        raise AttributeError(message, name=name, obj=sys.modules[__name__])
    found = getattr(import_module(f"csalign.{home}"), name)
    if name in _COMMANDS:
        from csalign.calls import as_function

        found = as_function(found)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """List the public names, for completion."""
    return __all__
