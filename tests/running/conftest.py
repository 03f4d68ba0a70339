from __future__ import annotations

from pathlib import Path

import pytest

from lab.daemon import Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An installation of malote that nobody else uses."""
    return Home(tmp_path / "home")
