"""The outer headers: what is not on the list is not outside, whatever the original holds."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from malote.core.message import MAX_HOPS, complete, header_fields, prepare, unfold
from malote.core.outer import OuterHeaders, outer_headers, strip_for, threading_ids
from malote.errors import FormatError, MailLoop

SENT = 1_795_000_000_000
ALLOWED = {
    "Received", "From", "To", "Cc", "Subject", "Date", "Message-ID", "In-Reply-To", "References", "Auto-Submitted", "Malote",
}


def outer(original: bytes, *, received: bytes = b"", known: dict[str, str] | None = None) -> OuterHeaders:
    return outer_headers(
        original, sent_at_ms=SENT, sender_domain="a.example", received=received, known_outer_ids=known or {},
    )


def value(found: OuterHeaders, name: str) -> str | None:
    values = [text for field, text in found.fields if field == name]
    assert len(values) <= 1
    return values[0] if values else None


def test_the_whole_list() -> None:
    """One message that has everything: only the list is outside, and each value is the bare minimum."""
    original = (
        b"Received: from pc (pc [10.0.0.5]) by mx.a.example with ESMTP id 1 for <bob@b.example>;\r\n"
        b" Tue, 24 Nov 2026 10:00:00 +0100\r\n"
        b"DKIM-Signature: v=1; secret\r\nFrom: =?utf-8?q?Secret_name?= <Alice@A.example> (secret)\r\n"
        b'To: "Secret name" <bob@b.example>, Secret: carol@c.example;\r\nCc: dave@d.example (secret)\r\n'
        b"Reply-To: secret@a.example\r\nSender: secret@a.example\r\nSubject: Secret\r\n =?utf-8?q?Secret?=\r\n"
        b"Date: Tue, 24 Nov 2026 10:00:00 +0530\r\nMessage-ID: <secret@pc.local>\r\nIn-Reply-To: <secret-1@b.example>\r\n"
        b"References: <secret-1@b.example> <secret-2@b.example>\r\nUser-Agent: Secret 1.0\r\nX-Secret: 1\r\n"
        b"Organization: Secret\r\n"
        b"Auto-Submitted: auto-generated (secret)\r\nResent-To: secret@e.example\r\nComments: secret\r\nKeywords: secret\r\n"
        b"List-Id: secret\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; name=secret\r\n\r\nFrom: secret@body\r\n"
    )
    ours = b"Received: by malote.a.example with ESMTP; today\r\n"
    found = outer(original, received=ours, known={"<secret-2@b.example>": "<out@b>"})
    assert b"secret" not in found.raw.lower()
    assert {name for name, _ in found.fields} <= ALLOWED
    assert [text for name, text in found.fields if name == "Received"] == [
        "by malote.a.example with ESMTP; today",
        "from pc (pc [10.0.0.5]) by mx.a.example with ESMTP id 1 ; Tue, 24 Nov 2026 10:00:00 +0100",
    ]
    assert value(found, "From") == "alice@a.example"
    assert value(found, "To") == "bob@b.example, carol@c.example"
    assert value(found, "Cc") == "dave@d.example"
    assert value(found, "Subject") == "[...]"
    assert value(found, "Date") == "Wed, 18 Nov 2026 11:06:40 +0000"
    assert value(found, "References") == "<out@b>"
    assert value(found, "In-Reply-To") is None
    assert value(found, "Auto-Submitted") == "auto-generated"
    assert value(found, "Malote") == "1"
    assert found.raw.endswith(b"\r\n")


def test_a_bcc_is_nowhere() -> None:
    """Not from the header that the client sent, and not from the trace of the servers before us."""
    raw = (
        b"Received: by x with ESMTP id 1 for\r\n <secret@b.example>; today\r\n"
        b"From: a@a.example\r\nTo: bob@b.example\r\nbCC :\r\n\tsecret@b.example\r\nResent-Bcc: secret@b.example\r\n\r\nbody"
    )
    # the edits are what removes Bcc from the original; the list does not depend on them
    for original in (raw, complete(prepare(raw), date_ms=0, message_id="<m@a.example>")):
        assert b"secret" not in outer(original).raw


def test_message_ids_are_fresh() -> None:
    """Equal ids in one store are taken for one message; and nothing of the inner id shows."""
    found = {outer(b"From: a@a.example\r\nMessage-ID: <m@a.example>\r\n\r\n").message_id for _ in range(20)}
    assert len(found) == 20
    assert all(re.fullmatch(r"<[0-9a-f]{32}@a\.example>", message_id) for message_id in found)


@pytest.mark.parametrize(("line", "cleaned"), [
    # Postfix, folded
    (b"from a (b [1.2.3.4])\r\n\tby c (Postfix) with ESMTPS id 4X\r\n\tfor <secret@b>; Tue, 24 Nov 2026 10:00:00 +0000 (UTC)",
     b"from a (b [1.2.3.4])\tby c (Postfix) with ESMTPS id 4X\t; Tue, 24 Nov 2026 10:00:00 +0000 (UTC)"),
    # Exim: several recipients, and the sender in a comment
    (b"from a by c with esmtp (Exim 4.96) (envelope-from <secret@a>) id 1 for secret@b secret@c; today",
     b"from a by c with esmtp (Exim 4.96)  id 1 ; today"),
    # a clause after `for`
    (b"from a for <secret@b> by c with SMTP id 1; today", b"from a by c with SMTP id 1; today"),
    (b"by c FOR secret@b with SMTP; today", b"by c with SMTP; today"),
    # comments and quoted strings are no structure: neither do they hide a clause, nor end one
    (b"by c for (x; by y) <secret@b>; today", b"by c ; today"),
    (b'by c for <"secret; with x"@b>; today', b"by c ; today"),
    (b"by c for(comment)<secret@b>; today", b"by c ; today"),
    (b"by c (for secret); today", b"by c ; today"),
    (b"by c (nested (for secret) x); today", b"by c ; today"),
    (b'by c id "for x"; today', b'by c id "for x"; today'),
    # nothing ends it
    (b"by c for <secret@b>", b"by c "),
    (b"by c for <secret@b> (secret", b"by c "),
    # no such clause
    (b"from for.example by mx.for-me.example with SMTP id for1; today",
     b"from for.example by mx.for-me.example with SMTP id for1; today"),
    (b"", b""),
])
def test_received_without_its_recipient(line: bytes, cleaned: bytes) -> None:
    """The `for` clause of RFC 5321 names a recipient, perhaps a Bcc; so do some comments. The rest of the trace stays."""
    assert strip_for(line) == cleaned
    assert b"secret" not in outer(b"Received: " + line + b"\r\nFrom: a@a.example\r\n\r\n").raw


def test_loops_stay_visible() -> None:
    """Every Received line counts as one outside too, even one that had nothing but its recipient in it."""
    original = b"Received: for <x@y>\r\n" * MAX_HOPS + b"From: a@a.example\r\n\r\n"
    assert sum(name == "Received" for name, _ in outer(original).fields) == MAX_HOPS
    assert sum(name == "Received" for name, _ in outer(original, received=b"by us; now").fields) == MAX_HOPS + 1
    with pytest.raises(MailLoop):
        outer(b"Received: x\r\n" + original)


@pytest.mark.parametrize(("header", "sent"), [
    (b"no", "no"), (b"auto-replied; owner=secret@x", "auto-replied"), (b" Auto-Generated (secret)", "auto-generated"),
    (b"auto-notified", "auto-notified"),
    (b"auto-something-secret", "auto-generated"),       # unknown, but a program's: it must not be answered
    (b"\r\n secret\x0bvalue", "auto-generated"),
])
def test_auto_submitted_is_one_of_its_words(header: bytes, sent: str) -> None:
    found = outer(b"From: a@a.example\r\nAuto-Submitted:" + header + b"\r\n\r\n")
    assert value(found, "Auto-Submitted") == sent


def test_threads_outside_only_by_ids_that_are_outside() -> None:
    """A reply names what the other's messages were called outside; what is not known, or no id, is left out."""
    original = b"From: a@a.example\r\nIn-Reply-To: <i1@b>\r\nReferences: <i0@b>\r\n <i1@b> (c) <i2@b> junk <i1@b>\r\n\r\n"
    assert threading_ids(original) == ["<i1@b>", "<i0@b>", "<i2@b>"]
    found = outer(original, known={"<i1@b>": "<o1@b>", "<i2@b>": "<o2@b>\r\nBcc: x@y", "<i0@b>": "o0@b"})
    assert (value(found, "In-Reply-To"), value(found, "References")) == ("<o1@b>", "<o1@b> <o1@b>")


