"""One message for several people of a domain, sealed for their gateway: each has a number of his own."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import pytest

from malote.core.identity import Identity, new_identity
from malote.core.keys import SignatureAlgorithm
from malote.core.open import Opened, authenticate, unseal
from malote.core.outer import outer_headers
from malote.core.parts import find_parts
from malote.core.seal import SealRecipient, seal

NOW_MS = time.time_ns() // 1_000_000
ORIGINAL = (b"From: anna@sender.example\r\nTo: a@test.example, b@test.example\r\nSubject: s\r\n"
            b"Date: Mon, 23 Nov 2026 10:00:00 +0000\r\nMessage-ID: <1@sender.example>\r\n\r\ntext\r\n")
STREAMS = {name: os.urandom(8) for name in ("a@test.example", "b@test.example")}


def identity(address: str) -> Identity:
    return new_identity(address, SignatureAlgorithm.ED25519, NOW_MS - 3_600_000)


ANNA, GATEWAY = identity("anna@sender.example"), identity("@test.example")


def sealed(addresses: Sequence[str], *, name_recipients: bool = True) -> bytes:
    recipients = [SealRecipient(address, GATEWAY.decryption[0].public, "to", STREAMS[address], number, 0)
                  for number, address in enumerate(addresses, 5)]
    outer = outer_headers(ORIGINAL, sent_at_ms=NOW_MS, sender_domain="sender.example", received=b"", known_outer_ids={})
    return seal(ORIGINAL, identity=ANNA, recipients=recipients, submission_id=os.urandom(16), sent_at_ms=NOW_MS, outer=outer,
                name_recipients=name_recipients).raw


def opened(raw: bytes, reader: str) -> Opened:
    found = find_parts(raw)
    assert found is not None
    return authenticate(unseal(found, [(reader, key) for key in GATEWAY.decryption]), ANNA.card)


@pytest.mark.parametrize(("reader", "serial"), [("a@test.example", 5), ("b@test.example", 6)])
def test_each_recipient_of_a_gateway_gets_the_number_that_is_his(reader: str, serial: int) -> None:
    message = opened(sealed(list(STREAMS)), reader)
    claim = message.claim(reader)
    assert message.addressed
    assert (claim.stream, claim.serial) == (STREAMS[reader], serial)
    assert message.unsealed.recipient == reader


def test_a_message_brought_to_somebody_else_of_the_domain_is_not_addressed_to_him() -> None:
    message = opened(sealed(list(STREAMS)), "c@test.example")
    assert message.signature == "valid"
    assert not message.addressed


def test_the_gateway_itself_may_read_what_is_for_any_of_its_domain() -> None:
    assert opened(sealed(list(STREAMS)), "@test.example").addressed
