"""`Malote-Gateway`: a gateway's word for what it opened, to the watchers of those mailboxes that trust it (docs/gateway.md).

A watcher on a mailbox behind a gateway can neither check the mac in Malote-Verdict (it has not the keys, and the mailbox server
has put trace on top since) nor leave out checking. So the gateway says once more, under a key that it shares with the watcher of
this one mailbox: for whom it opened the message, when, and what it found. The content and all that our headers say are below
that mac; above them may stand trace alone. What the mac cannot say, that the copy is the only one, the watcher remembers.

Each address has a key of its own, derived from that of its domain: whoever watches one mailbox can speak for no other.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from malote.core import status
from malote.core.address import canonical_card_address, domain_of, is_gateway
from malote.core.freshness import Verdict
from malote.core.message import Bytes, fold_field, unfold
from malote.core.primitives import equal, hmac_sha256
from malote.errors import FormatError

MAX_MACS = 8        # one of each key of a gateway: the present one and those that are being replaced

_LABEL = b"MLT1 gateway word\0"
_VALUE = re.compile(rb"([a-z0-9.-]+); for=([!-:<-~]+); opened=([0-9]{1,15}); mac=((?:[0-9a-f]{64},?){1,%d})" % MAX_MACS)
_LINE = re.compile(r"malote-gateway-1 (\S+) ([A-Za-z0-9_-]{43})")
_ODD = re.compile(rb"[^!-$&-+\--:<-~]")     # becomes %XX: what is not printed, and what separates here
_NO_NAME = re.compile(r"[^a-z0-9.-]+")
# What a mail server puts on top of what it is given; X-... and ARC-... too. Anything else there would be somebody's words.
_TRACE = frozenset({b"return-path", b"delivered-to", b"envelope-to", b"received", b"received-spf", b"authentication-results",
                    b"malote-quarantine"})      # the gateway's own, on what it does not let pass
_FIELD = re.compile(rb"([!-9;-~]+)[ \t]*:[^\n]*\n(?:[ \t][^\n]*\n)*")


@dataclass(frozen=True, slots=True)
class GatewayKey:
    """`holder`: the address that it is for, or `@domain`: all of that domain."""

    holder: str
    key: bytes = field(repr=False)

    def of(self, address: str) -> bytes | None:
        """The key of one address; None: it is not for that one."""
        mailbox = _mailbox(address)
        if is_gateway(self.holder):
            return _derive(self.key, b"address\0", mailbox) if domain_of(address) == self.holder[1:] else None
        return self.key if _mailbox(self.holder) == mailbox else None

    def line(self) -> str:
        return f"malote-gateway-1 {self.holder} {base64.urlsafe_b64encode(self.key).decode().rstrip('=')}"


def export_key(master: bytes, holder: str) -> GatewayKey:
    """What a watcher is given. `holder`: a canonical address, or `@domain`."""
    of_domain = GatewayKey("@" + domain_of(holder), _derive(master, b"domain\0", domain_of(holder)))
    key = of_domain.key if is_gateway(holder) else of_domain.of(holder)
    assert key is not None      # noqa: S101 -- the domain is its own
    return GatewayKey(holder, key)


def parse_keys(text: str) -> tuple[GatewayKey, ...]:
    """The keys in a file: a line each; empty ones and those that begin with # are passed over. Raises `FormatError`."""
    keys = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            raise FormatError("holds a line that is no key of a gateway")
        try:
            keys.append(GatewayKey(canonical_card_address(found[1]), base64.urlsafe_b64decode(found[2] + "=")))
        except binascii.Error:
            raise FormatError("holds a line that is no key of a gateway") from None
    if not keys:
        raise FormatError("holds no key of a gateway")
    return tuple(keys)


def _derive(key: bytes, label: bytes, name: str) -> bytes:
    return hmac_sha256(key, b"MLT1 gateway " + label + name.encode())


def _mailbox(address: str) -> str:
    """Without the detail: anna+news@example.org is read by whoever reads anna@example.org."""
    local, _, domain = address.rpartition("@")
    return f"{local.partition('+')[0]}@{domain}"


# --- the gateway's side ---

