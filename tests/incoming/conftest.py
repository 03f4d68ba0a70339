"""A mailbox of its own for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from lab.incoming import Box
from lab.servers import Dovecot

USERS = 300


@pytest.fixture(scope="session")
def unused_users(dovecot: Dovecot) -> Iterator[str]:
    """Made all at once: each call waits until Dovecot has read its list of users again."""
    names = [f"in{number}@test.example" for number in range(USERS)]
    dovecot.add_users(names)
    return iter(names)


@pytest.fixture
async def box(dovecot: Dovecot, unused_users: Iterator[str], tmp_path: Path) -> AsyncIterator[Box]:
    box = Box(dovecot, tmp_path, next(unused_users))
    yield box
    await box.close()
