"""What each command can be told: one frozen model a command.

A field is a flag with dashes and a key of ``--config FILE.toml``; its description is the flag's
help. Values come from, weakest first: the defaults here, a recipe (of
``train``), the TOML file, the command line.
"""

from csalign.config.apply import ApplyConfig
from csalign.config.base import Config, OutputConfig
from csalign.config.diagnose import DiagnoseConfig
from csalign.config.evaluate import EvalConfig
from csalign.config.export import ExportConfig
from csalign.config.extract import ExtractConfig
from csalign.config.generate import GenerateConfig
from csalign.config.import_arrays import ImportConfig
from csalign.config.index import IndexConfig
from csalign.config.search import SearchConfig
from csalign.config.train import TrainConfig, TuneConfig

__all__ = [
    "ApplyConfig",
    "Config",
    "DiagnoseConfig",
    "EvalConfig",
    "ExportConfig",
    "ExtractConfig",
    "GenerateConfig",
    "ImportConfig",
    "IndexConfig",
    "OutputConfig",
    "SearchConfig",
    "TrainConfig",
    "TuneConfig",
]
