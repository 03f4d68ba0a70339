"""The last look at what leaves unsealed where sealing is required: mail that is encrypted already, and our own notices."""

from __future__ import annotations

import re

from malote.core.proof import BLOB_TEXT_BYTES, MAX_RECIPIENTS, NOTE, PART, Facts, check_body, check_header
from malote.core.proof_trace import UNFOLD, header_end
from malote.errors import NotProven

_ADDRESS = rb'(?:"(?:[^"\\\r\n]|\\.)*"|[^\s"<>(),;:@]+)@[^\s"<>(),;@]+'
_IDS = rb"<[^\s<>]+>(?: <[^\s<>]+>)*"
_OUTER_FIELD = re.compile(
    rb"received[ \t]*:.*|(?:from|to|cc)[ \t]*:[ \t]*%b(?:, %b)*|subject[ \t]*:[ \t]*\[\.\.\.\]|"
    rb"date[ \t]*:[ \t]*[a-z]{3}, \d\d [a-z]{3} \d{4} \d\d:\d\d:\d\d \+0000|"
    rb"(?:message-id|in-reply-to|references)[ \t]*:[ \t]*%b|auto-submitted[ \t]*:[ \t]*[a-z-]+|"
    rb"mime-version[ \t]*:[ \t]*1\.0|malote[ \t]*:[ \t]*1|"
    rb'content-type[ \t]*:[ \t]*multipart/mixed; boundary="=_mlt_[a-z0-9_-]{22}"' % (_ADDRESS, _ADDRESS, _IDS),
    re.IGNORECASE | re.DOTALL)
_BOUNDARY = re.compile(rb'multipart/mixed; boundary="(=_mlt_[A-Za-z0-9_-]{22})"[ \t]*\Z')
_ENCRYPTED = re.compile(rb"(?:multipart/encrypted|application/(?:x-)?pkcs7-mime)[ \t]*;", re.IGNORECASE)
_BLOB_KID = re.compile(
    rb"--=_mlt_[A-Za-z0-9_-]{22}\r\nContent-Type: application/vnd\.malote\.key-blob(?:; kid=([0-9a-f]{16}))?\r\n")


def check_covered(original: bytes) -> None:
    """Raises `NotProven` unless `original`, which leaves as it is, is of a kind that is encrypted: sealed by malote, and then
    nothing but the parts of that; or OpenPGP or S/MIME by its type (what is in those, `core.encrypted` has looked at)."""
    end = header_end(original)
    lines = [UNFOLD.sub(b"", line).strip(b" \t\r\n") for line in re.split(rb"\n(?![ \t])", original[:end])]
    fields = [line for line in lines if line]
    types = [line.partition(b":")[2].strip() for line in fields if line.lower().startswith(b"content-type")]
    if len(types) != 1:
        raise NotProven("type of what is said to be encrypted")
    boundary = _BOUNDARY.match(types[0])
    if boundary is None:
        if _ENCRYPTED.match(types[0]) is None:
            raise NotProven("type of what is said to be encrypted")
        return
    if not all(map(_OUTER_FIELD.fullmatch, fields)):
        raise NotProven("header of what is said to be sealed")
    start = end + 2         # the empty line
    position = start + len(boundary[1]) + 4 + len(NOTE)
    kids: list[str] = []
    while (blob := _BLOB_KID.match(original, position)) is not None and len(kids) <= MAX_RECIPIENTS:
        kid = (blob[1] or b"").decode()
        head = PART % (boundary[1], b"key-blob; kid=%b" % blob[1] if kid else b"key-blob", b"key-%d.mlk" % (len(kids) + 1))
        kids.append(kid)
        position += len(head) + BLOB_TEXT_BYTES
    check_body(original, start, boundary[1], kids, None)


# --- notices about refused recipients (RFC 3464)

_DATE = rb"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d \+0000"
_HOST = rb"[!-;=?-~]{1,255}"
_SHOWN = rb'(?:"[ -~]{0,1000}"|[!-~]{1,1000})@[!-~]{1,1000}'     # an address, in 7 bits
_REASON = rb"\d{3} [ -~]{0,796}"                                # what the next server said
_NOTICE = re.compile(
    rb"From: Mail Delivery System <MAILER-DAEMON@(?P<host>%(host)b)>\r\nTo: (?P<to>[^\r\n]+)\r\n"
    rb"Subject: Undelivered mail: some recipients were refused\r\nDate: %(date)b\r\n"
    rb"Message-ID: <(?P<token>[0-9a-f]{32})@(?P=host)>\r\nAuto-Submitted: auto-replied\r\nMIME-Version: 1\.0\r\n"
    rb'Content-Type: multipart/report; report-type=delivery-status;\r\n boundary="=_mlt_(?P=token)"\r\n\r\n'
    rb"--=_mlt_(?P=token)\r\nContent-Type: text/plain; charset=us-ascii\r\n\r\n"
    rb"Your message was accepted for some of its recipients\. These were refused by the next mail\r\n"
    rb"server and did not get it:\r\n\r\n(?:  %(shown)b\r\n    %(reason)b\r\n)+\r\n"
    rb"--=_mlt_(?P=token)\r\nContent-Type: message/delivery-status\r\n\r\n"
    rb"(?:Original-Envelope-Id: [ -~]{0,1000}\r\n)?Reporting-MTA: dns; (?P=host)\r\nArrival-Date: %(date)b\r\n"
    rb"(?:\r\n(?:Original-Recipient: [ -~]{1,40}; [ -~]{0,1000}\r\n)?Final-Recipient: (?:rfc822|utf-8); %(shown)b\r\n"
    rb"Action: failed\r\nStatus: 5\.\d{1,3}\.\d{1,3}\r\n(?:Remote-MTA: dns; %(host)b\r\n)?"
    rb"Diagnostic-Code: smtp; %(reason)b\r\n)+\r\n"
    rb"--=_mlt_(?P=token)\r\nContent-Type: "
    rb"(?:text/rfc822-headers|message/global-headers\r\nContent-Transfer-Encoding: 8bit)\r\n\r\n"
    % {b"host": _HOST, b"date": _DATE, b"shown": _SHOWN, b"reason": _REASON})


def check_notice(raw: bytes, sender: str, facts: Facts) -> None:
    """Raises `NotProven` unless `raw` is a notice to `sender` (an envelope path) about a message whose outer header the facts
    describe, and holds nothing else of it. What a server said and what the client gave as ENVID and ORCPT stands as it was."""
    head = _NOTICE.match(raw) if type(raw) is bytes else None
    if head is None or head["to"] != sender.encode("utf-8", "surrogateescape"):
        raise NotProven("notice")
    end = check_header(raw, head.end(), facts)
    if raw[end:] != b"Malote: 1\r\n\r\n--=_mlt_%b--\r\n" % head["token"]:
        raise NotProven("end of a notice")
