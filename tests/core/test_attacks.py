"""Messages that somebody made who knows all keys but the sender's: none passes for the sender's, or costs much work."""

from __future__ import annotations

import base64
import json
import tracemalloc
from typing import Any

import pytest

from lab.envelope import (
    ALICE,
    BOB,
    CAROL,
    MALLORY,
    NOW_MS,
    Envelope,
    keys_of,
    loose_parts,
    message,
    open_as,
    parts_of,
    person,
    recipient,
    refused,
    seal_for,
    unseal_as,
    wrap,
)
from malote.core import blob, payload
from malote.core.keys import SignatureAlgorithm
from malote.core.manifest import belongs_to
from malote.core.open import MAX_PAYLOADS, MAX_TRIALS, authenticate, unseal
from malote.core.parts import FoundKeyBlob, FoundParts, FoundPayload
from malote.errors import SenderRefused, Unreadable


def test_blob_transplant_is_refused() -> None:
    """A blob of message 2 does not open message 1, also when its envelope id is rewritten."""
    one, two = Envelope(message()).add(BOB), Envelope(message()).add(BOB)
    assert refused(wrap(two.parts, one.payload())).startswith("no match")
    forged = one.header.eid + blob.parse_key_blob(two.parts[0][1]).blob
    moved = two.parts[0][1][:11] + forged
    assert refused(wrap([("", moved)], one.payload())).startswith("no match")


def test_surreptitious_forwarding_is_not_for_me() -> None:
    """Bob knows the session key of Alice's message and wraps it for Carol: she sees that it was not sent to her."""
    original = Envelope(message()).add(BOB)
    sealed = original.payload()
    forwarded = Envelope(b"", cek=original.cek)
    forwarded.header = original.header
    forwarded.add(CAROL)
    opened = open_as(wrap(forwarded.parts, sealed), CAROL)
    assert (opened.signature, opened.addressed) == ("valid", False)


def test_re_encryption_is_not_signed() -> None:
    """The signed content under another session key has another header, which the signature does not cover."""
    original = Envelope(message()).add(BOB)
    container = original.container()
    again = Envelope(b"").add(CAROL)
    opened = open_as(again.raw(again.encrypt(container)), CAROL)
    assert (opened.signature, opened.addressed) == ("bad", False)


def test_forged_serial_by_a_co_recipient_is_not_for_me() -> None:
    envelope = Envelope(message()).add(BOB).add(CAROL)
    sealed = envelope.payload()
    forger = Envelope(b"", cek=envelope.cek)
    forger.header = envelope.header
    forger.add(CAROL, serial=999, prev=0)
    assert not open_as(wrap(forger.parts, sealed), CAROL).addressed
    both = open_as(wrap(forger.parts + envelope.parts, sealed), CAROL)
    assert (both.addressed, both.unsealed.serial) == (True, 7), "a forged blob in front must not hide the genuine one"


def test_a_forged_blob_on_the_genuine_bytes_is_remembered_apart() -> None:
    """Carol shares the session key: her blob for Bob on the genuine sealed part must not make the genuine message a repeat."""
    genuine = Envelope(message()).add(BOB).add(CAROL)
    sealed = genuine.payload()
    forged = blob.wrap_session_key(blob.BlobContent(genuine.cek, b"mallory!", 9, 0), BOB.decryption[0].public, genuine.header.raw)
    hers = wrap([("", blob.serialize_key_blob(genuine.header.eid, forged)), genuine.parts[1]], sealed)
    his = open_as(genuine.raw(sealed), BOB).claim("bob@b.example")
    claim = open_as(hers, BOB).claim("bob@b.example")
    assert (his.proven, claim.proven, claim.signature) == (True, False, "valid")
    assert claim.payload_digest == his.payload_digest
    assert claim.payload_key != his.payload_key == his.payload_digest