def test_addresses_beyond_ascii() -> None:
    """A domain leaves as A-labels; a local part beyond ASCII needs SMTPUTF8, and says so."""
    plain = outer("From: a@a.example\r\nTo: bob@bücher.example\r\n\r\n".encode())
    assert (value(plain, "To"), plain.needs_smtputf8) == ("bob@xn--bcher-kva.example", False)
    utf8 = outer("From: a@a.example\r\nTo: jörg@b.example\r\n\r\n".encode())
    assert (value(utf8, "To"), utf8.needs_smtputf8) == ("jörg@b.example", True)
    assert utf8.raw.decode("utf-8")


def test_addresses_that_no_header_may_hold_are_left_out() -> None:
    """A private-use character is a valid local part, and shows as anything: its owner is told nothing to the others."""
    found = outer("From: a@a.example\r\nTo: x\ue000@b.example, bob@b.example\r\n\r\n".encode())
    assert (value(found, "To"), found.raw.isascii()) == ("bob@b.example", True)


def test_many_recipients_are_folded() -> None:
    """A thousand recipients: no line above 78, each address whole, none lost."""
    addresses = [f"recipient-number-{number}@example.org" for number in range(1000)] + ['"with space"@example.org']
    found = outer(b"From: a@a.example\r\nTo: " + ",\r\n ".join(addresses).encode() + b"\r\n\r\n")
    assert value(found, "To") == ", ".join(addresses)
    assert max(map(len, found.raw.split(b"\r\n"))) <= 78
    assert b'"with space"@example.org' in found.raw


