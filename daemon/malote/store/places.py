"""Where a store in PostgreSQL is: what `store.url` may say."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from malote.config import is_loopback
from malote.errors import ConfigError


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


@dataclass(frozen=True, slots=True)
class Target:
    """A URL, taken apart. Several hosts are tried in order for the one that takes writes."""

    hosts: tuple[str, ...]
    ports: tuple[int, ...]
    database: str
    user: str | None

    @property
    def local(self) -> bool:
        return all(host.startswith("/") or is_loopback(host) for host in self.hosts)


def parse_url(url: str) -> Target:
    """`postgresql://[USER@]HOST[:PORT][,HOST[:PORT]...]/DATABASE` or `postgresql://[USER@]/DATABASE?host=/DIRECTORY`.

    Raises `ConfigError`, whose text never repeats the URL.
    """
    try:
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError as error:
        raise ConfigError("store.url: is not a URL", hint=_FORM) from error
    user, _, places = parts.netloc.rpartition("@")
    if ":" in user or "password" in query:
        raise ConfigError("store.url: holds a password, which does not belong into the configuration",
                          hint="store.password_file names the file that holds it; or use ~/.pgpass")
    database = unquote(parts.path.removeprefix("/"))
    if parts.scheme != "postgresql" or parts.fragment or not database or "/" in database:
        raise ConfigError("store.url: must name a database", hint=_FORM)
    if unknown := sorted(query.keys() - {"host", "port"}):
        raise ConfigError(f"store.url: {unknown[0]} is not known here", hint="host and port are; TLS is always verified in full")
    places = places or query.get("host", "")
    if not places or ("host" in query and parts.netloc.rpartition("@")[2]):
        raise ConfigError("store.url: must name one host, or host=/DIRECTORY of a socket", hint=_FORM)
    hosts, ports = [], []
    for place in places.split(","):
        host, port = (place, "") if place.startswith("/") else _host_and_port(place)
        port = port or query.get("port", "5432")
        if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError("store.url: host or port is not valid", hint=_FORM)
        hosts.append(unquote(host))
        ports.append(int(port))
    return Target(tuple(hosts), tuple(ports), database, unquote(user) or None)


_FORM = "postgresql://malote@db.example.org/malote, or postgresql:///malote?host=/run/postgresql for a socket"


def _host_and_port(place: str) -> tuple[str, str]:
    if place.startswith("["):
        host, _, rest = place[1:].partition("]")
        return host, rest.removeprefix(":")
    host, _, port = place.partition(":")
    return host, port


def default_node(directory: Path, machine_id: bytes) -> bytes:
    """Tells services apart that share a database: by their machine, and on one machine by their directory."""
    return machine_id + b"\0" + os.fsencode(directory.absolute())
