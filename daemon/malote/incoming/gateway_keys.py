"""The keys that open mail for a recipient at a gateway: his own, and those of the gateway of his domain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from malote.core.address import domain_of
from malote.core.identity import Identity
from malote.incoming.account import AccountKeys, account_keys

MAX_CACHED = 10_000     # recipients; one costs about 1 KB


class GatewayKeys:
    """`identities`: the unlocked ones by address; another mapping once any of them has changed."""

    def __init__(self, identities: Callable[[], Mapping[str, Identity]]) -> None:
        self._identities = identities
        self._seen: Mapping[str, Identity] | None = None
        self._cache: dict[str, AccountKeys | None] = {}

    def of(self, address: str) -> AccountKeys | None:
        """For a canonical address; None: nothing is opened for him here."""
        identities = self._identities()
        if identities is not self._seen or len(self._cache) >= MAX_CACHED:
            self._seen, self._cache = identities, {}
        if address not in self._cache:
            self._cache[address] = recipient_keys(identities, address)
        return self._cache[address]


def recipient_keys(identities: Mapping[str, Identity], address: str) -> AccountKeys | None:
    """The gateway's keys stand for this recipient alone: a blob that it has for somebody else of the domain is not his, and what
    was sealed for that one and is brought to him was passed on by somebody (NOT-FOR-ME)."""
    held = [identities[name] for name in (address, f"@{domain_of(address)}") if name in identities]
    if not held:
        return None
    keys = account_keys(held, (address,))
    return replace(keys, pairs=tuple((address, key) for _, key in keys.pairs))
