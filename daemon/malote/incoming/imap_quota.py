"""How full a mailbox is, as far as its server says (RFC 9208, and RFC 2087 before it)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from malote.errors import MailboxError
from malote.incoming.imap_exchange import Exchange
from malote.incoming.imap_folders import Folder
from malote.incoming.imap_parse import Data, fetch_number, parse_values
from malote.incoming.imap_protocol import MailProtocol

UNITS = {"STORAGE": 1024, "MESSAGE": 1}     # RFC 9208 5: STORAGE counts units of 1024 octets


@dataclass(frozen=True, slots=True)
class Quota:
    """One limit that holds for a folder: of `STORAGE`, in bytes, or `MESSAGE`, in messages."""

    resource: str
    used: int
    limit: int

    @property
    def left(self) -> int:
        return max(0, self.limit - self.used)


async def read_quotas(protocol: MailProtocol, folder: Folder, seconds: float) -> list[Quota]:
    """The limits of size and number of all quota roots of the folder; none where the server has no QUOTA or no limit.

    Raises `MailboxError`, `MailboxLost`.
    """
    if not any(name == "QUOTA" or name.startswith("QUOTA=") for name in protocol.capabilities):
        return []
    command = Exchange("GETQUOTAROOT", protocol.new_tag(), (folder.argument(),), wants=frozenset({"QUOTA"}), seconds=seconds)
    await protocol.execute(command)
    command.ok(f"say how full {folder.name} is")
    try:
        return [quota for data in command.data for quota in _limits(data)]
    except ValueError:      # a courtesy of the server's: no reason to end the connection
        raise MailboxError(f"how full {folder.name} is cannot be read from the server's answer", code="QUOTA") from None


def _limits(data: Data) -> Iterator[Quota]:
    """`root (STORAGE used limit MESSAGE used limit)`. Raises `ValueError`."""
    values = parse_values(data.rest, data.parts)
    limits = values[-1] if values and isinstance(values[-1], list) else []
    for name, used, limit in zip(limits[::3], limits[1::3], limits[2::3], strict=True):
        resource = name.decode("latin-1").upper() if isinstance(name, bytes) else ""
        if resource in UNITS:
            unit = UNITS[resource]
            yield Quota(resource, fetch_number({"": used}, "") * unit, fetch_number({"": limit}, "") * unit)
