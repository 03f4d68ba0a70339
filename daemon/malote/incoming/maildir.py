"""Delivery into a Maildir on this machine: nobody but its owner can read what is opened."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Collection, Sequence
from pathlib import Path

from malote.errors import MailboxError
from malote.incoming.arbiter import Copy
from malote.incoming.delivery import Failure, Parcel
from malote.incoming.mailbox import Folder
from malote.incoming.session import Session
from malote.private_files import sync_directory

_FLAGS = {"\\draft": "D", "\\flagged": "F", "\\answered": "R", "\\seen": "S", "\\deleted": "T"}    # IMAP -> Maildir info


class MaildirDelivery:
    """tmp, fsync, rename, fsync of the directory; 0600 and 0700. The mark in the file's name makes a second try harmless."""

    shared = False

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def deliver(self, session: Session, source: Folder, parcels: Sequence[Parcel]) -> None:
        await asyncio.to_thread(self._deliver, parcels)

    async def copies(self, session: Session, source: Folder, messages: Collection[str]) -> list[Copy]:
        return []       # another device's Maildir is not to be seen from here, and its copy there is no double

    async def copies_anywhere(self, session: Session, messages: Collection[str]) -> list[Copy]:
        return []

    async def is_same(self, session: Session, one: Copy, other: Copy) -> bool:
        return False

    async def withdraw(self, session: Session, copy: Copy, other: Copy | None = None) -> bool:
        raise MailboxError("a message delivered into a Maildir is not taken back")

    async def reflag(self, session: Session, source: Folder, parcel: Parcel, flags: Sequence[str]) -> None:
        """Not followed: from its delivery on, the copy's flags are those of its own reader."""

    def _deliver(self, parcels: Sequence[Parcel]) -> None:
        try:
            self._make_directories()
            there = self._there() if any(parcel.again for parcel in parcels) else ""
        except OSError as error:
            for parcel in parcels:
                parcel.failure = Failure(_code(error))
            return
        changed: set[Path] = set()
        written: list[Parcel] = []
        for parcel in parcels:
            if str(parcel.mark) in there:
                parcel.copy = 0
                continue
            try:
                changed.add(self._write(parcel))
                written.append(parcel)
            except OSError as error:
                parcel.failure = Failure(_code(error))
        try:
            for directory in changed:
                sync_directory(directory)
        except OSError as error:
            for parcel in written:
                parcel.failure = Failure(_code(error))
        else:
            for parcel in written:
                parcel.copy = 0

    def _make_directories(self) -> None:
        for directory in (self._directory, *(self._directory / name for name in ("tmp", "new", "cur"))):
            if not directory.is_dir():
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                sync_directory(directory.parent)

    def _there(self) -> str:
        """The names of all messages, as one text to look for marks in."""
        return "\n".join(entry.name for name in ("new", "cur") for entry in os.scandir(self._directory / name))

    def _write(self, parcel: Parcel) -> Path:
        """One file, durable under its temporary name, then renamed. Returns the directory that it is in now."""
        letters = "".join(sorted({_FLAGS[flag.lower()] for flag in parcel.flags if flag.lower() in _FLAGS}))
        # every part of the name is ours: time, mark, host. The same mark gives the same name, so it cannot be there twice
        name = f"{parcel.internal_date_ms // 1000}.malote-{parcel.mark}.{_host()}"
        final = self._directory / "cur" / f"{name}:2,{letters}" if letters else self._directory / "new" / name
        temporary = self._directory / "tmp" / name
        temporary.unlink(missing_ok=True)       # of a try that ended in a crash
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(unix_lines(parcel.raw))
                file.flush()
                os.utime(file.fileno(), (parcel.internal_date_ms / 1000, parcel.internal_date_ms / 1000))
                os.fsync(file.fileno())
            temporary.rename(final)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        return final.parent


def unix_lines(raw: bytes) -> bytes:
    """With LF line ends, as Maildir readers expect, where that can be undone: every line ended in CRLF."""
    text = raw.replace(b"\r\n", b"\n")
    return text if text.replace(b"\n", b"\r\n") == raw else raw


def _host() -> str:
    return socket.gethostname().replace("/", "_").replace(":", "_")


def _code(error: OSError) -> str:
    return "OVERQUOTA" if error.errno in {28, 122} else "DISK"      # ENOSPC, EDQUOT
