"""Align two sets of precomputed embeddings with InfoNCE and the Cauchy-Schwarz divergence.

Where things live; imports run one way, down this list::

    cli        the commands: options, progress, tables, exit codes
    steps      extract, import, inspect, train, apply, eval: one module a command
    store      feature sets on disk: schema, manifest, writer, reader, join by id
    sources    what users bring: captions tables, image folders, arrays
    encoders   frozen encoders behind one interface
    adapters   the maps into the shared space, their closed-form start, their files
    metrics    retrieval and the modality gap
    objective  kernels, the divergence, InfoNCE
    config, results, files, errors, enums, progress: what all of them use
"""

from importlib.metadata import version

__version__ = version("csalign")