def test_a_listed_blob_of_another_session_key_does_not_stand_in() -> None:
    """The blob that opens is not listed, and the listed one holds another session key: not addressed, with neither's number."""
    genuine = Envelope(message()).add(BOB, serial=8, cek=bytes(32))
    forger = Envelope(b"", cek=genuine.cek)
    forger.header = genuine.header
    forger.add(BOB, serial=9)
    opened = open_as(wrap(forger.parts + genuine.parts, genuine.payload()), BOB)
    assert (opened.addressed, opened.unsealed.serial) == (False, 9)


def test_session_key_equivocation_is_refused() -> None:
    """Two recipients cannot be given two keys for one payload: the header commits to one."""
    envelope = Envelope(message())
    envelope.add(BOB).add(CAROL, cek=bytes(32))
    assert open_as(envelope.raw(), BOB).addressed
    assert refused(envelope.raw(), CAROL) == "header failure: session key is not the committed one"


def test_signature_must_be_by_the_card_and_by_nothing_less() -> None:
    hybrid = person("alice", SignatureAlgorithm.HYBRID)
    signed = Envelope(message(), hybrid).add(BOB)
    assert open_as(signed.raw(), BOB, hybrid.card).signature == "valid"
    assert open_as(signed.raw(), BOB, ALICE.card).signature == "bad"
    manifest = json.dumps(signed.members).encode()
    signed.manifest = manifest
    whole = hybrid.signing.sign(payload.signature_input(signed.header, manifest))
    for partly in (whole[:64], whole[:64] + bytes(3309), bytes(64) + whole[64:], b"", whole + b"\0"):
        signed.signature = partly
        assert open_as(signed.raw(), BOB, hybrid.card).signature == "bad"


def test_signature_covers_header_and_manifest() -> None:
    envelope = Envelope(message()).add(BOB)
    envelope.signed_header = Envelope(message()).header
    assert open_as(envelope.raw(), BOB).signature == "bad"
    other = Envelope(message()).add(BOB)
    manifest = json.dumps(other.members).encode()
    other.signature = ALICE.signing.sign(payload.signature_input(other.header, manifest))
    other.members["sent"] += 1
    assert open_as(other.raw(), BOB).signature == "bad"


def test_the_key_that_signed_is_the_key_that_is_named() -> None:
    """Numbers are remembered under the named key: a good signature does not make up for another name."""
    envelope = Envelope(message()).add(BOB)
    envelope.members["skid"] = MALLORY.signing.public.id.hex()
    assert open_as(envelope.raw(), BOB).signature == "bad"


def test_unknown_revoked_and_expired_senders() -> None:
    unsealed = unseal_as(seal_for(message(), [recipient(BOB)]).raw, BOB)
    assert authenticate(unsealed, None).signature == "unknown-sender"
    assert authenticate(unsealed, MALLORY.card).signature == "bad"
    assert authenticate(unsealed, ALICE.card, revoked_at_ms=NOW_MS).signature == "revoked"
    assert authenticate(unsealed, ALICE.card, revoked_at_ms=NOW_MS + 1).signature == "valid"
    late = unseal_as(seal_for(message(), [recipient(BOB)], sent_at_ms=ALICE.card.expires_at_ms + 1).raw, BOB)
    assert authenticate(late, ALICE.card).signature == "revoked"


@pytest.mark.parametrize("changed", [
    message(sender="mallory@m.example"),
    message(sender='"alice@a.example" <mallory@m.example>'),
    message(sender="alice@a.example, mallory@m.example"),
    message(sender="alice@a.example\r\nFrom: mallory@m.example"),
    message(sender="alice@a.example\r\nfrom : mallory@m.example"),
    message(sender="alice@a.example\r\nX: y\rFrom: mallory@m.example"),
    message(sender="mallory@m.example (alice@a.example)"),
    message(sender="alice@a.example\0"),
    message(sender="undisclosed: ;"),
    message(sender="=?utf-8?q?alice=40a.example?="),
    message().replace(b"From:", b"X-From:"),
])
def test_from_that_is_not_the_signer_is_never_alices(changed: bytes) -> None:
    opened = open_as(seal_for(changed, [recipient(BOB)]).raw, BOB)
    assert (opened.signature, opened.from_matches, opened.addressed) == ("valid", False, False)


