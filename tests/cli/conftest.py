"""The command line in this process."""

from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from csalign.cli.app import app

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run() -> Run:
    """A function that runs a command of some columns; returns exit code, stdout and stderr."""

    def invoke(*words: object, columns: int = 200) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": f"{columns}"})
        return done.exit_code, done.stdout, done.stderr

    return invoke
