from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from lab.daemon import Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An installation of malote that nobody else uses."""
    return Home(tmp_path / "home")


@pytest.fixture(autouse=True)
def own_logs() -> Iterator[None]:
    """The service sets up the log of its process, here that of all tests that come after it."""
    ours = logging.getLogger("malote")
    handlers, levels = logging.root.handlers[:], (logging.root.level, ours.level)
    yield
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(levels[0])
    ours.setLevel(levels[1])
