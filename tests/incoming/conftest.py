"""A mailbox of its own for each test."""

from __future__ import annotations

import imaplib
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from lab.incoming import Box, Client
from lab.servers import Dovecot

USERS = 300


@pytest.fixture(scope="session")
def unused_users(dovecot: Dovecot) -> Iterator[str]:
    """Made all at once: Dovecot looks at its list of users once a second at most."""
    names = [f"in{number}@test.example" for number in range(USERS)]
    for name in names:
        dovecot.add_user(name)
    deadline = time.monotonic() + 20
    while True:
        try:
            Client(dovecot.port, names[-1]).close()
        except imaplib.IMAP4.error:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        else:
            break
    return itertools.chain(names)


@pytest.fixture
async def box(dovecot: Dovecot, unused_users: Iterator[str], tmp_path: Path) -> AsyncIterator[Box]:
    box = Box(dovecot, tmp_path, next(unused_users))
    yield box
    await box.close()
