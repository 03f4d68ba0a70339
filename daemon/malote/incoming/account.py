"""What a watcher knows of its account: the keys that open its mail, and the secrets that make our headers ours.

The secrets are derived from the decryption keys, so that every device that can open the mail of an account also recognises
what another device opened, without talking to it. Nobody else can: the seeds never leave the devices.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from malote.config import AccountConfig
from malote.core.address import canonical_address, domain_of, is_gateway
from malote.core.card import Card
from malote.core.gateway_word import GatewayKey
from malote.core.identity import Identity
from malote.core.keys import DecryptionKey
from malote.core.message import header_fields
from malote.core.primitives import hmac_sha256, sha256
from malote.errors import FormatError

_MARK = re.compile(r"([0-9a-f]{32})-([0-9a-f]{16})")


@dataclass(frozen=True, slots=True)
class Mark:
    """`Malote-Mark`: which message a copy was opened from, and which device put it there.

    The first half is the same on every device of the account and cannot be computed by anybody else.
    """

    message: str        # 32 hex digits
    device: str         # 16 hex digits

    def __str__(self) -> str:
        return f"{self.message}-{self.device}"

    @classmethod
    def parse(cls, text: str) -> Mark | None:
        match = _MARK.fullmatch(text.strip())
        return cls(match[1], match[2]) if match else None


@dataclass(frozen=True, slots=True)
class AccountKeys:
    """The keys of an account, newest first, and what is derived from them.

    Headers and marks are made with what the oldest key of the first address gives: a device that does not have the newest
    key yet recognises them too.
    """

    addresses: tuple[str, ...]
    pairs: tuple[tuple[str, DecryptionKey], ...]    # what `unseal` tries, in this order
    mac_keys: tuple[bytes, ...]                     # the first makes our headers, all of them check
    authserv_ids: tuple[str, ...]                   # likewise
    cards: Mapping[str, Card]                       # our own, by address
    gateway_kids: frozenset[bytes]                  # ids of those keys that are not the person's but the domain's
    generation: str                                 # changes with the set of keys: then unreadable mail is tried again
    trusted: tuple[GatewayKey, ...] = ()            # of gateways whose word is taken for what they opened

    @property
    def mac_key(self) -> bytes:
        return self.mac_keys[0]

    @property
    def authserv_id(self) -> str:
        return self.authserv_ids[0]

    def mark(self, payload_digest: bytes, device: str) -> Mark:
        return Mark(hmac_sha256(self.mac_key, b"MLT1 mark\0" + payload_digest)[:16].hex(), device)


def account_keys(identities: Iterable[Identity], addresses: Sequence[str]) -> AccountKeys:
    """The keys of those `identities` that belong to one of `addresses` (their `@domain` gateway included)."""
    wanted = list(addresses)
    wanted += [gateway for gateway in dict.fromkeys("@" + domain_of(address) for address in addresses) if gateway not in wanted]
    by_address = {identity.address: identity for identity in identities}
    held = [by_address[address] for address in wanted if address in by_address]
    keys = [(identity.address, key) for identity in held for key in identity.decryption]
    oldest_first = [key for identity in held for key in reversed(identity.decryption)]
    return AccountKeys(
        addresses=tuple(addresses),
        pairs=tuple(keys),
        mac_keys=tuple(hmac_sha256(key.seed, b"MLT1 account mac\0") for key in oldest_first),
        authserv_ids=tuple("malote-" + hmac_sha256(key.seed, b"MLT1 authserv-id\0")[:16].hex() for key in oldest_first),
        cards={identity.address: identity.card for identity in held},
        gateway_kids=frozenset(key.public.id for address, key in keys if is_gateway(address)),
        generation=sha256(b"".join(sorted(key.public.id for _, key in keys))).hex()[:16],
    )


def device_name(local_key: bytes, worker: int = 0) -> str:
    """The name of this device in marks: from a key of its store, and from its host, in case the store was copied.

    Each worker is a device of its own: when one takes over from another it must not take the other's marks for its own.
    """
    return hmac_sha256(local_key, socket.gethostname().encode() + (b"\0%d" % worker if worker else b""))[:8].hex()


def account_addresses(account: AccountConfig) -> tuple[str, ...]:
    """Whose keys open mail here, canonical: as configured, else the user name where it is an address."""
    if account.addresses:
        return tuple(canonical_address(address) for address in account.addresses)
    try:
        return (canonical_address(account.username),)
    except FormatError:
        return ()


def mark_of(raw: bytes) -> Mark | None:
    """The mark that a copy, or its header, bears, forged or not."""
    try:
        fields = header_fields(raw)
    except FormatError:
        return None
    return next((Mark.parse(field.raw_value.decode("ascii", "replace")) for field in fields if field.name == "malote-mark"), None)
