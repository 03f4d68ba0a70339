"""Who may be signed for. Pure.

A message is signed only for its one From mailbox, and only if that belongs to the login that hands it in: the one the upstream
server accepted (pass-through), a local one, or the user at the other end of a UNIX socket. Being on the same machine is no
authentication. The exception is a listener with `auth = "none"` in front of an upstream server that asks for no login either:
there the administrator vouches for whoever can connect (a smart host behind an MTA that has authenticated its users itself).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from malote.core.address import canonical_address, domain_of
from malote.core.identity import Identity
from malote.errors import FormatError, Reply, SenderRefused

ANY = "*"       # in the place of an address: whatever stands in From


@dataclass(frozen=True, slots=True)
class Submitter:
    """Who hands a message in. `addresses` may hold `@domain` and ANY; `login` "" is nobody."""

    login: str = ""
    addresses: frozenset[str] = frozenset()
    anyone: bool = False        # may have any identity sign
    bound: bool = False         # sends from its own addresses only, sealed or not

    def owns(self, address: str) -> bool:
        return (self.anyone or address in self.addresses or f"@{domain_of(address)}" in self.addresses
                or ANY in self.addresses)


def decide_signer(identities: Mapping[str, Identity], submitter: Submitter, from_address: str | None) -> Identity | None:
    """The identity that signs; None if there is none for this From address (or there is not exactly one From mailbox).

    Raises `SenderRefused` when there is an identity, but this login may not use it. An identity of the whole domain
    (`@domain`) signs where the address has none of its own.
    """
    if from_address is None:
        return None
    identity = identities.get(from_address) or identities.get(f"@{domain_of(from_address)}")
    if identity is not None and not submitter.owns(from_address):
        raise SenderRefused
    return identity


def check_own(submitter: Submitter, address: str) -> None:
    """For a login that is bound: of MAIL FROM and of From. The null sender is anybody's. Raises `SenderRefused`."""
    if submitter.bound and address and not submitter.owns(address):
        who = f"login {submitter.login}" if submitter.login.isprintable() else "login"
        raise SenderRefused(reply=Reply(550, "5.7.1", f"Your {who} may not send from {address}, nothing was sent"))


def login_addresses(login: str) -> frozenset[str]:
    """The address that a login at a mail provider is, if it is one."""
    try:
        return frozenset({canonical_address(login)})
    except FormatError:
        return frozenset()