@pytest.mark.parametrize("spelling", ["Alice <ALICE@A.Example>", "alice@a.example", '"Mallory <m@m.example>" <alice@a.example>'])
def test_from_is_compared_as_an_address(spelling: str) -> None:
    assert open_as(seal_for(message(sender=spelling), [recipient(BOB)]).raw, BOB).addressed


def test_gateway_speaks_for_its_domain_only() -> None:
    gateway = person("@a.example")
    opened = open_as(seal_for(message(), [recipient(BOB)], gateway).raw, BOB, gateway.card)
    assert (opened.signature, opened.addressed, opened.manifest.scope) == ("valid", True, "gateway")
    assert opened.manifest.sender == "alice@a.example"
    assert open_as(seal_for(message(), [recipient(BOB)], gateway).raw, BOB, ALICE.card).signature == "bad"
    with pytest.raises(SenderRefused):
        seal_for(message(sender="eve@other.example"), [recipient(BOB)], gateway)
    claims = Envelope(message(sender="eve@other.example"), gateway).add(BOB)
    claims.members |= {"from": "eve@other.example", "scope": "gateway"}
    assert open_as(claims.raw(), BOB, gateway.card).signature == "bad"
    personal = Envelope(message()).add(BOB)
    personal.members["scope"] = "gateway"
    assert open_as(personal.raw(), BOB).signature == "bad"


@pytest.mark.parametrize(("address", "card", "belongs"), [
    ("a@x.example", "a@x.example", True), ("b@x.example", "a@x.example", False), ("a@x.example", "@x.example", True),
    ("a@s.x.example", "@x.example", True), ("a@notx.example", "@x.example", False), ("a@example", "@x.example", False),
])
def test_whom_a_card_speaks_for(address: str, card: str, belongs: bool) -> None:
    assert belongs_to(address, card) is belongs


def test_gateway_key_opens_for_a_person_of_its_domain() -> None:
    gateway = person("@b.example")
    opened = open_as(seal_for(message(), [recipient(gateway, address="bob@b.example")]).raw, gateway)
    assert (opened.addressed, opened.unsealed.recipient) == (True, "bob@b.example")
    stranger = open_as(seal_for(message(), [recipient(gateway, address="bob@z.example")]).raw, gateway)
    assert not stranger.addressed


def test_one_key_under_two_addresses() -> None:
    found = parts_of(seal_for(message(), [recipient(BOB)]).raw)
    key = BOB.decryption[0]
    for addresses in (("alias@b.example", BOB.address), (BOB.address, "alias@b.example")):
        unsealed = unseal(found, [(address, key) for address in addresses])
        assert (unsealed.recipient, authenticate(unsealed, ALICE.card).addressed) == (BOB.address, True)
    assert not authenticate(unseal(found, [("alias@b.example", key)]), ALICE.card).addressed


# --- work

