"""The options of training on sets of several sides, and those that have no meaning there."""

from typing import Annotated, Any, ClassVar

from pydantic import Field

from csalign.adapters.kinds import BASELINES
from csalign.core.config import Config, RunFolder, Words
from csalign.core.errors import ConfigError


class SidesOptions(Config):
    """Sets of several sides."""

    panel: ClassVar[str] = "Sides"

    sides: Annotated[tuple[str, ...] | None, Words] = Field(
        None, description="Sides to train on, comma-separated (default: all of the set)."
    )
    hub: str | None = Field(
        None,
        description="Side that the pairwise loss pairs with each other side (default: all pairs "
        "of sides that an item has).",
    )
    add_side: str | None = Field(
        None, description="Train the adapter of this side alone, into the space of the run --into."
    )
    into: RunFolder | None = Field(
        None, description="Run to add a side to; its adapters stay as they are."
    )


_OF_TWO_SIDES = {
    **dict.fromkeys(("captions", "cs_captions"), "one row of an item is drawn per epoch"),
    "unpaired": "rows without partner belong into the set itself",
    **dict.fromkeys(
        ("tokens", "token_weight", "token_samples", "token_pairs", "token_memory"),
        "sides are aligned without tokens",
    ),
    "networks": "one network is trained",
    "mixing": "items lack sides, so that no two can be mixed",
    "memory": "all rows are in memory",
    **dict.fromkeys(
        ("report", "pictures", "umap"), "training draws no page of them; see csalign eval --report"
    ),
}
"""Options that are refused with several sides unless they have their default, and why."""


def check_several(config: Any, sides: tuple[str, ...]) -> None:
    """Raise ConfigError if options have no meaning for several sides, or contradict each other."""
    both = ", or train on two with --sides image,text" * ({"image", "text"} <= {*sides})
    for name, why in _OF_TWO_SIDES.items():
        if getattr(config, name) != type(config).model_fields[name].default:
            raise ConfigError(
                f"{config.shown(name)}: works with images and texts alone, and the sides are "
                f"{', '.join(sides)}: {why}; leave it out{both}"
            )
    if config.other_captions not in (0.0, type(config).model_fields["other_captions"].default):
        raise ConfigError("--other-captions: one row of an item is drawn per epoch; leave it out")
    if config.any_encoder and config.into is None:
        raise ConfigError("--any-encoder: is for a set whose sides are added --into a run")
    if config.batch_size == "auto":
        raise ConfigError("--batch-size auto: needs a set of two sides; give a number")
    if config.adapter in BASELINES:
        raise ConfigError(
            f"--adapter {config.adapter}: is fitted on images and texts alone, and the sides are "
            f"{', '.join(sides)}; --steps 0 --ensemble off keeps their closed form"
        )
    if (config.add_side is None) != (config.into is None):
        raise ConfigError("--add-side and --into go together; give the new side, and the run")
    if config.hub is not None and config.add_side is not None:
        raise ConfigError("--hub: a side that is added is paired with all others; leave it out")
    if config.width is not None and config.into is not None:
        raise ConfigError(f"--width: the space of {config.into} stays as it is; leave it out")
    for option, side in (("hub", config.hub), ("add-side", config.add_side)):
        if side is not None and side not in sides:
            raise ConfigError(
                f"--{option}: {side} is not a side of {config.features} to train on; there are "
                f"{', '.join(sides)}"
                + f"; add it with csalign import --side {side}=FILE --add"
                * (option == "add-side")
            )


def check_two(config: Any) -> None:
    """Raise ConfigError if options of several sides are given for images and texts."""
    for name in ("hub", "add_side", "into"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f"{config.shown(name)}: needs sides beside image and text; leave it out, "
                + (
                    f"add one to {config.features} with csalign import --side NAME=FILE --add"
                    if config.sides is None
                    else f"or name more than --sides {','.join(config.sides)}"
                )
            )
