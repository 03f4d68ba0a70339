"""Where a store in PostgreSQL is: what `store.url` may say."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from malote.config import StoreConfig

MACHINE_ID = Path("/etc/machine-id")


@dataclass(frozen=True, slots=True)
class PostgresPlace:
    """`store.url` and what belongs to it. `node` tells this machine's service from those of others on the same database."""

    url: str
    password_file: Path | None = None   # else ~/.pgpass, or no password (a UNIX socket knows its peer)
    ca_file: Path | None = None         # else the system's certificate authorities
    node: bytes = b""


def database_place(place: str | Path | PostgresPlace) -> PostgresPlace | None:
    """The place, if it is in PostgreSQL."""
    if isinstance(place, str) and place.startswith("postgresql:"):
        return PostgresPlace(place)
    return place if isinstance(place, PostgresPlace) else None


def default_node(directory: Path, machine: bytes) -> bytes:
    """Tells services apart that share a database: by their machine, and on one machine by their directory."""
    return machine + b"\0" + os.fsencode(directory.absolute())


def configured_place(config: StoreConfig, directory: Path) -> Path | PostgresPlace:
    """Where the configuration puts the store: in this directory, or in the database of `store.url`."""
    if not config.url:
        return directory
    return PostgresPlace(config.url, config.password_file, config.ca_file, default_node(directory, machine_id()))


def machine_id() -> bytes:
    """b"" where there is none: then a store that moved is not noticed."""
    try:
        return MACHINE_ID.read_bytes().strip()
    except OSError:
        return b""