def make_word(masters: Sequence[bytes], gateway: str, address: str, opened_ms: int, headers: bytes, content: Bytes) -> bytes:
    """The field that goes above `headers` (ours, from `status.make_headers`) and the content: with a mac by each of `masters`."""
    said = b"%b; for=%b; opened=%d" % (_NO_NAME.sub("-", gateway.lower()).encode(), _word(_mailbox(address)), opened_ms)
    block = status.find_block(headers)
    if block is None:
        raise FormatError("not our headers")
    covered = _covered(block, content)
    keys = [key for master in masters[:MAX_MACS] if (key := export_key(master, address).key)]
    macs = b",".join(hmac_sha256(key, _LABEL, said, b"\0", covered).hex().encode() for key in keys)
    return fold_field("Malote-Gateway", (said + b"; mac=" + macs).replace(b",", b", ").decode("ascii").split(" "))


# --- the watcher's side ---

@dataclass(frozen=True, slots=True)
class GatewayWord:
    """What a gateway says of a message. `proven`: it is one that is trusted, and says it to one of our addresses."""

    gateway: str
    verdict: Verdict
    mark: str           # of the message, equal in all copies of it
    opened_ms: int
    proven: bool


def read_word(
    raw: bytes, keys: Iterable[GatewayKey], addresses: Sequence[str], authserv_ids: Sequence[str],
) -> GatewayWord | None:
    """None: this is not a message as a gateway delivers it, with nothing but trace on top."""
    block = status.find_block(raw)
    if block is None:
        return None
    above, content = _fields(raw[:block.start()]), raw[block.end():]
    verdict = status.VALUE.fullmatch(unfold(block[1]))
    if not above or verdict is None or not _consistent(block, verdict):
        return None
    *trace, field = above
    said = _VALUE.fullmatch(unfold(field[0].partition(b":")[2]).replace(b", ", b","))
    if field[1].lower() != b"malote-gateway" or said is None or not all(map(_is_trace, trace)):
        return None
    names = {verdict[4].decode("ascii"), *authserv_ids}
    if any(status.carries_status(part, name) for part in (raw[:field.start()], content) for name in names):
        return None
    return GatewayWord(said[1].decode("ascii"), Verdict(verdict[1].decode("ascii")),
                       verdict[3].decode("ascii").partition("-")[0],
                       int(said[3]), _is_proven(said, _covered(block, content), keys, addresses))


def _is_proven(said: re.Match[bytes], covered: bytes, keys: Iterable[GatewayKey], addresses: Sequence[str]) -> bool:
    text, macs = said[0].rpartition(b"; mac=")[0], said[4].split(b",")
    proven = False
    for trusted in keys:
        for address in addresses:
            key = trusted.of(address) if said[2] == _word(_mailbox(address)) else None
            if key is not None:
                mac = hmac_sha256(key, _LABEL, text, b"\0", covered).hex().encode()
                proven |= any(equal(mac, each) for each in macs)
    return proven


def _fields(above: bytes) -> list[re.Match[bytes]]:
    """What stands above our headers; empty if some of it is no field."""
    fields: list[re.Match[bytes]] = []
    position = 0
    while position < len(above):
        found = _FIELD.match(above, position)
        if found is None:
            return []
        fields.append(found)
        position = found.end()
    return [] if b"\0" in above or above.count(b"\r") != above.count(b"\r\n") else fields


def _is_trace(found: re.Match[bytes]) -> bool:
    name = found[1].lower()
    return name in _TRACE or name.startswith((b"x-", b"arc-"))


def _consistent(block: re.Match[bytes], verdict: re.Match[bytes]) -> bool:
    """Whether the three headers say the same, and a verdict that there is."""
    try:
        known = Verdict(verdict[1].decode("ascii"))
    except ValueError:
        return False
    results = " ".join(status.results_of(known, verdict[4].decode("ascii"))).encode("ascii")
    return unfold(block[2]) == verdict[3] and unfold(block[3]) == results


def _covered(block: re.Match[bytes], content: Bytes) -> bytes:
    """Everything below the field, with folds and line ends as any server may write them."""
    return b"\0".join([*(unfold(block[number]) for number in (1, 2, 3)), status.message_hash(content)])


def _word(text: str) -> bytes:
    return _ODD.sub(lambda hit: b"%%%02X" % hit[0][0], text.encode())

