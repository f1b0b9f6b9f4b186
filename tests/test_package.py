import re
import tomllib
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import pytest

import csalign

ROOT = Path(__file__).parents[1]


def test_every_module_imports_and_every_public_name_is_there() -> None:
    for found in walk_packages(csalign.__path__, "csalign."):
        if not found.name.endswith("__main__"):
            import_module(found.name)

    assert csalign.__all__ == sorted(csalign.__all__)
    for name in csalign.__all__:
        assert getattr(csalign, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'surprise'"):
        _ = csalign.surprise


def test_changelog_and_package_agree_on_the_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)

    assert versions[0] == project["version"] == csalign.__version__


def test_no_room_hides_a_public_function() -> None:
    # Importing a room puts it under its name into the package, over a function of that name.
    rooms = {path.parent.name for path in (ROOT / "csalign").glob("*/__init__.py")}

    assert rooms.isdisjoint(csalign.__all__)


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
