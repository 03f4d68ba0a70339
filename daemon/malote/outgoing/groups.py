"""Which recipients of one message share the same bytes. Pure.

The rules (docs/format.md, Recipients): whoever the To and Cc fields show may be seen by the others and shares a sealed copy
with them. Everybody else (Bcc) gets a copy alone, in which no other copy's reader appears and which appears in no other. Only a
rule may declare that recipients come from an expanded list; those share copies among themselves. What leaves unsealed is one
body for all, as in any other mail.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

MAX_PER_COPY = 100      # docs/format.md, Limits: recipients of one sealed copy


class Kind(StrEnum):
    """What a copy is for; the order is the order of sending: the visible group first."""

    VISIBLE = "visible"
    PLAIN = "plain"
    LIST = "list"
    BCC = "bcc"


@dataclass(frozen=True, slots=True)
class Member:
    """One envelope recipient as the grouping sees it; the address is canonical."""

    address: str
    sealed: bool
    listed: bool = False        # a rule says that it comes from an expanded list
    stream: bytes = b""         # numbering of ours; a copy has one (a part in doubt keeps its own, even if it is an older one)


@dataclass(frozen=True, slots=True)
class Group:
    """The recipients of one copy."""

    kind: Kind
    addresses: tuple[str, ...]

    @property
    def sealed(self) -> bool:
        return self.kind is not Kind.PLAIN


def group_members(members: Iterable[Member], shown: frozenset[str], *, reserve: int = 0) -> tuple[Group, ...]:
    """The copies to make, in the order to send them. Each address is in exactly one.

    `shown`: canonical addresses in To, Cc and their Resent- forms. `reserve`: places of each shared copy that are kept free
    (for a blob to the sender itself).
    """
    members = tuple(members)
    if len(members) == 1:
        return (Group(_kind(members[0], shown), (members[0].address,)),)
    sets: dict[tuple[Kind, bytes], list[str]] = {}
    for member in members:
        kind = _kind(member, shown)
        sets.setdefault((kind, member.stream if kind is not Kind.PLAIN else b""), []).append(member.address)
    size = {Kind.VISIBLE: MAX_PER_COPY - reserve, Kind.PLAIN: 0, Kind.LIST: MAX_PER_COPY - reserve, Kind.BCC: 1}
    order = list(Kind)
    return tuple(
        Group(kind, part)
        for (kind, _), addresses in sorted(sets.items(), key=lambda item: order.index(item[0][0]))
        for part in _parts(addresses, size[kind])
    )


def _kind(member: Member, shown: frozenset[str]) -> Kind:
    if not member.sealed:
        return Kind.PLAIN
    if member.address in shown:
        return Kind.VISIBLE
    return Kind.LIST if member.listed else Kind.BCC


def _parts(addresses: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    """Parts of at most `size`; 0: all in one."""
    step = size or max(1, len(addresses))
    for start in range(0, len(addresses), step):
        yield tuple(addresses[start:start + step])
