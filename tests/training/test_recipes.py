import tomllib
from pathlib import Path

import pytest

from csalign.core.errors import ConfigError
from csalign.training.config import (
    TrainConfig,
    TuneConfig,
    recipe_names,
    recipe_text,
    recipe_title,
)

NAMES = ["close-the-gap", "few-pairs", "paper", "retrieval-llm", "text-to-image"]


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text('recipe = "text-to-image"\nimage_adapter = "linear"\nseed = 1\n')
    return path


def test_there_are_the_recipes_that_the_help_names() -> None:
    assert recipe_names() == NAMES
    description = TrainConfig.model_fields["recipe"].description
    assert description is not None
    assert all(name in description for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_settings_of_train_each_with_what_it_is_for(name: str) -> None:
    config = TrainConfig.resolve(None, {"recipe": name, "features": "f", "out": "o"})
    values = tomllib.loads(recipe_text(name))
    lines = recipe_text(name).splitlines()

    assert values
    assert recipe_title(name)
    for key, value in values.items():
        assert getattr(config, key) == (tuple(value) if isinstance(value, list) else value)
        assert getattr(config, key) != TrainConfig.model_fields[key].default
        above = lines[next(n for n, line in enumerate(lines) if line.startswith(f"{key} =")) - 1]
        assert above.startswith("# ")


def test_flags_win_over_the_file_and_that_over_the_recipe_and_that_over_the_defaults(
    toml: Path,
) -> None:
    given = {"seed": 2, "features": "f", "out": "o"}
    config = TrainConfig.resolve(toml, given)
    recipe = tomllib.loads(recipe_text("text-to-image"))

    assert recipe["image_adapter"] == "identity"
    assert config.image_adapter == "linear"
    assert config.seed == 2
    assert config.cs_weight == recipe["cs_weight"] != TrainConfig.model_fields["cs_weight"].default
    assert config.dropout == TrainConfig.model_fields["dropout"].default
    other = TrainConfig.resolve(toml, {**given, "recipe": "few-pairs"})
    assert other.image_adapter == "linear"
    assert other.cs_weight == tomllib.loads(recipe_text("few-pairs")).get("cs_weight", 0.1)


def test_the_written_configuration_is_the_one_that_ran(toml: Path, tmp_path: Path) -> None:
    config = TrainConfig.resolve(toml, {"features": "f", "out": "o"})
    written = tmp_path / "written.toml"
    written.write_text(config.to_toml())

    assert tomllib.loads(config.to_toml())["image_adapter"] == "linear"
    assert TrainConfig.resolve(written, {}) == config


def test_a_search_keeps_what_a_recipe_gives() -> None:
    config = TuneConfig.resolve(None, {"recipe": "text-to-image", "features": "f", "out": "o"})

    assert "cs_weight" in config.model_fields_set
    assert config.base().image_adapter == "identity"


def test_a_recipe_that_is_not_there_is_named_beside_those_that_are() -> None:
    with pytest.raises(ConfigError, match="recipe: there is no 'soup'; there are close-the-gap, "):
        TrainConfig.resolve(None, {"recipe": "soup", "features": "f", "out": "o"})
