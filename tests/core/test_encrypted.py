"""Encrypted already: a yes lets a message leave without our seal, so nothing readable may hide behind one."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Callable
from functools import lru_cache

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import pkcs7
from hypothesis import given
from hypothesis import strategies as st

from lab.envelope import message, person, recipient, seal_for
from malote.core.encrypted import decide_encrypted

HEAD = b"From: alice@a.example\r\nTo: bob@b.example\r\nSubject: hello\r\nMIME-Version: 1.0\r\n"
ARMOR = (
    b"-----BEGIN PGP MESSAGE-----\r\n\r\n"
    + base64.b64encode(b"\xc1\xc0\x4e" + bytes(range(90))) + b"\r\n=aBcD\r\n-----END PGP MESSAGE-----\r\n"
)


ROOT = b'multipart/encrypted; protocol="application/pgp-encrypted";\r\n boundary="b1"'
CONTROL = b"Content-Type: application/pgp-encrypted\r\n\r\nVersion: 1\r\n"
DATA = b'Content-Type: application/octet-stream; name="encrypted.asc"\r\nContent-Disposition: inline\r\n\r\n' + ARMOR


def pgp(*, content_type: bytes = ROOT, before: bytes = b"", control: bytes = CONTROL, data: bytes = DATA, extra: bytes = b"",
        after: bytes = b"", close: bytes = b"\r\n--b1--\r\n") -> bytes:
    return b"".join([
        HEAD, b"Content-Type: ", content_type, b"\r\n\r\n", before, b"--b1\r\n", control, b"\r\n--b1\r\n", data, extra, close,
        after,
    ])


@lru_cache
def cms(*, encrypted: bool = True) -> bytes:
    """A CMS object as S/MIME programs write it, DER."""
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "bob")])
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now).not_valid_after(now + datetime.timedelta(days=3650)).sign(key, hashes.SHA256())
    )
    if encrypted:
        return pkcs7.PKCS7EnvelopeBuilder().set_data(b"secret").add_recipient(certificate).encrypt(serialization.Encoding.DER, [])
    builder = pkcs7.PKCS7SignatureBuilder().set_data(b"readable").add_signer(certificate, key, hashes.SHA256())
    return builder.sign(serialization.Encoding.DER, [])


def smime(data: bytes, *, encoding: bytes = b"base64", after: bytes = b"", media: bytes = b"application/pkcs7-mime") -> bytes:
    body = base64.encodebytes(data).replace(b"\n", b"\r\n") if encoding == b"base64" else data
    return b"".join([
        HEAD, b"Content-Type: ", media, b'; smime-type=enveloped-data; name="smime.p7m"\r\nContent-Transfer-Encoding: ', encoding,
        b"\r\n\r\n", body, after,
    ])


@lru_cache
def sealed() -> bytes:
    return seal_for(message(), [recipient(person("bob")), recipient(person("carol"), "cc")]).raw


@pytest.mark.parametrize("raw", [
    pgp(),
    pgp().replace(b"\r\n", b"\n"),
    # what Thunderbird writes, always the same
    pgp(before=b"This is an OpenPGP/MIME encrypted message (RFC 4880 and 3156)\r\n"),
    pgp(close=b"\r\n--b1--"),
    pgp(after=b"\r\n \r\n"),
    pgp(control=b"Content-Type: application/pgp-encrypted; name=version.asc\r\nContent-Description: PGP\r\n\r\n"
        b"Version: 1\r\n\r\n"),
    pgp(data=b"Content-Type: application/octet-stream\r\nContent-Transfer-Encoding: base64\r\n\r\n" + base64.encodebytes(ARMOR)),
    pgp(data=b"Content-Type: application/octet-stream\r\nContent-Transfer-Encoding: base64\r\n\r\n"
        + base64.encodebytes(b"\x85\x02\x0c" + bytes(99))),     # binary, old packet format
    pgp(content_type=b'Multipart/Encrypted; BOUNDARY=b1; Protocol="application/PGP-encrypted"'),
])
def test_openpgp(raw: bytes) -> None:
    assert decide_encrypted(raw) == "openpgp"


@pytest.mark.parametrize("raw", [
    pgp(before=b"Readable text\r\n"),
    pgp(after=b"Readable text\r\n"),
    pgp(extra=b"\r\n--b1\r\nContent-Type: text/plain\r\n\r\nReadable\r\n"),
    pgp(close=b""),
    pgp(content_type=b'multipart/encrypted; protocol="application/x-other"; boundary="b1"'),
    pgp(content_type=b'multipart/encrypted; boundary="b1"'),
    pgp(content_type=b'multipart/encrypted; protocol="application/pgp-encrypted"; boundary="b1"; boundary="b2"'),
    pgp(content_type=b'multipart/encrypted (comment); protocol="application/pgp-encrypted"; boundary="b1"'),
    pgp(content_type=b'multipart/mixed; x="multipart/encrypted"; protocol="application/pgp-encrypted"; boundary="b1"'),
    pgp(content_type=b'multipart/encrypted; protocol="application/pgp-encrypted"; boundary="b1"\r\nContent-Type: text/plain'),
    pgp(control=b"Content-Type: application/pgp-encrypted\r\n\r\nVersion: 1\r\nReadable\r\n"),
    pgp(control=b"Content-Type: text/plain\r\n\r\nVersion: 1\r\n"),
    pgp(data=b"Content-Type: application/octet-stream\r\n\r\nReadable\r\n" + ARMOR),
    pgp(data=b"Content-Type: application/octet-stream\r\n\r\n" + ARMOR + b"Readable\r\n"),
    pgp(data=b"Content-Type: application/octet-stream\r\n\r\n" + ARMOR.replace(b"\r\n\r\n", b"\r\nComment: Readable\r\n\r\n")),
    pgp(data=b"Content-Type: application/octet-stream\r\n\r\n" + ARMOR.replace(b"=aBcD", b"Readable text here")),
    pgp(data=b"Content-Type: application/octet-stream\r\n\r\nReadable\r\n"),
    # an OpenPGP message that is only signed, or literal: armoured in the same way, readable for everybody
    pgp(data=b"Content-Type: application/octet-stream\r\n\r\n" + ARMOR.replace(b"wcBO", b"kA0D")),
    pgp(data=b"Content-Type: application/octet-stream\r\n\r\n" + ARMOR.replace(b"wcBO", b"yxRi")),
    pgp(data=b"Content-Type: text/plain\r\n\r\n" + ARMOR),
    pgp(data=b"Content-Type: application/octet-stream\r\nContent-Transfer-Encoding: x-other\r\n\r\n" + ARMOR),
    # inline PGP is a text/plain with anything around it
    HEAD + b"Content-Type: text/plain\r\n\r\n" + ARMOR,
    # not at the root
    HEAD + b'Content-Type: multipart/mixed; boundary="o"\r\n\r\n--o\r\n' + pgp()[len(HEAD):] + b"\r\n--o--\r\n",
    HEAD + b"\r\n" + pgp(),
])
def test_not_quite_openpgp(raw: bytes) -> None:
    """Anything before, after or between, another number of parts, another protocol, an armour around readable data."""
    assert decide_encrypted(raw) == "no"


def test_smime() -> None:
    """EnvelopedData as real programs write it, and AuthEnvelopedData by its OID; base64 or binary; DER or streamed BER."""
    data = cms()
    assert decide_encrypted(smime(data)) == "smime"
    assert decide_encrypted(smime(data).replace(b"\r\n", b"\n")) == "smime"
    assert decide_encrypted(smime(data, media=b"application/x-pkcs7-mime")) == "smime"
    assert decide_encrypted(smime(data, encoding=b"binary")) == "smime"
    auth = bytes.fromhex("060b2a864886f70d0109100117") + b"\xa0\x02\x30\x00"
    assert decide_encrypted(smime(b"\x30" + bytes([len(auth)]) + auth)) == "smime"
    assert decide_encrypted(smime(b"\x30\x80" + auth + b"\0\0")) == "smime"


def test_not_quite_smime() -> None:
    """Signed data is readable whatever smime-type says; so is what follows the object."""
    data = cms()
    assert decide_encrypted(smime(cms(encrypted=False))) == "no"
    for after in (b"Readable footer\r\n", b"\r\n-- \r\nlist\r\n", b"AAAA\r\n", b"Zm9v\r\n"):
        assert decide_encrypted(smime(data, after=after)) == "no"
        assert decide_encrypted(smime(data, encoding=b"binary", after=after)) == "no"
    assert decide_encrypted(smime(data[:-1])) == "no"
    assert decide_encrypted(smime(data + b"x")) == "no"
    assert decide_encrypted(smime(b"")) == "no"
    assert decide_encrypted(smime(b"\x30")) == "no"
    assert decide_encrypted(smime(b"\x30\x88" + b"\xff" * 8)) == "no"
    assert decide_encrypted(smime(b"\x30\x80" + data[4:])) == "no"
    assert decide_encrypted(smime(data, encoding=b"7bit")) == "no"
    assert decide_encrypted(smime(data, media=b"application/pkcs7-signature")) == "no"


def test_ours() -> None:
    """What we seal is passed on as it is, also with the trace of the servers between."""
    assert decide_encrypted(sealed()) == "malote"
    assert decide_encrypted(b"Received: from a by b;\r\n today\r\n" + sealed()) == "malote"
    assert decide_encrypted(bytearray(sealed())) == "malote"
    thread = b"In-Reply-To: <b@a.example>\r\nReferences: <a@a.example>\r\n <b@a.example>\r\nAuto-Submitted: auto-replied\r\n"
    assert decide_encrypted(thread + sealed()) == "malote"
    assert decide_encrypted(seal_for(message(), [recipient(person("bob"), "bcc")], show_key_ids=False).raw) == "malote"


@pytest.mark.parametrize("change", [
    lambda raw: raw.replace(b"Subject: [...]", b"Subject: Readable"),
    lambda raw: raw.replace(b"Subject: [...]", b"Subject: [...]\r\nSubject: Readable"),
    lambda raw: raw.replace(b"Subject: [...]\r\n", b""),
    lambda raw: raw.replace(b"From: alice@a.example", b"From: Readable <alice@a.example>"),
    lambda raw: raw.replace(b"To: bob@b.example", b"To: bob@b.example (readable)"),
    lambda raw: b"X-Readable: text\r\n" + raw,
    # in the value of a field that may be there
    lambda raw: raw.replace(b"MIME-Version: 1.0", b"MIME-Version: 1.0 (readable)"),
    lambda raw: raw.replace(b"MIME-Version: 1.0", b"MIME-Version: 1.0\r\n readable"),
    lambda raw: raw.replace(b"Malote: 1", b"Malote: readable"),
    lambda raw: raw.replace(b"Malote: 1", b"Malote: 1\r\nMalote: 1"),
    lambda raw: raw.replace(b"Date: Mon", b"Date: Readable"),
    lambda raw: raw.replace(b"Message-ID: <", b"Message-ID: readable <"),
    lambda raw: b"In-Reply-To: readable words\r\n" + raw,
    lambda raw: b"References: <one@a.example> readable <two@a.example>\r\n" + raw,
    lambda raw: b"Auto-Submitted: auto-replied; note=readable\r\n" + raw,
    lambda raw: b"Bcc: x@y.example\r\n" + raw,
    lambda raw: raw.replace(b"This message is sealed.", b"This message is read  "),
    lambda raw: raw.replace(b"\r\n\r\n--=_mlt_", b"\r\n\r\nReadable\r\n--=_mlt_", 1),
    lambda raw: raw + b"Readable\r\n",
    lambda raw: raw + b"\r\n",
    lambda raw: raw[:-2],
    lambda raw: raw.replace(b"message.mlp", b"readable.txt"),
    lambda raw: raw.replace(b"key-1.mlk", b"key-2.mlk"),
    lambda raw: raw.replace(b"Content-Type: application/vnd.malote.sealed", b"Content-Description: Readable\r\nContent-Type: "
                            b"application/vnd.malote.sealed"),
    lambda raw: raw.replace(b"\r\n", b"\n"),
    lambda raw: _extra_part(raw, b"Content-Type: text/plain\r\n\r\nReadable\r\n"),
    lambda raw: _without_part(raw, 1),
    lambda raw: _without_part(raw, 3),
    lambda raw: _without_part(_without_part(raw, 2), 1),
    lambda raw: HEAD + b'Content-Type: multipart/mixed; boundary="o"\r\n\r\n--o\r\n' + raw + b"\r\n--o--\r\n",
    lambda raw: HEAD + b"Content-Type: message/rfc822\r\n\r\n" + raw,
    lambda raw: HEAD + b'Content-Type: multipart/mixed; boundary="=_mlt_AAAAAAAAAAAAAAAAAAAAAA"\r\n\r\nReadable\r\n',
])
def test_not_quite_ours(change: Callable[[bytes], bytes]) -> None:
    """Exactly as we write it and nothing else in the tree, or it is sealed like any other mail."""
    assert change(sealed()) != sealed()
    assert decide_encrypted(change(sealed())) == "no"


def _boundary(raw: bytes) -> bytes:
    start = raw.index(b'boundary="') + 10
    return b"--" + raw[start:raw.index(b'"', start)]


def _extra_part(raw: bytes, part: bytes) -> bytes:
    return raw.replace(_boundary(raw) + b"--", _boundary(raw) + b"\r\n" + part + b"\r\n" + _boundary(raw) + b"--")


def _without_part(raw: bytes, number: int) -> bytes:
    pieces = raw.split(_boundary(raw) + b"\r\n")
    del pieces[number + 1]
    return (_boundary(raw) + b"\r\n").join(pieces)


def test_parts_of_another_message_are_not_ours() -> None:
    """A key blob that belongs to another payload: nobody could open it, so it is not what we write."""
    other = seal_for(message(), [recipient(person("bob")), recipient(person("carol"), "cc")]).raw
    mine, theirs = sealed().split(_boundary(sealed()) + b"\r\n"), other.split(_boundary(other) + b"\r\n")
    mine[2] = theirs[2]
    assert decide_encrypted((_boundary(sealed()) + b"\r\n").join(mine)) == "no"


@given(st.integers(0, 10**9), st.binary(min_size=1, max_size=30))
def test_nothing_can_be_put_in(place: int, text: bytes) -> None:
    """Readable bytes at any place of a sealed message, from its MIME fields on: it does not count as encrypted any more."""
    raw = sealed()
    at = raw.index(b"MIME-Version") + place % (len(raw) - raw.index(b"MIME-Version"))
    changed = raw[:at] + b"\r\nReadable " + text + raw[at:]
    assert decide_encrypted(changed) == "no"


@given(st.binary(max_size=400) | st.binary(max_size=200).map(lambda tail: pgp()[:300] + tail))
def test_any_bytes_have_an_answer(raw: bytes) -> None:
    assert decide_encrypted(raw) in ("no", "openpgp")


@pytest.mark.parametrize("body", [b"--b1\r\n" * 100_000, b"\n--b1x" * 100_000, b"-----BEGIN PGP MESSAGE-----\r\n" * 50_000])
def test_hostile_bodies_take_linear_time(body: bytes) -> None:
    """Quadratic time would run into the test's timeout."""
    assert decide_encrypted(pgp(before=body)) == "no"
    assert decide_encrypted(pgp(data=b"Content-Type: application/octet-stream\r\n\r\n" + body)) == "no"