@pytest.mark.parametrize("evil", [
    b"x\rBcc: y@y", b"x\nBcc: y@y", b"x\0y", b"x\xe2\x80\xa8Bcc: y@y", b"x\xc2\x85y", b"\xff\xfe", b"a@b.example\x0b,c@d.example",
    b'"a\rb"@b.example', b"=?utf-8?q?=0D=0ABcc:_y=40y?=", b"<x@y>\rBcc: y@y", b"x" * 5000, b" ".join([b"w" * 1200] * 4),
    b"x\r\n y\r\n\tBcc: z@z",
])
@pytest.mark.parametrize("name", [
    b"Received", b"To", b"Cc", b"References", b"In-Reply-To", b"Auto-Submitted", b"Subject", b"Message-ID",
])
def test_nothing_can_be_injected(name: bytes, evil: bytes) -> None:
    """Each field we copy, with line ends and controls in it: one line out, and no field that was not meant."""
    original = name + b": " + evil + b"\r\nFrom: a@a.example\r\n\r\n"
    found = outer(original, known={"<x@y>": "<o@y>"})
    _check_form(found)


def _check_form(found: OuterHeaders) -> None:
    """What `raw` says is what `fields` says, in lines that any reader reads alike."""
    text = found.raw.decode("utf-8")
    lines = text[:-2].split("\r\n")
    assert all(line.isprintable() and len(line.encode()) <= 998 and line.strip() for line in lines)
    parsed = header_fields(found.raw + b"\r\n")
    said = [(field.name, unfold(field.raw_value).decode()) for field in parsed]
    assert said == [(name.lower(), value.strip()) for name, value in found.fields]
    assert {name for name, _ in found.fields} <= ALLOWED


@pytest.mark.parametrize("name", [b"Received", b"From", b"To", b"Auto-Submitted", b"References"])
@given(evil=st.binary(max_size=80) | st.text("for by;()\"\\<>@,: \r\n\tx\u2028", max_size=60).map(str.encode))
def test_any_value(name: bytes, evil: bytes) -> None:
    """Any bytes in a field that is looked at: well-formed outer headers, or a refusal."""
    try:
        found = outer(b"X: y\r\n" + name + b": " + evil + b"\r\nFrom: a@a.example\r\n\r\n", received=evil)
    except (FormatError, MailLoop):
        return
    _check_form(found)


def test_our_own_line_is_cleaned_too() -> None:
    """Whoever builds it cannot leak a recipient by it."""
    assert b"secret" not in outer(b"From: a@a.example\r\n\r\n", received=b"received : by us for <secret@b>; now\r\n").raw
    assert not [name for name, _ in outer(b"From: a@a.example\r\n\r\n", received=b" \r\n").fields if name == "Received"]


@pytest.mark.parametrize("header", [
    b"", b"From: a@a.example\r\nFrom: b@a.example\r\n", b"From: broken\r\n", b"From: a@x, b@x\r\n",
])
def test_one_author_or_nothing(header: bytes) -> None:
    with pytest.raises(FormatError):
        outer(header + b"\r\n")


@pytest.mark.parametrize("hostile", [b"for " * 100_000, b"(for " * 80_000, b"(@)" * 100_000, b'"' * 300_000, b"id for" * 50_000])
def test_hostile_trace_takes_linear_time(hostile: bytes) -> None:
    """Quadratic time would run into the test's timeout."""
    _check_form(outer(b"Received: " + hostile + b"\r\nFrom: a@a.example\r\n\r\n"))


def test_trace_is_on_top() -> None:
    """RFC 5321 4.4: trace fields stand above the others, the newest first."""
    names = [name for name, _ in outer(b"From: a@a.example\r\nReceived: x\r\n\r\n", received=b"by us; now").fields]
    assert names[:2] == ["Received", "Received"]
    assert all(first == "Received" or second != "Received" for first, second in pairwise(names))
