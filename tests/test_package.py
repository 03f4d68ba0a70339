"""What an installed malote has beside its code."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from lab.daemon import MALOTE

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "daemon" / "malote" / "malote.example.toml"


def test_the_wheel_has_the_example_and_the_first_schema(tmp_path: Path) -> None:
    """Who installs it has no source to look into; a wheel without migrations could not make its store."""
    subprocess.run([sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)], cwd=ROOT,
                   check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("malote/malote.example.toml") == EXAMPLE.read_bytes()
        names = archive.namelist()
    assert "malote/store/migrations/versions/v0001_initial.py" in names
    assert "malote/store/migrations/env.py" in names


def test_the_example_is_one_file() -> None:
    assert (ROOT / "config" / EXAMPLE.name).resolve() == EXAMPLE


def test_init_prints_the_example(tmp_path: Path) -> None:
    """Also where there is a configuration, and without an address."""
    command = [*MALOTE, "--config", str(tmp_path / "none.toml"), "init", "--example"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout == EXAMPLE.read_bytes()
    assert list(tmp_path.iterdir()) == []
