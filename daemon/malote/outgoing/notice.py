"""A delivery status notification (RFC 3464, RFC 6522) about recipients that the upstream server refused for good.

Sent only by a relay, only after others were accepted, only to a sender that is not the null sender, and through the same
upstream server. It leaves unsealed, so it holds nothing but addresses, the upstream server's reasons, and the headers that the
outside could see anyway.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from malote.core.message import format_date
from malote.errors import Reply
from malote.outgoing.answers import printable

_NOT_QCHAR = re.compile(r"[^!-*,-<>-\[\]-~]")     # RFC 6533 section 3
_XTEXT = re.compile(r"\+([0-9A-F]{2})")     # RFC 3461 section 4


@dataclass(frozen=True, slots=True)
class Refused:
    """One recipient that did not get the message."""

    address: str
    reply: Reply
    original_recipient: str = ""    # the client's ORCPT, as given
    remote: str = ""                # the server that said so; "": we did, or it has no name


def make_notice(refused: Sequence[Refused], *, sender: str, host: str, outer_headers: bytes, envelope_id: str, token: str,
                arrived_ms: int, now_ms: int) -> bytes:
    """The complete message, CRLF, 7-bit unless the sender's own address or the message's is not. `token`: hex, for boundary and
    Message-ID. `outer_headers`: what the outside saw of the message; RET=FULL brings no more, as this is not sealed. `host`: our
    name. `envelope_id`: the client's ENVID."""
    boundary = f"=_mlt_{token}"
    person = "\r\n".join(f"  {printable(item.address)}\r\n    {_reason(item.reply)}" for item in refused)
    fields = [f"Reporting-MTA: dns; {host}"]
    if envelope_id:
        fields.insert(0, f"Original-Envelope-Id: {printable(_decoded(envelope_id))}")
    fields.append(f"Arrival-Date: {format_date(arrived_ms)}")
    groups = ["\r\n".join(fields), *("\r\n".join(_recipient_fields(item)) for item in refused)]
    headers = "text/rfc822-headers"
    if not outer_headers.isascii():     # RFC 6533 section 5
        headers = "message/global-headers\r\nContent-Transfer-Encoding: 8bit"
    head = [
        f"From: Mail Delivery System <MAILER-DAEMON@{host}>", f"To: {sender}",
        "Subject: Undelivered mail: some recipients were refused",
        f"Date: {format_date(now_ms)}", f"Message-ID: <{token}@{host}>", "Auto-Submitted: auto-replied",
        "MIME-Version: 1.0", f'Content-Type: multipart/report; report-type=delivery-status;\r\n boundary="{boundary}"',
    ]
    parts = [
        "Content-Type: text/plain; charset=us-ascii\r\n\r\n"
        "Your message was accepted for some of its recipients. These were refused by the next mail\r\n"
        f"server and did not get it:\r\n\r\n{person}\r\n",
        "Content-Type: message/delivery-status\r\n\r\n" + "\r\n\r\n".join(groups) + "\r\n",
    ]
    body = "".join(f"--{boundary}\r\n{part}\r\n" for part in parts)
    last = f"--{boundary}\r\nContent-Type: {headers}\r\n\r\n"
    return ("\r\n".join(head) + "\r\n\r\n" + body + last).encode() + outer_headers + f"\r\n--{boundary}--\r\n".encode()


def _recipient_fields(item: Refused) -> list[str]:
    fields = [f"Final-Recipient: {_typed(item.address)}", "Action: failed", f"Status: {_status(item.reply)}",
              f"Diagnostic-Code: smtp; {_reason(item.reply)}"]
    if item.original_recipient:
        kind, _, address = item.original_recipient.partition(";")
        shown = _utf8_xtext(address) if kind.lower() == "utf-8" else printable(_decoded(address))
        fields.insert(0, f"Original-Recipient: {printable(kind)}; {shown}")
    if item.remote:
        fields.insert(-1, f"Remote-MTA: dns; {_mta_name(item.remote)}")
    return fields


def _mta_name(host: str) -> str:
    """RFC 3464 2.2.2: a domain name, or an address as RFC 5321 writes it."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return printable(host)
    return f"[{address}]" if address.version == 4 else f"[IPv6:{address}]"


def _typed(address: str) -> str:
    """RFC 6533 section 3: an address beyond ASCII is written in its 7-bit form, utf-8-addr-xtext."""
    return f"rfc822; {address}" if address.isascii() else f"utf-8; {_utf8_xtext(address)}"


def _utf8_xtext(address: str) -> str:
    """In 7 bits; what is so already (a client's ORCPT) stays."""
    escaped = r"\x{"
    return printable(address) if escaped in address else _NOT_QCHAR.sub(lambda c: f"{escaped}{ord(c[0]):X}}}", address)


def _status(reply: Reply) -> str:
    return reply.enhanced if reply.enhanced.startswith("5.") else "5.0.0"


def _reason(reply: Reply) -> str:
    return printable(f"{reply.code} {reply.enhanced} {reply.text}".replace("  ", " ").replace("\n", " ").strip())[:800]


def _decoded(xtext: str) -> str:
    return _XTEXT.sub(lambda match: chr(int(match[1], 16)), xtext)
