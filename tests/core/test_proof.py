"""The last check sees every byte that does not belong: what is not exactly the sealed message that was decided does not leave."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pybase64
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lab.envelope import BOB, CAROL, FRAME, NOW_MS, Envelope, recipient, seal_for
from malote.core import proof, proof_trace
from malote.core.encrypted import decide_encrypted
from malote.core.message import fold_field, format_date
from malote.core.outer import outer_headers
from malote.core.payload import container_bytes
from malote.core.proof import Facts, check_sealed
from malote.core.proof_plain import check_covered, check_notice
from malote.errors import FormatError, NotProven, Reply
from malote.outgoing.notice import Refused, make_notice

ROOT = Path(__file__).resolve().parents[2]
OURS = b"Received: by gateway.a.example (malote) with ESMTPSA;\r\n Mon, 21 Sep 2026 14:13:20 +0000\r\n"
THEIRS = (
    b"Received: from pc.a.example (pc.a.example [10.0.0.5]) (using TLSv1.3 with cipher X (256/256 bits))\r\n"
    b"\t(Authenticated sender: alice@a.example) by mx.a.example (Postfix)\r\n\twith ESMTPSA id 4F1 for <dora@d.example>;\r\n"
    b"\tMon, 21 Sep 2026 14:13:19 +0000 (UTC)\r\n"
)
THREAD = {"<parent@b.example>": "<00112233445566778899aabbccddeeff@b.example>"}
SHOWN = frozenset({"bob@b.example", "carol@c.example"})
ATTACHMENT = pybase64.encodebytes(b"\xff\xd8" + bytes(range(256)) * 80).replace(b"\n", b"\r\n")
ORIGINAL = (THEIRS + FRAME.encode() + b"In-Reply-To: <parent@b.example>\r\nAuto-Submitted: auto-generated\r\n"
            b"Content-Transfer-Encoding: base64\r\n\r\n" + ATTACHMENT)


def sealed(original: bytes = ORIGINAL, *, received: bytes = OURS, kids: bool = True, fold: bool = True) -> tuple[bytes, Facts]:
    """A message for Bob and Carol, and what was decided about it."""
    people = (BOB, CAROL)
    outer = outer_headers(original, sent_at_ms=NOW_MS, sender_domain="a.example", received=received, known_outer_ids=THREAD)
    made = seal_for(original, [recipient(each) for each in people], outer=outer, show_key_ids=kids, fold=fold)
    hints = tuple(each.decryption[0].public.id[:8].hex() if kids else "" for each in people)
    return made.raw, Facts(
        sender="alice@a.example", shown=SHOWN, sent_at_ms=NOW_MS, received=received, original=original,
        message_id="<one@a.example>", outer_ids=THREAD.values(), kids=hints, payload=made.payload, outer_id=outer.message_id)


@lru_cache
def one() -> tuple[bytes, Facts]:
    return sealed()


@lru_cache
def short() -> tuple[bytes, Facts]:
    """With everything in the header, and little else: for what is done at every byte."""
    return sealed(ORIGINAL[:ORIGINAL.index(ATTACHMENT)] + b"the secret\r\n")


def passes(raw: bytes, facts: Facts) -> bool:
    try:
        check_sealed(raw, facts)
    except NotProven:
        return False
    return True


# --- what we write passes

WORDS = [b"for", b" for ", b"For ", b"(", b")", b'"', b"\\", b" ", b"\t", b";", b" by ", b" id ", b"from", b"with ", b"@",
         b"<a@b>", b"a", b"\xe4", b"\r\n ", b"\r\n\t", b"x" * 40, b"y" * 1000, b"(a@b)", b"[1.2.3.4]", b"-", b".", b"_", b"/",
         b"via", b"\x01"]
NAMES = [b"Received:", b"received :", b"RECEIVED\t: ", b"Received-SPF:", b"X-Received: ", b"X:\r\n received: "]
TRACES = st.lists(st.tuples(
    st.sampled_from(NAMES), st.lists(st.sampled_from(WORDS), max_size=14), st.sampled_from([b"\r\n", b"\n"])), max_size=4)
ENDS = st.sampled_from([b"\r\nbody\r\nReceived: x\r\n", b"\nReceived: y", b""])


@given(TRACES, ENDS)
@settings(max_examples=600)
def test_both_take_the_same_out_of_received(traces: list[tuple[bytes, list[bytes], bytes]], end: bytes) -> None:
    """Two programs for one rule (docs/format.md 4.3): where they differed, honest mail would be stopped."""
    original = b"From: alice@a.example\r\n" + b"".join(name + b"".join(words) + last for name, words, last in traces) + end
    made = outer_headers(original, sent_at_ms=0, sender_domain="a.example", received=OURS, known_outer_ids={}).raw
    assert made[proof_trace.check_trace(made, 0, OURS, original):].startswith(b"From: ")


@given(st.sampled_from(["To", "Message-ID", "References"]),
       st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=90), min_size=1, max_size=9))
def test_both_fold_alike(name: str, words: list[str]) -> None:
    try:
        expected = fold_field(name, words)
    except FormatError:
        return
    assert f"{name}: ".encode() + proof_trace.folded(name, words) + b"\r\n" == expected


@given(st.integers(0, 253_402_300_799_999))
def test_both_write_the_same_date(at_ms: int) -> None:
    assert proof._date(at_ms // 1000).decode() == format_date(at_ms)


@given(st.one_of(st.integers(0, 100_000), st.integers(0, 2**34)))
def test_lengths_are_those_of_the_padding(size: int) -> None:
    """Every length that is written is one that passes; none beside it does."""
    def passed(container: int) -> bool:
        return proof._is_padded(68 + container + 16 * (container // 16384 + 1))
    padded = container_bytes(size)
    assert passed(padded)
    assert not any(passed(padded + off) for off in (-1, 1, 57, -57) if padded + off != container_bytes(padded + off))


@pytest.mark.parametrize("size", [0, 1, 100, 3000, 16_000, 16_400, 58_368, 60_000, 300_000])
@pytest.mark.parametrize("options", [{}, {"kids": False}, {"fold": False}, {"received": b""}], ids=str)
def test_what_is_sealed_passes(size: int, options: dict[str, bool]) -> None:
    check_sealed(*sealed(ORIGINAL + b"a line of text\r\n" * (size // 16), **options))      # type: ignore[arg-type]


def test_many_addresses_pass_and_no_other_does() -> None:
    addresses = [f"person{number}@{'x' * (number % 40)}b.example" for number in range(60)]
    addresses += ['"a, b \\"c"@b.example', "jürgen@b.example"]
    original = f"From: alice@a.example\r\nTo: {', '.join(addresses)}\r\nCc: {addresses[-2]}\r\n\r\n".encode()
    raw, facts = sealed(original)
    check_sealed(raw, replace(facts, shown=frozenset(addresses)))
    for left_out in addresses:
        assert not passes(raw, replace(facts, shown=frozenset(addresses) - {left_out}))


def test_the_note_is_that_of_the_document() -> None:
    document = (ROOT / "docs/format.md").read_text()
    found = re.search(r"each line with CRLF:\n\n(.*?)\n\nIt holds", document, re.DOTALL)
    assert found is not None
    shown = "".join(f"{line[4:]}\r\n" for line in found[1].split("\n"))
    assert proof.NOTE.endswith(f"\r\n\r\n{shown}".encode())


# --- nothing else passes


def test_a_byte_more_anywhere() -> None:
    """Each place, and bytes that mean something there: line ends, space, base64, dash, dot, colon, a letter of the text."""
    raw, facts = short()
    for at in range(len(raw) + 1):
        for extra in (b"\n", b" ", b"A", b"-", b"=", b"t"):
            assert not passes(raw[:at] + extra + raw[at:], facts), (at, extra)


def test_a_byte_less_or_another_anywhere() -> None:
    raw, facts = short()
    for at in range(len(raw)):
        assert not passes(raw[:at] + raw[at + 1:], facts), at
        other = b"B" if raw[at:at + 1] == b"A" else b"A"
        if at not in _free(raw):
            assert not passes(raw[:at] + other + raw[at + 1:], facts), at


def _free(raw: bytes) -> set[int]:
    """Where one random byte may be another, as nobody else knows it: what the blobs hold. All else is known."""
    start = raw.index(b"iU1MSw0KGgo")
    return set(range(start + 40, raw.index(b"iU1MUA0KGgo")))


def slices(original: bytes) -> st.SearchStrategy[bytes]:
    lines = original.split(b"\r\n")
    return st.one_of(
        st.tuples(st.integers(0, len(original)), st.integers(1, 500)).map(lambda cut: original[cut[0]:cut[0] + cut[1]]),
        st.tuples(st.integers(0, len(lines)), st.integers(1, 300)).map(
            lambda cut: b"".join(line + b"\r\n" for line in lines[cut[0]:cut[0] + cut[1]])),
        st.sampled_from([b"\r\n", b"\r\n ", b" ", b"\n", ATTACHMENT[:78 * 256], b"\r\n\r\n", b"A" * 76 + b"\r\n", b"\0",
                         b"\xff"]),
    ).filter(bool)


@given(slices(ORIGINAL), st.integers(0, 200_000), st.booleans())
@settings(max_examples=500)
@example(ATTACHMENT[:78 * 256], 0, True)
def test_any_piece_of_the_original_anywhere(piece: bytes, at: int, at_line: bool) -> None:
    """Also whole lines of base64 between lines of base64, which no look at the form alone can tell."""
    raw, facts = one()
    at %= len(raw) + 1
    if at_line:
        at = raw.rfind(b"\r\n", 0, at) + 2 if b"\r\n" in raw[:at] else 0
    assert not passes(raw[:at] + piece + raw[at:], facts)
    if piece != raw[at:at + len(piece)] and not set(range(at, at + len(piece))) & _free(raw):
        assert not passes(raw[:at] + piece + raw[at + len(piece):], facts)


def test_lines_of_an_attachment_before_every_line() -> None:
    """The one thing that looks like ours: lines of 76 characters of base64. At every line, in lengths that padding could give."""
    raw, facts = one()
    starts = [0] + [at.end() for at in re.finditer(b"\r\n", raw)]
    for count in (1, 2, 16, 64, 128, 256):
        piece = ATTACHMENT[:78 * count]
        assert not any(passes(raw[:at] + piece + raw[at:], facts) for at in starts)


@pytest.mark.parametrize(("what", "change"), [
    ("another subject", lambda raw: raw.replace(b"[...]", b"the secret subject")),
    ("a display name", lambda raw: raw.replace(b"From: alice", b"From: Alice <alice").replace(b"\r\nTo", b">\r\nTo", 1)),
    ("another recipient", lambda raw: raw.replace(b"To: bob@b.example", b"To: bob@b.example, dora@d.example")),
    ("a recipient twice", lambda raw: raw.replace(b"To: bob@b.example", b"To: bob@b.example, bob@b.example")),
    ("a field more", lambda raw: raw.replace(b"Subject:", b"X-Text: the secret\r\nSubject:")),
    ("a field twice", lambda raw: raw.replace(b"Subject: [...]\r\n", b"Subject: [...]\r\nSubject: [...]\r\n")),
    ("another fold", lambda raw: raw.replace(b"Date: Mon,", b"Date: Mon,\r\n")),
    ("the original's id", lambda raw: re.sub(rb"Message-ID: <.*?>", b"Message-ID: <one@a.example>", raw)),
    ("another domain", lambda raw: re.sub(rb"(Message-ID: <.*?)a\.example>", rb"\1secret.example>", raw)),
    ("an id nobody knows", lambda raw: raw.replace(b"<00112233", b"<secret33")),
    ("the for clause", lambda raw: raw.replace(b"id 4F1", b"id 4F1 for <dora@d.example>")),
    ("a hop less", lambda raw: raw[raw.index(b"Received: from"):]),
    ("another kind of answer", lambda raw: raw.replace(b"auto-generated", b"auto-secret")),
    ("another note", lambda raw: raw.replace(b"If you read this", b"If you see this")),
    ("text before", lambda raw: b"the secret\r\n" + raw),
    ("a preamble", lambda raw: raw.replace(b"\r\n\r\n--=_mlt_", b"\r\n\r\nthe secret\r\n--=_mlt_", 1)),
    ("text after", lambda raw: raw + b"the secret\r\n"),
    ("another hint", lambda raw: re.sub(rb"kid=\w{16}", b"kid=0011223344556677", raw, count=1)),
    ("no hint", lambda raw: re.sub(rb"; kid=\w{16}", b"", raw, count=1)),
    ("another name", lambda raw: raw.replace(b"key-2.mlk", b"secret.mlk")),
    ("another name of the same length", lambda raw: raw.replace(b"message.mlp", b"secrets.mlp")),
    ("another type", lambda raw: raw.replace(b"malote.sealed", b"malote.secret")),
    ("a part less", lambda raw: raw[:(at := raw.index(b"key-2.mlk") - 200)] + raw[raw.index(b"--=_mlt", at + 300):]),
    ("LF", lambda raw: raw.replace(b"\r\n", b"\n")),
    ("another boundary", lambda raw: raw.replace(b"=_mlt_", b"=_txt_")),
    ("the original", lambda raw: ORIGINAL),
    ("nothing", lambda raw: b""),
    ("a bytearray", lambda raw: bytearray(raw)),
])
def test_each_piece(what: str, change: object) -> None:
    raw, facts = one()
    changed = change(raw)       # type: ignore[operator]
    assert changed != raw or not isinstance(changed, bytes), f"{what}: the test changes nothing"
    with pytest.raises(NotProven) as stopped:
        check_sealed(changed, facts)
    assert "secret" not in str(stopped.value), "the alarm repeats nothing of it"


@pytest.mark.parametrize(("what", "facts"), [
    ("another sender", {"sender": "mallory@a.example"}), ("another time", {"sent_at_ms": NOW_MS + 1000}),
    ("nobody is shown", {"shown": frozenset()}), ("fewer recipients", {"kids": one()[1].kids[:1]}),
    ("more recipients", {"kids": one()[1].kids * 2}), ("another order", {"kids": one()[1].kids[::-1]}),
    ("hidden recipients", {"kids": ("", "")}), ("no recipients", {"kids": ()}), ("no thread", {"outer_ids": ()}),
    ("other hops", {"original": b"From: a@b\r\n\r\n"}), ("no hop of ours", {"received": b""}),
    ("text as our hop", {"received": b"Received: the secret text is here;\r\n"}),
    ("another sealed part", {"payload": bytes(4180)}),
    ("a sealed part cut off", {"payload": one()[1].payload[:-1]}),
], ids=lambda value: value if isinstance(value, str) else "")
def test_each_fact(what: str, facts: dict[str, object]) -> None:
    raw, decided = one()
    assert not passes(raw, replace(decided, **facts)), what     # type: ignore[arg-type]


def test_text_in_the_place_of_ciphertext() -> None:
    """A cipher that does nothing, and everything else in order: also the sealer's word for what it sealed."""
    made = Envelope(ORIGINAL).add(BOB)
    for plain in (made.container(), bytes(len(made.container())), made.container()[:3000].ljust(4096, b"\0")):
        payload = made.header.raw + plain + bytes(16 * (len(plain) // 16384 + 1))
        raw, facts = made.raw(payload), replace(
            one()[1], original=b"", received=b"", kids=(made.parts[0][0],), payload=payload, outer_id="")
        with pytest.raises(NotProven, match=r"no ciphertext|length"):
            check_sealed(raw, facts)


def test_text_in_one_chunk_or_at_the_end_of_a_key_blob() -> None:
    """A cipher that forgets one chunk of many, and a wrapped key that is not wrapped."""
    raw, facts = sealed(ORIGINAL + bytes(range(256)) * 1000, fold=False)
    start = raw.index(b"message.mlp") + len('message.mlp"\r\n\r\n')
    end = raw.rindex(b"--=_mlt_")
    for chunk in range((len(facts.payload) - 68) // 16400):
        payload = bytearray(facts.payload)
        payload[68 + chunk * 16400:68 + chunk * 16400 + 16384] = (ORIGINAL * 10)[:16384]
        lines = pybase64.encodebytes(payload).replace(b"\n", b"\r\n")
        with pytest.raises(NotProven, match="no ciphertext"):
            check_sealed(raw[:start] + lines + raw[end:], replace(facts, payload=payload))
    raw, facts = one()
    start = raw.index(b"iU1MSw0KGgo")
    blob = pybase64.b64decode(raw[start:start + proof.BLOB_TEXT_BYTES].replace(b"\r\n", b""))
    lines = pybase64.encodebytes(blob[:700] + (FRAME.encode() * 9)[:len(blob) - 700]).replace(b"\n", b"\r\n")
    assert not passes(raw[:start] + lines + raw[start + len(lines):], facts)


@pytest.mark.parametrize("text", ["the secret text", "the secret@x text", 'a"b@c', "x", "bob@b.example\r\n X: y", "a@b c"])
def test_a_reader_of_addresses_that_gives_text(text: str) -> None:
    """Even if what was decided says so: grouping and header are made by one reader of To and Cc."""
    raw, facts = one()
    for name in (b"To", b"Cc"):
        changed = re.sub(rb"%b: [^\r]*" % name, b"%b: %b" % (name, text.encode()), raw, count=1)
        assert changed != raw
        assert not passes(changed, replace(facts, shown=SHOWN | {text}))
    two = raw.replace(b"To: bob@b.example", f"To: bob@b.example, {text}".encode())
    assert not passes(two, replace(facts, shown=SHOWN | {text}))


def test_a_length_that_padding_does_not_give() -> None:
    """Also the sealer's word for it."""
    raw, facts = one()
    start, end = raw.index(b'message.mlp"') + len(b'message.mlp"\r\n\r\n'), raw.rindex(b"--=_mlt_")
    for size in (len(facts.payload) - 57, len(facts.payload) + 57, 68 + 16 + 4095, 68 + 15):
        payload = (bytes(facts.payload) * 2)[:size]
        lines = pybase64.encodebytes(payload).replace(b"\n", b"\r\n")
        with pytest.raises(NotProven, match="length"):
            check_sealed(raw[:start] + lines + raw[end:], replace(facts, payload=payload))


def test_more_recipients_than_a_copy_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "MAX_RECIPIENTS", 1)
    with pytest.raises(NotProven, match="number of recipients"):
        check_sealed(*one())


def test_a_thread_that_is_text() -> None:
    raw, facts = one()
    ours = next(iter(facts.outer_ids))
    for text in ("secret", "<secret", "<the>secret>"):
        assert not passes(raw.replace(ours.encode(), text.encode()), replace(facts, outer_ids=(text,)))


@pytest.mark.long
@pytest.mark.parametrize("part", range(8))
def test_any_byte_of_the_original_at_any_place(part: int) -> None:
    """Each byte there is in it, put in and put in the place of another, at every position."""
    raw, facts = short()
    free = _free(raw)
    extras = [bytes([value]) for value in sorted(set(facts.original))]
    for at in range(part, len(raw) + 1, 8):
        for extra in extras:
            assert not passes(raw[:at] + extra + raw[at:], facts), (at, extra)
            if extra != raw[at:at + 1] and at < len(raw) and at not in free:
                assert not passes(raw[:at] + extra + raw[at + 1:], facts), (at, extra)


def test_spare_bits_of_base64_hold_nothing() -> None:
    raw, facts = one()
    for end in re.finditer(rb"([A-Za-z0-9+/])==\r\n", raw):
        letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
        other = letters[letters.index(end[1]) ^ 1]
        assert not passes(raw[:end.start()] + bytes([other]) + raw[end.start() + 1:], facts)


# --- what is said to be encrypted already


def _covered() -> Iterator[tuple[str, bytes]]:
    yield "sealed", one()[0]
    yield "sealed, no hints", sealed(kids=False)[0]
    yield "sealed and on its way", b"Received: by mx; today\r\n" + one()[0]


@pytest.mark.parametrize(("what", "raw"), list(_covered()), ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_sealed_already_is_known(what: str, raw: bytes) -> None:
    assert decide_encrypted(raw) == "malote", what
    check_covered(raw)


@given(slices(ORIGINAL), st.integers(0, 200_000))
@settings(max_examples=200)
def test_what_is_sealed_already_holds_no_piece_of_text(piece: bytes, at: int) -> None:
    """In its body; but for base64 that could be of the sealed part, which only its sealer can tell."""
    raw = one()[0]
    start = raw.index(b"\r\n\r\n")
    at = start + at % (len(raw) - start + 1)
    if piece.translate(None, b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/\r\n "):
        with pytest.raises(NotProven):
            check_covered(raw[:at] + piece + raw[at:])


@pytest.mark.parametrize("raw", [
    ORIGINAL, b"", one()[0].replace(b"[...]", b"the secret"), one()[0].replace(b"Subject", b"X-Text: the secret\r\nSubject"),
    one()[0] + b"the secret", b"Content-Type: text/plain\r\n\r\nx", one()[0].replace(b"From: alice@", b"From: Secret <alice@"),
    b"Content-Type: multipart/encrypted; x\r\nContent-Type: text/plain\r\n\r\n",
])
def test_what_is_not_encrypted_is_known(raw: bytes) -> None:
    with pytest.raises(NotProven):
        check_covered(raw)


@pytest.mark.parametrize("kind", ["multipart/encrypted; protocol=x", "application/pkcs7-mime; smime-type=enveloped-data"])
def test_other_formats_are_known_by_their_type(kind: str) -> None:
    check_covered(f"From: a@b\r\nContent-Type: {kind}\r\n\r\n".encode())


def test_a_notice_holds_nothing_of_the_message() -> None:
    """Every line of the original, and each of ours again, at every line of the notice; and another recipient."""
    facts = replace(one()[1], outer_id="")      # it is about several copies
    outer = outer_headers(ORIGINAL, sent_at_ms=NOW_MS, sender_domain="a.example", received=OURS, known_outer_ids=THREAD)
    refused = [Refused("dora@d.example", Reply(550, "5.1.1", "no such user"), "rfc822;dora@d.example", "mx.d.example"),
               Refused("dörte@d.example", Reply(554, "", "no"))]
    notice = make_notice(refused, sender="alice@a.example", host="gateway.a.example", outer_headers=outer.raw, envelope_id="QQ1",
                         token="0" * 32, arrived_ms=NOW_MS, now_ms=NOW_MS)
    check_notice(notice, "alice@a.example", facts)
    pieces = {*(line + b"\r\n" for line in ORIGINAL.split(b"\r\n")), ORIGINAL}
    for at in [0, *(found.end() for found in re.finditer(b"\r\n", notice))]:
        for piece in pieces:
            with pytest.raises(NotProven):
                check_notice(notice[:at] + piece + notice[at:], "alice@a.example", facts)
    with pytest.raises(NotProven):
        check_notice(notice, "mallory@a.example", facts)
    with pytest.raises(NotProven):
        check_notice(notice.replace(b"[...]", b"the secret"), "alice@a.example", facts)
