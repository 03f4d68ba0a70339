"""Sealed mail, a mailbox on a real Dovecot, and watchers of it: what the tests of `malote.incoming` stand on."""

from __future__ import annotations

import contextlib
import imaplib
import itertools
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from email import message_from_bytes
from email.header import Header
from email.message import Message
from pathlib import Path
from typing import Any

from lab.servers import HOST, PASSWORD, Dovecot
from malote.config import AccountConfig
from malote.core.identity import Identity, new_identity
from malote.core.keys import SignatureAlgorithm
from malote.core.outer import outer_headers
from malote.core.seal import SealRecipient, seal
from malote.incoming.account import account_keys, device_name
from malote.incoming.watcher import Watcher, now_ms
from malote.store import Level, Store

SEALED, QUARANTINE = "Malote/Sealed", "Malote/Quarantine"
_numbers = itertools.count(1)


def limited(rule: str) -> str:
    """For the `extra` of a Dovecot: what each mailbox may hold, as `storage=1M` or `messages=3`."""
    return f"""
mail_plugins = quota
protocol imap {{
  mail_plugins = quota imap_quota
}}
plugin {{
  quota = count:User quota
  quota_rule = *:{rule}
  quota_vsizes = yes
}}
"""


def note(subject: str = "Grüße", body: str = "Guten Tag\r\n", *, sender: str = "", to: str = "", more: str = "") -> bytes:
    """A small message with everything that must survive: a non-ASCII subject, threading headers, 8-bit text."""
    coded = Header(subject, "utf-8").encode() if not subject.isascii() else subject
    text = (f"From: Anna <{sender or 'anna@sender.example'}>\r\nTo: {to or 'ben@test.example'}\r\nSubject: {coded}\r\n"
            f"Date: Mon, 23 Nov 2026 10:00:00 +0100\r\nMessage-ID: <{next(_numbers)}.{os.getpid()}@sender.example>\r\n{more}"
            f"MIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\n{body}")
    return text.encode()


@dataclass
class Sender:
    """Somebody who writes sealed mail: one numbering towards each recipient, as the store would give it out."""

    address: str = "anna@sender.example"
    identity: Identity = field(init=False)
    stream: bytes = field(default_factory=lambda: os.urandom(8))
    serials: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.identity = new_identity(self.address, SignatureAlgorithm.ED25519, now_ms() - 3_600_000)

    def seal(self, original: bytes, to: Identity, *, sent_at_ms: int | None = None, submission_id: bytes | None = None,
             serial: int | None = None, prev: int | None = None, address: str | None = None, frame: bytes = b"") -> bytes:
        last = self.serials.get(to.address, 0)
        number = last + 1 if serial is None else serial
        self.serials[to.address] = max(last, number)
        sent = now_ms() if sent_at_ms is None else sent_at_ms
        outer = outer_headers(frame or original, sent_at_ms=sent, sender_domain="sender.example", received=b"",
                              known_outer_ids={})
        recipient = SealRecipient(address or to.address, to.decryption[0].public, "to", self.stream, number,
                                  number - 1 if prev is None else prev)
        sealed = seal(original, identity=self.identity, recipients=[recipient], submission_id=submission_id or os.urandom(16),
                      sent_at_ms=sent, outer=outer)
        return b"Received: from mx.sender.example by mx.test.example; Mon, 23 Nov 2026 09:00:01 +0000\r\n" + sealed.raw


    def seal_odd(self, original: bytes, to: Identity) -> bytes:
        """An original that no outer header can be made from."""
        return self.seal(original, to, frame=note(to=to.address))


