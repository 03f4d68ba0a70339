"""One connection to a mailbox and the folders of the configuration on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from malote.config import AccountConfig
from malote.errors import MailboxLost
from malote.incoming.mailbox import Fetched, Folder, Mailbox, Selected

T = TypeVar("T")

BATCH_BYTES = 16 * 1024 * 1024      # of sealed messages; a batch takes a few times this with what is made of it


def bounded(uids: Sequence[int], sizes: Mapping[int, int], start: int, messages: int) -> int:
    """Where a batch that begins at `start` ends: at `messages`, or before BATCH_BYTES are exceeded, but after one at least."""
    total = 0
    for index in range(start, min(len(uids), start + messages)):
        total += sizes.get(uids[index], 0)
        if total > BATCH_BYTES and index > start:
            return index
    return min(len(uids), start + messages)


@dataclass(frozen=True, slots=True)
class Folders:
    """What the names of the configuration mean on this server."""

    watched: tuple[Folder, ...]
    missing: tuple[str, ...]        # names of the configuration that the server does not know
    sealed: Folder
    quarantine: Folder
    target: Folder | None           # with deliver = "folder"


class Session:
    """A connection, and which folder it is in: one is selected only when it has to be."""

    def __init__(self, box: Mailbox) -> None:
        self.box = box
        self._ahead: asyncio.Task[object] | None = None
        self._validity: dict[bytes, int] = {}

    async def enter(self, folder: Folder, *, fresh: bool = False) -> Selected:
        """Select `folder` unless it is. `fresh`: again in any case, for its present UIDNEXT and number of messages.

        Raises `MailboxLost`, and ends the connection, if it is no longer the folder that it was earlier on it (UIDVALIDITY):
        the UIDs that are held now name other messages.
        """
        selected = self.box.selected
        if fresh or selected is None or selected.folder.wire != folder.wire:
            if self._ahead is not None:     # it reads by UID from the folder that is open now
                await asyncio.wait([self._ahead])
            selected = await self.box.select(folder)
            if self._validity.setdefault(folder.wire, selected.uidvalidity) != selected.uidvalidity:
                self.box.abort()
                raise MailboxLost("a folder was replaced on the mail server meanwhile")
        return selected

    def ahead(self, task: asyncio.Task[T]) -> asyncio.Task[T]:
        """From now until `task` is done no other folder is selected: it reads from this one while other work goes on."""
        self._ahead = task
        return task

    async def fetch_all(self, uids: Sequence[int], sizes: dict[int, int] | None = None) -> list[Fetched]:
        """Those messages of the selected folder that are still there. `sizes` as known saves a question."""
        return [fetched async for fetched in self.box.fetch_many(uids, sizes=sizes)] if uids else []

    async def batches(self, uids: Sequence[int], *, messages: int) -> AsyncIterator[tuple[list[int], dict[int, int]]]:
        """The UIDs in batches bounded in number and in bytes, each with its sizes as the selected folder's server says.

        Ask for each batch while that folder is selected.
        """
        start = 0
        while start < len(uids):
            sizes = await self.box.sizes(uids[start:start + messages])
            end = bounded(uids, sizes, start, messages)
            yield list(uids[start:end]), sizes
            start = end

    async def fetch_new(self, folder: Folder, uids: Sequence[int]) -> list[Fetched]:
        """Messages that were just stored in `folder`: a server need not show those before the folder is selected again."""
        await self.enter(folder)
        found = await self.fetch_all(uids)
        missing = set(uids) - {fetched.uid for fetched in found}
        if missing:
            await self.enter(folder, fresh=True)
            found += await self.fetch_all(sorted(missing))
        return found

    async def open_folders(self, account: AccountConfig) -> Folders:
        """Find the folders of the account; make those that are ours."""
        sealed = await self.box.create_folder(account.sealed_folder)
        quarantine = await self.box.create_folder(account.quarantine_folder)
        target = await self.box.create_folder(account.deliver_folder) if account.deliver == "folder" else None
        ours = {folder.wire for folder in (sealed, quarantine, target) if folder is not None}
        watched: dict[bytes, Folder] = {}
        missing: list[str] = []
        for name in account.folders:
            folder = await self.box.resolve(name)
            if folder is None:
                missing.append(name)
            elif folder.wire not in ours:       # what we have put somewhere is not incoming mail
                watched.setdefault(folder.wire, folder)
        return Folders(tuple(watched.values()), tuple(missing), sealed, quarantine, target)
