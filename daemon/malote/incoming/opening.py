"""From the bytes of one message to what it is and what it says. The receiver and the offline commands share it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import TypeVar, TypeVarTuple

import structlog

from malote.core import status
from malote.core.address import domain_of
from malote.core.card import Card, parse_card
from malote.core.freshness import FROM_GATEWAY, QUARANTINED, TO_GATEWAY, UNPROVEN, Verdict
from malote.core.gateway_word import GatewayWord, read_word
from malote.core.open import Opened, Unsealed, authenticate, unseal
from malote.core.parts import find_parts
from malote.errors import Unreadable
from malote.incoming.account import AccountKeys, Mark, mark_of
from malote.incoming.mailbox import Fetched
from malote.store import Store

NO_ID = "malote-nobody"         # where no authserv-id is ours
THREAD_BYTES = 256 * 1024       # larger messages are opened in a thread: below, the hand-over costs more than it gives

Ts = TypeVarTuple("Ts")
R = TypeVar("R")

log = structlog.get_logger("malote.incoming")


class Kind(StrEnum):
    """What one message is to us."""

    PLAIN = "plain"         # nothing of ours in it, or a sealed message that somebody passed on as an attachment
    OURS = "ours"           # a copy that a device of this account has opened
    GATEWAY = "gateway"     # opened by a gateway, which says so; whether it is one that is trusted, see `Letter.word`
    FORGED = "forged"       # carries a header of ours that we did not make
    UNREADABLE = "unreadable"   # sealed, and cannot be opened
    SEALED = "sealed"       # decrypted, and not yet proven
    OPENED = "opened"       # proven as far as it can be, see `Opened`


@dataclass(slots=True)
class Letter:
    """One message and what was found out about it."""

    fetched: Fetched
    started: float                      # monotonic seconds, for the log
    kind: Kind = Kind.PLAIN
    reason: str = ""                    # of UNREADABLE, for the local log
    mark: Mark | None = None            # of OURS
    word: GatewayWord | None = None     # of GATEWAY
    unsealed: Unsealed | None = field(default=None, repr=False)     # of SEALED and OPENED
    opened: Opened | None = field(default=None, repr=False)         # of OPENED

    @property
    def uid(self) -> int:
        return self.fetched.uid

    @property
    def message_id(self) -> str:
        """The manifest id in hex, as the log names messages; "" for what was not opened."""
        return self.unsealed.manifest.id.hex() if self.unsealed is not None else ""


class Opener:
    """Opens letters with the keys of one account and the cards of the store."""

    def __init__(self, store: Store, keys: AccountKeys) -> None:
        self._store = store
        self._keys = keys

    async def open(self, fetched: Sequence[Fetched]) -> list[Letter]:
        """Examine, decrypt and prove. One hostile message never stops the others: it is UNREADABLE."""
        letters = [Letter(message, time.monotonic()) for message in fetched]
        for letter in letters:
            await off_loop(len(letter.fetched.raw), self._examine, letter)
            await asyncio.sleep(0)      # other work on this loop goes on
        sealed = [letter for letter in letters if letter.kind is Kind.SEALED]
        cards = await find_cards(self._store, {letter.unsealed.sender for letter in sealed if letter.unsealed is not None})
        cards |= self._keys.cards       # mail to oneself
        for letter in sealed:
            await off_loop(len(letter.fetched.raw), _prove, letter, cards)
            await asyncio.sleep(0)
        return letters

    def _examine(self, letter: Letter) -> None:
        try:
            examine(letter, self._keys)
        except Unreadable as error:
            letter.kind, letter.reason = Kind.UNREADABLE, error.reason
        except Exception as error:  # noqa: BLE001 -- whatever a hostile message sets off, the mailbox goes on; the class is logged
            log.error("message set off a fault", uid=letter.uid, fault=type(error).__name__)
            letter.kind, letter.reason = Kind.UNREADABLE, "fault"


def examine(letter: Letter, keys: AccountKeys) -> None:
    """Look for parts of ours, and decrypt what is found. Raises `Unreadable`."""
    raw = letter.fetched.raw
    if any(status.carries_status(raw, name) for name in keys.authserv_ids or (NO_ID,)):
        if any(status.check_delivered(key, raw) for key in keys.mac_keys):
            letter.kind, letter.mark = Kind.OURS, mark_of(raw)
        else:
            letter.word = read_word(raw, keys.trusted, keys.addresses, keys.authserv_ids)
            letter.kind = Kind.FORGED if letter.word is None else Kind.GATEWAY
        return
    found = find_parts(raw)
    if found is None or found.forwarded:    # sent to somebody and passed on: not opened as this message's content
        return
    letter.unsealed = unseal(found, keys.pairs)
    letter.kind = Kind.SEALED


def _prove(letter: Letter, cards: Mapping[str, Card]) -> None:
    unsealed = letter.unsealed
    if unsealed is None:
        return
    letter.opened = authenticate(unsealed, card_of(unsealed.sender, cards))
    letter.kind = Kind.OPENED


def gateway_notes(opened: Opened, keys: AccountKeys) -> tuple[str, ...]:
    """Which of the two ends was a domain's gateway and not a person: no protection up to the person (RFC 9787 9.7.3)."""
    by_gateway = opened.signature == "valid" and opened.manifest.scope == "gateway"
    notes = ((by_gateway, FROM_GATEWAY), (opened.unsealed.kid in keys.gateway_kids, TO_GATEWAY))
    return tuple(note for true, note in notes if true)


def card_of(sender: str, cards: Mapping[str, Card]) -> Card | None:
    """A person's own card counts before that of the domain: a gateway cannot speak for who has a key."""
    return cards.get(sender) or cards.get("@" + domain_of(sender))


async def find_cards(store: Store, senders: set[str]) -> dict[str, Card]:
    """The cards of the senders and of their domains, as far as there are any."""
    if not senders:
        return {}
    records = await store.cards([*senders, *{"@" + domain_of(sender) for sender in senders}])
    return {address: _card(record.card_raw) for address, record in records.items()}


def remember_outer_id(store: Store, opened: Opened, verdict: Verdict, now_ms: int) -> None:
    """For replies: they must be sealed, to nobody but those who had part in it, and are threaded by its outer id. What is not
    proven says nothing but the first: nobody else may say what another message's id is outside, or who had part in it."""
    if verdict in QUARANTINED or not opened.manifest.message_id:
        return
    if verdict in UNPROVEN:
        store.remember_outer_id(opened.manifest.message_id, "", now_ms)
        return
    outer_id = next((value for name, value in opened.manifest.outer if name.lower() == "message-id"), "")
    store.remember_outer_id(opened.manifest.message_id, outer_id, now_ms, opened.participants)


@lru_cache(maxsize=2000)        # parsing a card and loading its keys costs as much as using them; 8 KB each
def _card(raw: bytes) -> Card:
    return parse_card(raw)


async def off_loop(size: int, function: Callable[[*Ts], R], *arguments: *Ts) -> R:
    """Call it, in a thread if a message of this many bytes would hold up the loop."""
    return await asyncio.to_thread(function, *arguments) if size > THREAD_BYTES else function(*arguments)