class Client:
    """A person's own mail client: plain imaplib on the same mailbox."""

    def __init__(self, port: int, user: str) -> None:
        self.imap = imaplib.IMAP4(HOST, port)
        try:
            self.imap.login(user, PASSWORD)
        except imaplib.IMAP4.error:
            self.imap.shutdown()
            raise

    def put(self, raw: bytes, folder: str = "INBOX", *, flags: str = "", date: str | None = None) -> None:
        when: Any = f'"{date}"' if date else None
        assert self.imap.append(f'"{folder}"', flags, when, raw)[0] == "OK"

    def select(self, folder: str = "INBOX") -> int:
        """Number of messages; 0 also for a folder that is not there."""
        answer, [count] = self.imap.select(f'"{folder}"')
        return int(count or 0) if answer == "OK" else 0

    def uids(self, folder: str = "INBOX", criteria: str = "ALL") -> list[int]:
        if not self.select(folder):
            return []
        return [int(uid) for uid in self.imap.uid("SEARCH", criteria)[1][0].split()]

    def fetch(self, folder: str = "INBOX") -> list[bytes]:
        """The raw messages that are there; one that a watcher takes away meanwhile is left out. Flags may be told in between."""
        answers = [answer for uid in self.uids(folder) for answer in self.imap.uid("FETCH", str(uid), "(BODY.PEEK[])")[1]]
        return [answer[1] for answer in answers if isinstance(answer, tuple)]

    def messages(self, folder: str = "INBOX") -> list[Message]:
        return [message_from_bytes(raw) for raw in self.fetch(folder)]

    def status_of(self, uid: int) -> tuple[set[str], str]:
        """(flags, INTERNALDATE) of a message in the selected folder."""
        text = str(self.imap.uid("FETCH", str(uid), "(FLAGS INTERNALDATE)")[1][0])
        flags = re.search(r"FLAGS \(([^)]*)\)", text)
        date = re.search(r'INTERNALDATE "([^"]*)"', text)
        assert flags
        assert date
        return {flag.replace("\\\\", "\\") for flag in flags[1].split()} - {"\\Recent"}, date[1]

    def move(self, uid: int, folder: str) -> bool:
        """False: it was gone."""
        answer, data = self.imap.uid("MOVE", str(uid), f'"{folder}"')
        return answer == "OK" and "COPYUID" in str(self.imap.response("COPYUID")) + str(data)

    def close(self) -> None:
        with contextlib.suppress(OSError, imaplib.IMAP4.error):
            self.imap.logout()


class Box:
    """One person's mailbox, keys, and as many watchers (devices) as wanted. `seal` is mail from `sender` to this person."""

    def __init__(self, dovecot: Dovecot, directory: Path, user: str) -> None:
        self.dovecot = dovecot
        self.directory = directory
        self.user = user
        self.identity = new_identity(user, SignatureAlgorithm.ED25519, now_ms() - 3_600_000)
        self.sender = Sender()
        self.client = Client(dovecot.port, user)
        self.stores: list[Store] = []

    def config(self, **settings: Any) -> AccountConfig:
        return AccountConfig(**({"name": "box", "host": HOST, "port": self.dovecot.port, "security": "none",
                                 "username": self.user, "deliver": "replace", "folders": ("INBOX",)} | settings))

    def seal(self, original: bytes | None = None, **options: Any) -> bytes:
        return self.sender.seal(note(to=self.user) if original is None else original, self.identity, **options)

    async def open_store(self, name: str = "device", *, card: bool = True) -> Store:
        """A device's store, with the sender's card held since an hour ago."""
        store = await Store.open(self.directory / name)
        self.stores.append(store)
        if card:
            await self.trust(store, self.sender.identity)
        return store

    async def trust(self, store: Store, identity: Identity, *, since_ms: int | None = None) -> None:
        await store.put_card(identity.address, identity.card.raw, identity.signing.public.id, level=Level.VERIFIED,
                             evidence="a test", now_ms=since_ms or now_ms() - 1_800_000, succession=False)

    async def watcher(self, store: Store, identities: Sequence[Identity] | None = None, **settings: Any) -> Watcher:
        """One device. Among the settings also `clock`, a function that gives ms, and `device`, its name in marks."""
        clock = settings.pop("clock", now_ms)
        device = settings.pop("device", None) or device_name(await store.local_key("device"))
        held = [self.identity] if identities is None else identities
        keys = account_keys(held, (self.user,))
        return Watcher(self.config(**settings), store=store, keys=lambda: keys, clock=clock, password=_password,
                       device=device)

    async def close(self) -> None:
        self.client.close()
        for store in self.stores:
            await store.close()


async def _password() -> str:
    return PASSWORD


def verdict(message: Message) -> str:
    """What the header of an opened message says."""
    return str(message["Malote-Verdict"]).split(";")[0]


def verdicts(messages: Sequence[Message]) -> list[str]:
    return [verdict(message) for message in messages]


def wait_until(condition: Any, seconds: float = 20) -> Iterator[None]:
    """For loops: `for _ in wait_until(lambda: ...): await asyncio.sleep(0.05)`. Fails when time is up."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        yield
