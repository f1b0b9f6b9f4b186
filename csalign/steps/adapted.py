"""A trained adapter, checked against the features that are to go through it."""

from pathlib import Path

from csalign.adapters.checkpoint import AdapterInfo, load_adapter_with_info
from csalign.adapters.model import Adapter
from csalign.devices import pick_device
from csalign.enums import Modality
from csalign.errors import ShapeError
from csalign.store.reader import FeatureSet


def load_adapter_for(
    features: FeatureSet, run: Path, device: str, allow: str | None = None
) -> tuple[Adapter, AdapterInfo]:
    """Load a run's adapter onto a device.

    Args:
        features: that are to go through it.
        run: the run folder, or a checkpoint in it.
        device: where to compute, as ``--device`` has it.
        allow: a kind ``package.module:Class`` that may be imported.

    Raises:
        DataError: there is no adapter at `run`.
        SchemaError: its files are damaged.
        ShapeError: the features are not of the widths that it takes.
    """
    adapter, info = load_adapter_with_info(run, allow=() if allow is None else (allow,))
    for side in Modality:
        table, takes = features.table(side), info.adapters[side].input_width
        if table.made_by is not None and table.width != takes:
            raise ShapeError(
                f"{features.path}: {side} embeddings are {table.width} wide, the adapter {run} "
                f"takes {takes}; use features of the encoders that it was trained on"
            )
    return adapter.to(pick_device(device)), info
