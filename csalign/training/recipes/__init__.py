"""Named settings of ``csalign train``, as TOML files in this folder to read and change."""

import tomllib
from importlib.resources import files
from typing import Any

from csalign.core.errors import ConfigError

_FOLDER = files("csalign.training.recipes")
_SUFFIX = ".toml"


def recipe_names() -> list[str]:
    """All there are, in order."""
    names = (path.name for path in _FOLDER.iterdir())
    return sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))


def recipe_text(name: str) -> str:
    """A recipe's file, which says in comments what each setting is for.

    Raises:
        ConfigError: there is no such recipe.
    """
    if name not in recipe_names():
        raise ConfigError(f"recipe: there is no {name!r}; there are {', '.join(recipe_names())}")
    return (_FOLDER / (name + _SUFFIX)).read_text(encoding="utf-8")


def recipe_values(name: str) -> dict[str, Any]:
    """The settings of a recipe.

    Raises:
        ConfigError: there is no such recipe.
    """
    return tomllib.loads(recipe_text(name))


def recipe_title(name: str) -> str:
    """What a recipe is for: the first line of its file."""
    return recipe_text(name).partition("\n")[0].lstrip("# ")
