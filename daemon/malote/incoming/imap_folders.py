"""Folder names between three worlds: the configuration (`A/B`, `\\Junk`), people (Unicode) and the wire (RFC 3501 5.1, RFC 6154).

A folder is always named on the wire exactly as the server spelled it in LIST, so names that no rule explains work as well.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from malote.errors import MailboxError
from malote.incoming import imap_names, imap_parse
from malote.incoming.imap_exchange import Exchange, Piece
from malote.incoming.imap_parse import Atom, Listed
from malote.incoming.imap_protocol import MailProtocol

NEW_FOLDER_TRIES = 40
NEW_FOLDER_SECONDS = 0.05

# Where no folder carries the attribute: the names that servers and clients use for it, lower case.
_USUAL_NAMES = {
    "\\junk": ("junk", "spam", "junk e-mail", "junk email", "bulk mail"),
    "\\sent": ("sent", "sent items", "sent mail", "sent messages"),
    "\\drafts": ("drafts",),
    "\\trash": ("trash", "deleted items", "deleted messages", "bin"),
    "\\archive": ("archive", "archives"),
}


@dataclass(frozen=True, slots=True)
class Folder:
    """One folder. `name` is for people and logs, `wire` is what the server calls it."""

    name: str
    wire: bytes
    flags: frozenset[str] = frozenset()     # lower case, as \\noselect, \\junk
    delimiter: str = ""

    @property
    def selectable(self) -> bool:
        return "\\noselect" not in self.flags

    @property
    def is_trash(self) -> bool:
        """By its attribute, or by the names that are usual for it."""
        name = self.name.rpartition(self.delimiter)[2] if self.delimiter else self.name
        return "\\trash" in self.flags or name.lower() in _USUAL_NAMES["\\trash"]

    def argument(self) -> Piece:
        """As a command argument."""
        return imap_names.astring(self.wire)


@dataclass(frozen=True, slots=True)
class FolderStatus:
    """The counters of a folder; 0 for what the server does not say."""

    messages: int
    uidnext: int
    uidvalidity: int


class Folders:
    """The folders of one account, asked once and again when a name is not among them."""

    def __init__(self, protocol: MailProtocol, seconds: float) -> None:
        self._protocol = protocol
        self._seconds = seconds
        self._known: dict[str, Folder] | None = None
        self._prefix = ""
        self._delimiter = ""

    async def refresh(self) -> list[Folder]:
        """Ask the server for all folders. Raises `MailboxError`, `MailboxLost`."""
        marked = {"LIST-EXTENDED", "SPECIAL-USE"} <= self._protocol.capabilities
        pieces: tuple[Piece, ...] = (b'""', b'"*"', b"RETURN (SPECIAL-USE)") if marked else (b'""', b'"*"')
        listed = [entry for entry in await self._list(pieces) if entry.wire]
        root = await self._list((b'""', b'""'))         # RFC 3501 6.3.8: the delimiter, also of an empty account
        self._delimiter = root[0].delimiter if root else (listed[0].delimiter if listed else "")
        self._prefix = await self._namespace()
        self._known = {folder.name: folder for folder in map(_folder, listed)}
        self._known.setdefault("INBOX", Folder("INBOX", b"INBOX", frozenset(), self._delimiter))
        return list(self._known.values())

    async def _list(self, pieces: tuple[Piece, ...]) -> list[Listed]:
        command = Exchange("LIST", self._protocol.new_tag(), pieces, wants=frozenset({"LIST"}), seconds=self._seconds)
        await self._protocol.execute(command)
        command.ok("list its folders")
        with self._protocol.readable():
            return [imap_parse.parse_list(data) for data in command.data]

    async def _namespace(self) -> str:
        if "NAMESPACE" not in self._protocol.capabilities:
            return ""
        command = Exchange("NAMESPACE", self._protocol.new_tag(), wants=frozenset({"NAMESPACE"}), seconds=self._seconds)
        await self._protocol.execute(command)
        if command.status is None or command.status.result != "OK" or not command.data:
            return ""       # a name space is a convenience: some servers announce it and refuse it
        try:
            return imap_parse.parse_namespace(command.data[0])
        except ValueError:
            return ""

    async def special_use(self, attribute: str) -> Folder | None:
        """See `Mailbox.find_special_use`."""
        wanted = attribute.lower()
        if self._known is None:
            await self.refresh()
        folders = [folder for folder in (self._known or {}).values() if folder.selectable]
        for folder in folders:
            if wanted in folder.flags:
                return folder
        for usual in _USUAL_NAMES.get(wanted, ()):
            for folder in folders:
                name = folder.name.lower()
                if usual in (name, name.removeprefix(self._prefix.lower())):
                    return folder
        return None

    async def resolve(self, name: str) -> Folder | None:
        """See `Mailbox.resolve`. A name not known is asked for once more: another client may have made it."""
        if name.upper() == "INBOX":
            return (self._known or {}).get("INBOX") or Folder("INBOX", b"INBOX")
        if name.startswith("\\"):
            return await self.special_use(name)
        if self._known is None:
            await self.refresh()
        found = self._lookup(name)
        if found is None:
            await self.refresh()
            found = self._lookup(name)
        return found

    def _lookup(self, name: str) -> Folder | None:
        known = self._known or {}
        for candidate in (name, self._path(name)):
            folder = known.get(candidate)
            if folder is not None and folder.selectable:
                return folder
        return None

    def _path(self, name: str) -> str:
        """`A/B` in the server's own spelling: its delimiter, below its personal name space."""
        path = name.replace("/", self._delimiter) if self._delimiter else name
        return path if path.startswith(self._prefix) else self._prefix + path

    async def create(self, name: str) -> Folder:
        """See `Mailbox.create_folder`."""
        found = await self.resolve(name)
        if found is not None:
            return found
        if name.startswith("\\"):
            raise MailboxError(f"there is no folder for {name}, and it is not ours to make one", code="NONEXISTENT")
        path = self._path(name)
        argument = imap_names.astring(imap_names.encode_folder(path))
        command = Exchange("CREATE", self._protocol.new_tag(), (argument,), seconds=self._seconds)
        await self._protocol.execute(command)
        await self.refresh()
        made = self._lookup(name)
        if made is None:        # NO is fine if another client was faster and the folder is there now
            command.ok(f"create the folder {path}")
            raise MailboxError(f"the folder {path} was created and cannot be found", code="NONEXISTENT")
        await self._subscribe(argument)
        return made

    async def _subscribe(self, argument: Piece) -> None:
        command = Exchange("SUBSCRIBE", self._protocol.new_tag(), (argument,), seconds=self._seconds)
        await self._protocol.execute(command)       # NO is fine: it only hides the folder in clients that list subscriptions

    async def status(self, folder: Folder) -> FolderStatus:
        """See `Mailbox.status`. Dovecot says UIDVALIDITY 0 of a folder that another client is making in this moment."""
        for _ in range(NEW_FOLDER_TRIES):
            status = await self._status(folder)
            if status.uidvalidity:
                return status
            await asyncio.sleep(NEW_FOLDER_SECONDS)
        raise MailboxError(f"the folder {folder.name} has no UIDVALIDITY, it cannot be watched", code="NOUIDVALIDITY")

    async def _status(self, folder: Folder) -> FolderStatus:
        command = Exchange("STATUS", self._protocol.new_tag(), (folder.argument(), b"(MESSAGES UIDNEXT UIDVALIDITY)"),
                           wants=frozenset({"STATUS"}), seconds=self._seconds)
        await self._protocol.execute(command)
        command.ok(f"say what is in {folder.name}")
        with self._protocol.readable():
            values = imap_parse.parse_values(command.data[0].rest, command.data[0].parts) if command.data else []
            pairs = values[-1] if values and isinstance(values[-1], list) else []
            items = {bytes(key).decode("latin-1").upper(): value for key, value in zip(pairs[::2], pairs[1::2], strict=True)
                     if isinstance(key, Atom)}
            return FolderStatus(*(imap_parse.fetch_number(items, key) if key in items else 0
                                  for key in ("MESSAGES", "UIDNEXT", "UIDVALIDITY")))


def _folder(listed: Listed) -> Folder:
    name = "INBOX" if listed.wire.upper() == b"INBOX" else imap_names.decode_folder(listed.wire)
    flags = listed.flags | {"\\noselect"} if "\\nonexistent" in listed.flags else listed.flags    # RFC 5258 3.1: implied
    return Folder(name, listed.wire, flags, listed.delimiter)
