"""The few words that are spelled once and compared with ``is``."""

from enum import StrEnum


class Modality(StrEnum):
    """One side of a feature set."""

    IMAGE = "image"
    TEXT = "text"

    @property
    def plural(self) -> str:
        """Name of this side's folder in a feature set and of its counts."""
        return f"{self.value}s"
