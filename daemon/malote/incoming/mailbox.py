"""One IMAP connection as the receiver and the watcher need it; hides aioimaplib and the wire.

Errors: `MailboxLost` when the connection is gone (what was under way may or may not have happened), `MailboxError` with the
response code (`OVERQUOTA`, `TRYCREATE`, `NONEXISTENT`, `LIMIT`, else `NO` or `BAD`) when the server refuses.
A Mailbox may be used by several tasks: reading and appending go in flight together, the rest waits its turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from aioimaplib import aioimaplib

from malote.config import AccountConfig
from malote.errors import MailboxError
from malote.incoming import imap_names, imap_parse
from malote.incoming.imap_append import Appended, Appender, AppendItem, appendable
from malote.incoming.imap_exchange import Exchange, Piece
from malote.incoming.imap_fetch import Fetched, Peeked, Reader
from malote.incoming.imap_folders import Folder, Folders, FolderStatus
from malote.incoming.imap_login import MailClient, Password, open_connection
from malote.incoming.imap_parse import Part, Status
from malote.incoming.imap_protocol import MAX_LITERAL
from malote.incoming.imap_quota import Quota, read_quotas

__all__ = ["AppendItem", "Appended", "Fetched", "Folder", "FolderStatus", "Mailbox", "Part", "Peeked", "Quota", "Selected",
           "appendable"]

COMMAND_SECONDS = 120.0     # without a byte moving; MOVE and APPEND into a large folder take a while on slow disks
SEARCH_SECONDS = 600.0      # a search in headers that the server has not indexed reads every message
LOGOUT_SECONDS = 5.0
EXPUNGE_RETRIES = 5         # of a transfer some of whose messages went away under it
IDLE_MAX_SECONDS = 1740.0   # RFC 2177: 29 minutes


@dataclass(frozen=True, slots=True)
class Selected:
    """The folder that is open."""

    folder: Folder
    uidvalidity: int
    uidnext: int            # 0 if the server does not say
    exists: int
    keywords: bool          # whether keywords of our own are kept (PERMANENTFLAGS has \\*)
    read_only: bool


class Mailbox(Reader):
    """See the module. Made by `connect`; ends by `logout`, `abort`, or when the connection is lost."""

    def __init__(self, client: MailClient, account: AccountConfig, *, command_seconds: float, search_seconds: float) -> None:
        super().__init__(client.protocol, command_seconds=command_seconds, search_seconds=search_seconds)
        self._client = client
        self._account = account
        self._folders = Folders(client.protocol, command_seconds)
        self._appender = Appender(client.protocol, command_seconds)
        self.selected: Selected | None = None

    @classmethod
    async def connect(cls, cfg: AccountConfig, *, password: Password, ssl_context: ssl.SSLContext | None = None,
                      max_message_bytes: int = MAX_LITERAL, command_seconds: float = COMMAND_SECONDS,
                      search_seconds: float = SEARCH_SECONDS) -> Self:
        """Connect and log in. `password` is asked only once TLS stands; with `token_command` it is not asked at all.

        Without `ssl_context` one is made that trusts `ca_file` or the system's authorities.
        Raises `MailboxError` (login refused, mechanism missing), `MailboxLost` (not reached), `ConfigError`.
        """
        client = await open_connection(cfg, password, ssl_context, max_literal=max_message_bytes, command_seconds=command_seconds)
        return cls(client, cfg, command_seconds=command_seconds, search_seconds=search_seconds)

    # --- what the server can do, and whether it is still there ---

    @property
    def capabilities(self) -> frozenset[str]:
        """As announced after login, upper case."""
        return frozenset(self._protocol.capabilities)

    @property
    def has_move(self) -> bool:
        """RFC 6851."""
        return "MOVE" in self._protocol.capabilities or "IMAP4REV2" in self._protocol.capabilities

    @property
    def has_uidplus(self) -> bool:
        """RFC 4315: APPENDUID, COPYUID, UID EXPUNGE."""
        return "UIDPLUS" in self._protocol.capabilities or "IMAP4REV2" in self._protocol.capabilities

    @property
    def has_idle(self) -> bool:
        """RFC 2177."""
        return "IDLE" in self._protocol.capabilities or "IMAP4REV2" in self._protocol.capabilities

    @property
    def lost(self) -> asyncio.Event:
        """Set once the connection is gone, for whatever reason; `lost_reason` says which."""
        return self._protocol.lost

    @property
    def lost_reason(self) -> str:
        return self._protocol.lost_reason

    @property
    def may_act(self) -> Callable[[], bool] | None:
        """Asked before each command is sent; after False the connection is lost. None: nobody is asked."""
        return self._protocol.may_act

    @may_act.setter
    def may_act(self, asked: Callable[[], bool] | None) -> None:
        self._protocol.may_act = asked

    def check_ours(self) -> None:
        """For what is done without a command. Raises `MailboxLost`."""
        self._protocol.check_ours()

    # --- folders ---

    async def list_folders(self) -> list[Folder]:
        """All folders, freshly asked. The answer is remembered for `resolve`."""
        return await self._folders.refresh()

    async def find_special_use(self, attribute: str) -> Folder | None:
        """The folder with that special use (RFC 6154), as `\\\\Junk`; where the server marks none, by its usual names."""
        return await self._folders.special_use(attribute)

    async def resolve(self, name: str) -> Folder | None:
        """The folder that a name of the configuration means: `\\\\Junk` by special use, `A/B` with the server's delimiter and
        prefix; None if it does not exist."""
        return await self._folders.resolve(name)

    async def create_folder(self, name: str) -> Folder:
        """Make and subscribe the folder that a name of the configuration means; no error if it exists already."""
        return await self._folders.create(name)

    async def status(self, folder: str | Folder) -> FolderStatus:
        """Counters of a folder without opening it (RFC 3501 6.3.10). Not meant for the one that is selected."""
        return await self._folders.status(await self._known(folder))

    async def quotas(self, folder: str | Folder) -> list[Quota]:
        """The limits that hold for a folder (RFC 9208); none where the server knows of none."""
        return await read_quotas(self._protocol, await self._known(folder), self._seconds)

    async def _known(self, folder: str | Folder) -> Folder:
        if isinstance(folder, Folder):
            return folder
        found = await self._folders.resolve(folder)
        if found is None:
            raise MailboxError(f"there is no folder {folder}", code="NONEXISTENT")
        return found

    async def select(self, folder: str | Folder, *, read_only: bool = False) -> Selected:
        """Open a folder. Raises `MailboxError`: NONEXISTENT, or NOUIDVALIDITY and UIDNOTSTICKY for what cannot be watched."""
        target = await self._known(folder)
        name = "EXAMINE" if read_only else "SELECT"
        command = Exchange(name, self._protocol.new_tag(), (target.argument(),), seconds=self._seconds,
                           wants=frozenset({"UIDVALIDITY", "UIDNEXT", "PERMANENTFLAGS", "UIDNOTSTICKY", "FLAGS"}))
        self.selected = None
        self._protocol.uidvalidity = 0
        self._protocol.exists = 0
        await self._protocol.execute(command)
        self._protocol.state = aioimaplib.AUTH      # a SELECT that fails leaves no folder open (RFC 3501 6.3.1)
        status = command.ok(f"open the folder {target.name}")
        self._protocol.state = aioimaplib.SELECTED
        self._protocol.news.clear()
        codes = {code.code: code for code in command.codes}
        with self._protocol.readable():
            validity = imap_names.parse_uid(codes["UIDVALIDITY"].arguments) if "UIDVALIDITY" in codes else 0
            uidnext = imap_names.parse_uid(codes["UIDNEXT"].arguments) if "UIDNEXT" in codes else 0
        if not validity or "UIDNOTSTICKY" in codes:
            raise MailboxError(f"the folder {target.name} has no lasting UIDs, it cannot be watched",
                               code="UIDNOTSTICKY" if validity else "NOUIDVALIDITY")
        self._protocol.uidvalidity = validity
        permanent = codes["PERMANENTFLAGS"].arguments if "PERMANENTFLAGS" in codes else b""
        self.selected = Selected(target, validity, uidnext, self._protocol.exists, b"\\*" in permanent,
                                 read_only or status.code == "READ-ONLY")
        return self.selected

    async def unselect(self) -> None:
        """Close the folder without expunging anything (RFC 3691), also where the server has no UNSELECT."""
        if self.selected is None:
            return
        if "UNSELECT" in self._protocol.capabilities:
            name = "UNSELECT"
        else:
            name = "CLOSE"      # expunges \\Deleted unless the folder was opened by EXAMINE (RFC 3501 6.4.2)
            await self.select(self.selected.folder, read_only=True)
        command = Exchange(name, self._protocol.new_tag(), seconds=self._seconds)
        await self._protocol.execute(command)
        command.ok("close the folder")
        self.selected = None
        self._protocol.uidvalidity = 0
        self._protocol.state = aioimaplib.AUTH

    # --- changing ---

    async def append(self, folder: str | Folder, raw: bytes, flags: Sequence[str] = (),
                     internal_date: str | None = None) -> Appended | None:
        """Store a message; None if the server does not say where (no UIDPLUS).

        `internal_date` as FETCH gave it. Raises `MailboxError`: NUL or BARECR before anything is sent (see `appendable`),
        OVERQUOTA, TRYCREATE, LIMIT, TOOBIG and others from the server.
        """
        (outcome,) = await self.append_many(folder, [(raw, flags, internal_date)])
        if isinstance(outcome, MailboxError):
            raise outcome
        return outcome

    async def append_many(self, folder: str | Folder, items: Iterable[AppendItem]) -> list[Appended | MailboxError | None]:
        """Store many (message, flags, internal date), in flight together where the server has LITERAL+.

        For each, in order, what `append` returns, or the refusal that it raises. Raises `MailboxLost`.
        """
        return await self._appender.append_many(await self._known(folder), items)

    async def move(self, uids: Iterable[int], folder: str | Folder) -> dict[int, int]:
        """Move messages; source UID -> new UID for those that this command moved. A UID not in it was gone.

        Without MOVE: COPY and expunge. Without UIDPLUS the new UIDs are unknown: 0.
        Two connections that move one message in the same instant may both be told so, even by servers that have MOVE: Dovecot
        copies for both and removes once. The folder then holds the message twice, and the smaller new UID was first.
        """
        target = await self._known(folder)
        if self.has_move and self.has_uidplus:
            return await self._transfer("MOVE", uids, target)
        moved: dict[int, int] = {}
        for part, _ in imap_names.uid_sets(uids):
            present = await self.search(f"UID {part.decode()}")
            if present:
                copied = await self._transfer("MOVE" if self.has_move else "COPY", present, target)
                if not self.has_move:
                    await self.expunge(copied or present)
                moved |= copied or dict.fromkeys(present, 0)
        return moved

    async def copy(self, uids: Iterable[int], folder: str | Folder) -> dict[int, int]:
        """Copy messages; source UID -> new UID (needs UIDPLUS)."""
        return await self._transfer("COPY", uids, await self._known(folder))

    async def _transfer(self, name: str, uids: Iterable[int], target: Folder) -> dict[int, int]:
        moved: dict[int, int] = {}
        for part, members in imap_names.uid_sets(uids):
            moved |= await self._transfer_part(name, part, members, target)
        return moved

    async def _transfer_part(self, name: str, part: bytes, members: Sequence[int], target: Folder) -> dict[int, int]:
        for _ in range(EXPUNGE_RETRIES):
            command = Exchange(name, self._protocol.new_tag(), (part, target.argument()), prefix="UID", seconds=self._seconds,
                               wants=frozenset({"COPYUID"}))
            await self._protocol.execute(command)
            if command.status is None or command.status.code != "EXPUNGEISSUED":
                break
            # RFC 5530: nothing was transferred since some of them are gone; a NOOP lets the server tell us which
            await self.noop()
            present = await self.search(f"UID {part.decode()}")
            if not present:
                return {}
            ((part, members),) = imap_names.uid_sets(present)
        status = command.ok(f"{name.lower()} messages to {target.name}")
        return self._copied([*command.codes, status], members)

    def _copied(self, statuses: Iterable[Status], members: Sequence[int]) -> dict[int, int]:
        moved: dict[int, int] = {}
        with self._protocol.readable():
            for status in statuses:
                if status.code == "COPYUID":
                    moved |= imap_parse.parse_copyuid(status.arguments)[1]
            if not moved.keys() <= set(members) or len(set(moved.values())) != len(moved):
                raise ValueError("a COPYUID for messages that were not asked for")
        return moved

    async def store_flags(self, uids: Iterable[int], add: Sequence[str] = (), remove: Sequence[str] = ()) -> None:
        """Set and clear flags and keywords. UIDs that are gone are passed over."""
        commands: list[Exchange] = []
        for part, _ in imap_names.uid_sets(uids):
            for sign, flags in ((b"+", add), (b"-", remove)):
                if flags:
                    pieces: tuple[Piece, ...] = (part, sign + b"FLAGS.SILENT", imap_names.flag_list(flags))
                    commands.append(Exchange("STORE", self._protocol.new_tag(), pieces, prefix="UID", seconds=self._seconds))
        for command in commands:
            await self._protocol.submit(command)
        for command in commands:
            await self._protocol.finished(command)
        for command in commands:
            command.ok("set flags")

    async def expunge(self, uids: Iterable[int]) -> None:
        """Delete exactly these messages for good.

        Raises `MailboxError` NOUIDPLUS where the server can only expunge everything that is marked deleted and others' messages
        are among it; ours then stay marked.
        """
        wanted = sorted(set(uids))
        await self.store_flags(wanted, add=("\\Deleted",))
        if self.has_uidplus:
            for part, _ in imap_names.uid_sets(wanted):
                await self._expunge((part,), "UID")
            return
        if not set(await self.search("DELETED")) <= set(wanted):
            raise MailboxError("the mail server cannot delete single messages (UIDPLUS is missing)", code="NOUIDPLUS")
        await self._expunge((), "")

    async def _expunge(self, pieces: tuple[Piece, ...], prefix: str) -> None:
        command = Exchange("EXPUNGE", self._protocol.new_tag(), pieces, prefix=prefix, seconds=self._seconds)
        await self._protocol.execute(command)
        command.ok("delete messages")

    # --- waiting and ending ---

    async def noop(self) -> None:
        """Ask whether the connection lives; news, if any, ends the next `idle` at once."""
        command = Exchange("NOOP", self._protocol.new_tag(), seconds=self._seconds)
        await self._protocol.execute(command)
        command.ok("answer")

    async def idle(self, timeout_seconds: float) -> bool:
        """Wait for news of the selected folder; True if something happened (also since the last call, between commands).

        A hint only: whatever it returns, ask `search_after`. Without IDLE it sleeps `poll_seconds` at most and asks once.
        Raises `MailboxLost` at once when the connection goes.
        """
        if self.has_idle:
            return await self._protocol.idle_for(min(timeout_seconds, IDLE_MAX_SECONDS), self._seconds)
        if not self._protocol.news.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(timeout_seconds, self._account.poll_seconds)):
                    await self._protocol.news.wait()
            await self.noop()
        return self._protocol.take_news()

    def wake(self) -> None:
        """End an `idle` under way early, from another task; it then returns True."""
        self._protocol.news.set()

    async def logout(self) -> None:
        """Say goodbye if the server listens, and close. Never raises."""
        with contextlib.suppress(MailboxError, TimeoutError):
            async with asyncio.timeout(LOGOUT_SECONDS):
                await self._protocol.logout()
        self.abort()

    def abort(self) -> None:
        """Close at once; commands under way raise `MailboxLost`."""
        self._client.abort()
