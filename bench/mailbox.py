"""Opening 1,000 sealed messages of 5 KB in a Dovecot mailbox, against two baselines in the same run.

*Identity*: our own watcher on the same messages, with decryption and signature replaced by looking up the answer; what is left
is scan, fetch, judgement, append, verification, commits and move. *Plain*: a pipelined FETCH, APPEND and MOVE of the same
messages over the same client, with nothing checked and nothing written down.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path
from unittest.mock import patch

from bench.harness import RECIPIENT, SENDER, BenchError, Result, servers, workplace
from lab.servers import PASSWORD, Dovecot, Lab
from malote.config import AccountConfig, LogConfig
from malote.core.identity import Identity, new_identity
from malote.core.keys import SignatureAlgorithm
from malote.core.open import Opened, Unsealed, authenticate, unseal
from malote.core.outer import outer_headers
from malote.core.parts import find_parts
from malote.core.primitives import random_bytes, sha256
from malote.core.seal import SealRecipient, seal
from malote.incoming import opening
from malote.incoming.account import account_keys
from malote.incoming.mailbox import Mailbox
from malote.incoming.watcher import Watcher
from malote.logs import configure_logs
from malote.store import Level, Store

COUNT = 1000
SIZE_BYTES = 5 * 1024
RUNS = 3
DEVICE = "0123456789abcdef"


@dataclass(frozen=True, slots=True)
class Mail:
    raw: bytes
    opened: Opened


@dataclass(frozen=True, slots=True)
class Answer:
    """Stands for the parts that were found."""

    unsealed: Unsealed
    forwarded: bool = False


def make_mail(sender: Identity, reader: Identity, now_ms: int) -> list[Mail]:
    """Sealed messages with serials 1 to COUNT, and what opening each of them gives."""
    mail = []
    for number in range(1, COUNT + 1):
        message = EmailMessage()
        message["From"], message["To"], message["Subject"] = SENDER, RECIPIENT, f"number {number}"
        message["Date"], message["Message-ID"] = "Mon, 23 Nov 2026 10:00:00 +0000", f"<{number}@north.example>"
        message.set_content("x" * 70 + "\n" + random_bytes((SIZE_BYTES - 300) // 2).hex(" ", 32).replace(" ", "\n") + "\n")
        original = message.as_bytes().replace(b"\n", b"\r\n")
        outer = outer_headers(original, sent_at_ms=now_ms, sender_domain="north.example", received=b"", known_outer_ids={})
        recipient = SealRecipient(RECIPIENT, reader.card.encryption_key(now_ms), "to", b"streamid", number, number - 1)
        raw = seal(original, identity=sender, recipients=[recipient], submission_id=random_bytes(16), sent_at_ms=now_ms,
                   outer=outer).raw
        found = find_parts(raw)
        assert found is not None
        keys = [(reader.address, key) for key in reader.decryption]
        mail.append(Mail(raw, authenticate(unseal(found, keys), sender.card)))
    return mail


@contextmanager
def identity_instead_of_opening(mail: Sequence[Mail]) -> Iterator[None]:
    """What decryption and signature would give is looked up by the bytes of the message."""
    answers = {sha256(each.raw): Answer(each.opened.unsealed) for each in mail}
    by_digest = {each.opened.unsealed.payload_digest: each.opened for each in mail}
    with ExitStack() as stack:
        for name, replacement in {
            "find_parts": lambda raw: answers[sha256(raw)],
            "unseal": lambda found, keys: found.unsealed,
            "authenticate": lambda unsealed, card: by_digest[unsealed.payload_digest],
        }.items():
            stack.enter_context(patch.object(opening, name, replacement))
        yield


def account(user: str, dovecot: Dovecot, lab: Lab) -> AccountConfig:
    return AccountConfig(name=user, host="localhost", port=dovecot.imaps_port, ca_file=lab.certificate, username=user,
                         deliver="replace", addresses=(RECIPIENT,), password_file=Path("/unused"))


async def password() -> str:
    return PASSWORD


async def fill(config: AccountConfig, mail: Sequence[Mail]) -> None:
    box = await Mailbox.connect(config, password=password)
    try:
        outcomes = await box.append_many("INBOX", [(each.raw, (), None) for each in mail])
        if failed := [outcome for outcome in outcomes if isinstance(outcome, Exception)]:
            raise BenchError(f"mailbox not filled: {failed[0]}")
    finally:
        await box.logout()


async def watch(config: AccountConfig, root: Path, sender: Identity, reader: Identity) -> float:
    """Seconds that the watcher takes from connecting to having opened everything."""
    store = await Store.open(root)
    try:
        await store.put_card(SENDER, sender.card.raw, sender.card.verify.id, level=Level.VERIFIED, evidence="bench", now_ms=1,
                             succession=False)
        keys = account_keys([reader], (RECIPIENT,))
        watcher = Watcher(config, store=store, keys=lambda: keys, device=DEVICE, password=password)
        start = time.perf_counter()
        await watcher.run_once()
        elapsed = time.perf_counter() - start
        fresh = sum(entry.verdict == "FRESH" for entry in await store.recent_outcomes(COUNT))
        if fresh != COUNT:
            raise BenchError(f"{fresh} of {COUNT} messages were opened as FRESH")
    finally:
        await store.close()
    return elapsed


async def plain(config: AccountConfig) -> float:
    """Seconds of a pipelined FETCH, APPEND and MOVE of everything, in the batches that the watcher uses."""
    box = await Mailbox.connect(config, password=password)
    try:
        start = time.perf_counter()
        await box.create_folder("Moved")
        await box.select("INBOX")
        uids = await box.search("ALL")
        for position in range(0, len(uids), 100):
            batch = uids[position:position + 100]
            fetched = [message async for message in box.fetch_many(batch)]
            await box.append_many("INBOX", [(message.raw, message.flags, message.internal_date) for message in fetched])
            await box.move(batch, "Moved")
        return time.perf_counter() - start
    finally:
        await box.logout()


async def measure(lab: Lab, dovecot: Dovecot, root: Path) -> dict[str, float]:
    now_ms = time.time_ns() // 1_000_000
    sender = new_identity(SENDER, SignatureAlgorithm.HYBRID, now_ms - 86_400_000)
    reader = new_identity(RECIPIENT, SignatureAlgorithm.HYBRID, now_ms - 86_400_000)
    mail = make_mail(sender, reader, now_ms)
    seconds: dict[str, list[float]] = {"opened": [], "identity": [], "plain": []}
    for run in range(RUNS):
        for kind, values in seconds.items():
            user = f"{kind}{run}@bench.example"
            dovecot.add_user(user)
            config = account(user, dovecot, lab)
            await fill(config, mail)
            if kind == "plain":
                values.append(await plain(config))
            elif kind == "identity":
                with identity_instead_of_opening(mail):
                    values.append(await watch(config, root / user, sender, reader))
            else:
                values.append(await watch(config, root / user, sender, reader))
    return {kind: statistics.median(values) for kind, values in seconds.items()}


def open_mailbox() -> Result:
    configure_logs(LogConfig(level="error"))
    with workplace() as root, servers(root / "lab") as lab:
        seconds = asyncio.run(measure(lab, lab.dovecot([]), root))
    return Result("open-mailbox", seconds["opened"] / seconds["identity"], "<= 1.5",
                  f"1,000 messages of 5 KB: opened in {seconds['opened']:.2f} s; identity in place of sealing "
                  f"{seconds['identity']:.2f} s; plain FETCH + APPEND + MOVE {seconds['plain']:.2f} s, to which the ratio is "
                  f"{seconds['opened'] / seconds['plain']:.2f} (wanted <= 3)")
