"""Fixtures that all areas share: real servers on loopback, started once per test process."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from lab.postgres import Postgres
from lab.servers import Dovecot, Lab, Postfix

settings.register_profile("quick", max_examples=60, deadline=None, derandomize=True,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.register_profile("long", parent=settings.get_profile("quick"), max_examples=2000, derandomize=False)
settings.load_profile(os.environ.get("MALOTE_TEST_PROFILE", "quick"))

# people of the tests; each test that writes to a mailbox should make a user of its own: dovecot.add_user(...)
USERS = [f"{name}@test.example" for name in ("alice", "bob", "carol", "dave", "eve", "frank", "grace", "heidi", "ivan", "judy")]


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """The place where a test starts servers of its own. Not below pytest's own directory: each pytest that starts closes that
    to other users, also the users of servers that another pytest has running."""
    with tempfile.TemporaryDirectory(prefix="malote-lab-", ignore_cleanup_errors=True) as root, Lab(Path(root)) as lab:
        yield lab


@pytest.fixture(scope="session")
def dovecot(lab: Lab) -> Dovecot:
    """One Dovecot for all tests of this process; users USERS, password `secret` (lab.servers.PASSWORD)."""
    return lab.dovecot(USERS)


@pytest.fixture(scope="session")
def postfix(lab: Lab, dovecot: Dovecot) -> Postfix:
    """One Postfix that delivers everything to `dovecot` by LMTP and offers submission with its logins."""
    return lab.postfix(dovecot.lmtp_hop, auth_port=dovecot.auth_port)


@pytest.fixture(scope="session")
def postgres(lab: Lab) -> Iterator[Postgres]:
    """One PostgreSQL for all tests of this process."""
    server = Postgres(lab.root / "postgres", lab.certificate, lab.key)
    server.start()
    yield server
    server.stop(signal.SIGQUIT)


@pytest.fixture
def postgres_url(postgres: Postgres) -> str:
    """An empty database of its own."""
    return postgres.url(postgres.new_database())
