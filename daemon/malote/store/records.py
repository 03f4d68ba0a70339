"""The values that go into the store and come out of it. Times are ms since epoch UTC, addresses canonical."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

from malote.core.freshness import Judgement
from malote.core.primitives import hmac_sha256
from malote.store.members import Tenure


class Level(StrEnum):
    """How well a card is proven, weakest first (design 5)."""

    SEEN = "SEEN"               # came with a message
    TOFU = "TOFU"               # imported from a file
    DIRECTORY = "DIRECTORY"     # found in a directory
    ORG = "ORG"                 # vouched for by its organisation
    VERIFIED = "VERIFIED"       # a person compared the fingerprint


@dataclass(frozen=True, slots=True)
class CardRecord:
    """The card held for one address (or "@domain")."""

    address: str
    card_raw: bytes             # signed bytes as imported
    card_hash: bytes            # SHA-256 of them
    skid: bytes                 # key id of its signing key
    level: Level
    evidence: str               # how it came here, for people: "imported from a file"
    pinned_at_ms: int           # since when this line of keys is held
    added_at_ms: int            # since when this card is


@dataclass(frozen=True, slots=True)
class PastCard:
    """A card that is or was held."""

    address: str
    card_raw: bytes
    card_hash: bytes
    skid: bytes
    level: Level
    first_at_ms: int
    last_at_ms: int


@dataclass(frozen=True, slots=True)
class LockedIdentity:
    """The private half of an address, encrypted under the keyring's passphrase."""

    address: str
    skid: bytes
    locked: bytes
    card_raw: bytes             # its own card, readable without the passphrase
    added_at_ms: int
    changed_at_ms: int


class SendState(IntEnum):
    """What is known of one recipient's part. The numbers are in the store: never reuse one."""

    NEW = 0             # never tried (only in a plan, never stored)
    IN_DOUBT = 1        # may have been accepted: our final dot left, or was about to
    ACCEPTED = 2        # the upstream's 250 was read (or SETTLED below): nothing more to do
    REFUSED = 3         # the upstream refused it


class Outcome(StrEnum):
    """What became of one recipient's part in one attempt."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    SETTLED = "settled"     # refused for good, and the sender was told by mail: a retry neither sends nor tells again
    HELD = "held"           # refused for good, and the sender is being told: still ours, among those who share the store
    UNSENT = "unsent"       # nothing of this attempt can have been accepted: no final dot left
    IN_DOUBT = "in doubt"   # the final dot left and no reply came


@dataclass(frozen=True, slots=True)
class SendRecipient:
    address: str
    sealed: bool


@dataclass(frozen=True, slots=True)
class SendIntent:
    """A message that is about to leave."""

    login: str              # who submits it; "" when the listener needs no login
    sender: str             # the From mailbox
    skid: bytes             # the sender's signing key id; b"" when nothing is sealed
    journal_hash: bytes     # HMAC-SHA-256(Store.local_key("journal"), submitted bytes after the removals)
    recipients: Sequence[SendRecipient]
    now_ms: int


@dataclass(frozen=True, slots=True)
class SendRow:
    """One recipient of a plan. `state` is what was known before this attempt; ACCEPTED is not to be sent again."""

    address: str
    state: SendState
    sealed: bool
    stream: bytes           # b"" when unsealed
    serial: int             # 0 when unsealed
    prev: int
    reply: str              # the upstream's reply, when state is ACCEPTED or REFUSED
    attempt: int            # 1 for the first


@dataclass(frozen=True, slots=True)
class SendPlan:
    """Durable: these numbers are given out to no other message, and what may be in doubt is written down.

    `journaled` False: nothing is written down, since nothing in it has a number (`Store.begin_plain`).
    """

    key: bytes
    submission_id: bytes    # 16 random bytes: the manifest id; a retry keeps it
    first_at_ms: int        # first attempt: the Date of an original without one
    sent_at_ms: int         # the signed time of this attempt
    rows: tuple[SendRow, ...]
    journaled: bool = True
    tenure: Tenure | None = None    # other processes have the journal too, and leave this to us for as long as it lasts

    def row(self, address: str) -> SendRow:
        return next(row for row in self.rows if row.address == address)

    @property
    def pending(self) -> tuple[SendRow, ...]:
        """What is to be sent: everything that was not accepted before."""
        return tuple(row for row in self.rows if row.state is not SendState.ACCEPTED)


@dataclass(frozen=True, slots=True)
class Stored:
    """A judgement that is written down."""

    judgement: Judgement
    row_id: int | None      # for `mark_delivered`; None: nothing is remembered of it (UNREADABLE)
    first: bool             # this call wrote the row
    delivered: bool         # the row says that it was delivered before


MARK_BYTES = 16         # of one participant: enough that two never meet, and no more than that to store


@dataclass(frozen=True, slots=True)
class KnownMessage:
    """A sealed message that was sent or opened here."""

    outer_id: str           # its Message-ID as others see it; "" where nobody proven said so
    inner_id: str
    participants: frozenset[bytes] | None       # marks of those whom it was from and for; None: not opened here, or not proven
    key: bytes = field(repr=False)

    def had_part(self, address: str) -> bool:
        """Whether this canonical address is one of the participants. True where they are not known."""
        return self.participants is None or participant_mark(self.key, self.inner_id, address) in self.participants


def participant_mark(key: bytes, inner_id: str, address: str) -> bytes:
    """Keyed, and another for each message: who reads the store learns nobody's correspondents."""
    return hmac_sha256(key, b"participant\0", inner_id.encode("utf-8", "surrogateescape"), b"\0",
                       address.encode("utf-8", "surrogateescape"))[:MARK_BYTES]


def split_marks(marks: bytes | None) -> frozenset[bytes] | None:
    return None if marks is None else frozenset(marks[at:at + MARK_BYTES] for at in range(0, len(marks), MARK_BYTES))


@dataclass(frozen=True, slots=True)
class FolderState:
    uidvalidity: int
    last_uid: int
    last_sync_ms: int       # our clock when the last completed look at this folder began


@dataclass(frozen=True, slots=True)
class Attempt:
    """A message that could not be dealt with, and when it is tried again."""

    account: str
    folder: str
    uidvalidity: int
    uid: int
    count: int
    next_at_ms: int
    reason: str             # class of the error, never its text


@dataclass(frozen=True, slots=True)
class OutcomeEntry:
    """One line of `malote log`. Never a subject, content, or another server's text beyond its code."""

    at_ms: int
    direction: str          # "out" or "in"
    outcome: str            # "sealed", "plain", "refused", "opened", "quarantined", "failed", ...
    account: str = ""       # login or account
    message_id: str = ""    # submission id or manifest id, hex
    sender: str = ""
    recipients: int = 0
    verdict: str = ""
    detail: str = ""
    took_ms: int = 0