def test_trials_are_counted_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage blobs cost a bounded number of unwraps (also against partitioning oracles), then the message is unreadable."""
    calls = 0
    genuine = blob.unwrap_session_key

    def counted(*arguments: Any) -> blob.BlobContent:
        nonlocal calls
        calls += 1
        return genuine(*arguments)

    monkeypatch.setattr("malote.core.open.unwrap_session_key", counted)
    envelope = Envelope(message()).add(BOB)
    sealed = envelope.payload()
    eid = envelope.header.eid
    garbage = [
        FoundKeyBlob(blob.serialize_key_blob(eid, b"\1\4\xa8" + bytes([n]) * 1192), "", False) for n in range(150)
    ]
    keys = keys_of(CAROL, MALLORY, person("dave"), BOB)
    found = FoundParts(tuple(garbage), (FoundPayload(sealed, False),) * 8, 0, ())
    with pytest.raises(Unreadable) as caught:
        unseal(found, keys)
    assert calls == MAX_TRIALS
    assert caught.value.reason.startswith("over limit")
    calls = 0
    ours = FoundKeyBlob(envelope.parts[0][1], envelope.parts[0][0], False)
    hinted = FoundParts((*garbage, ours), (FoundPayload(sealed, False),), 0, ())
    assert authenticate(unseal(hinted, keys), ALICE.card).addressed
    assert calls == 1, "the hint finds our blob at once"
    wrong = loose_parts(sealed, envelope.parts[0][1], kid="00" * 8)
    assert authenticate(unseal(wrong, keys), ALICE.card).addressed, "a wrong hint only costs trials"


@pytest.mark.parametrize("length", [0, 1, 1191, 1193, 4000])
def test_blobs_of_another_size_are_never_tried(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partitioning oracle: only blobs of exactly the one size reach a private key."""
    monkeypatch.setattr("malote.core.keys.DecryptionKey.unwrap", lambda *_: pytest.fail("tried"))
    envelope = Envelope(message()).add(BOB)
    raw = blob.serialize_key_blob(envelope.header.eid, b"\1" + length.to_bytes(2, "big") + bytes(length))
    with pytest.raises(Unreadable):
        unseal(loose_parts(envelope.payload(), raw), keys_of(BOB))


def test_a_damaged_or_newer_blob_does_not_hide_ours() -> None:
    envelope = Envelope(message()).add(BOB)
    sealed = envelope.payload()
    newer = blob.serialize_key_blob(envelope.header.eid, b"\2\0\4abcd")
    raw = wrap([("", newer), ("", b"\x89MLK\r\n\x1a\nshort"), *envelope.parts], sealed)
    assert open_as(raw, BOB).addressed


def test_several_sealed_parts_the_first_that_opens_counts() -> None:
    mine, other = Envelope(message("mine")).add(BOB), Envelope(message("other")).add(CAROL)
    found, foreign = parts_of(mine.raw()), parts_of(other.raw())
    both = FoundParts(foreign.blobs + found.blobs, foreign.payloads + found.payloads, 0, ())
    assert authenticate(unseal(both, keys_of(BOB)), ALICE.card).original == message("mine")


def test_sealed_parts_tried_are_bounded() -> None:
    """The eighth is looked at, the ninth is not, whoever could open it."""
    mine = parts_of(Envelope(message()).add(BOB).raw())
    other = parts_of(Envelope(message("other")).add(CAROL).raw())
    for before in (MAX_PAYLOADS - 1, MAX_PAYLOADS):
        found = FoundParts(mine.blobs, other.payloads * before + mine.payloads, 0, ())
        if before < MAX_PAYLOADS:
            assert authenticate(unseal(found, keys_of(BOB)), ALICE.card).addressed
        else:
            with pytest.raises(Unreadable):
                unseal(found, keys_of(BOB))


def test_memory_for_a_large_message() -> None:
    """Sealing and opening hold a few copies, not many: 25 MB mail on small machines."""
    folding = message("").replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: base64\r\n\r\n")
    original = folding + base64.encodebytes(bytes(range(256)) * 24_000).replace(b"\n", b"\r\n")
    for fold in (True, False):
        tracemalloc.start()
        raw = seal_for(original, [recipient(BOB)], fold=fold).raw
        sealing = tracemalloc.get_traced_memory()[1] + len(original)
        tracemalloc.stop()
        tracemalloc.start()
        assert open_as(raw, BOB).original == original
        opening = tracemalloc.get_traced_memory()[1] + len(raw)
        tracemalloc.stop()
        assert sealing <= 4 * len(original)
        assert opening <= 4 * len(raw)
