"""``csalign split``: divide a feature set into splits without writing its vectors again."""

from csalign.core import outputs
from csalign.core.errors import ConfigError
from csalign.core.progress import Progress, silent
from csalign.core.results import SplitResult
from csalign.features.schema import SplitSettings, read_manifest
from csalign.features.splits import divide
from csalign.ingest.config import SplitConfig, SplitOptions


def split(config: SplitConfig, progress: Progress = silent) -> SplitResult:
    """Divide the images of a feature set into train, val and test, with their texts.

    Rows in other splits than "train" keep them. Near-duplicate images and images that share a
    caption stay on one side. The result does not depend on the order of the rows. The same call
    again changes nothing.

    Raises:
        ConfigError: neither ``config.val`` nor ``config.test`` is given.
        DataError: no such feature set, too few images with texts, or it has other splits that are
            not to be replaced.
        SchemaError: it is damaged.
        OutputError: its folder cannot be written, or another process is writing there.

    >>> import csalign, numpy
    >>> images, texts = numpy.random.default_rng(0).normal(size=(2, 60, 8))
    >>> _ = csalign.import_arrays(images, texts, out="features")
    >>> csalign.split("features", test=0.2).to_frame()
       split  images  texts
    0  train      48     48
    1   test      12     12
    """
    settings = split_settings(config)
    if settings is None:
        raise ConfigError("pass --val or --test, such as --val 0.1 --test 0.1")
    read_manifest(config.features)  # before a lock is made beside it
    with outputs.changing(config.features):
        return divide(config.features, settings, overwrite=config.overwrite)


def split_settings(options: SplitOptions) -> SplitSettings | None:
    """Return the splits to make; None for none.

    Raises:
        ConfigError: the fractions leave nothing to train on.
    """
    val, test = options.val, options.test
    if val is None and test is None:
        return None
    if max(val or 0, test or 0) < 1 <= (val or 0) + (test or 0):
        raise ConfigError(
            f"--val, --test: {val:g} and {test:g} leave nothing to train on; lower one"
        )
    return SplitSettings(val=val, test=test, seed=options.seed, group=options.group)
