"""The address of a database: what `store.url` may say, and what it may not."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

from malote.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Target:
    """A URL, taken apart. Several hosts are tried in order for the one that takes writes."""

    hosts: tuple[str, ...]
    ports: tuple[int, ...]
    database: str
    user: str | None


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
