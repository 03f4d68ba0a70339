"""A strict reader of delivery status notifications, written from RFC 3464, 6522 and 6533; it shares nothing with malote."""

from __future__ import annotations

import email
import email.policy
import re
from dataclasses import dataclass
from email.message import EmailMessage
from email.utils import parsedate_to_datetime

_FIELD = re.compile(r"([!-9;-~]+):[ \t]?(.*)")
_DOMAIN = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)*[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
                     r"|\[\d+\.\d+\.\d+\.\d+\]|\[IPv6:[0-9a-fA-F:.]+\]")
_UTF8_XTEXT = re.compile(r"(?:[!-*,-<>-\[\]-~]|\\x\{[1-9A-F][0-9A-F]{1,5}\})+")
_STATUS = re.compile(r"[245]\.\d{1,3}\.\d{1,3}")
_PER_MESSAGE = {"original-envelope-id", "reporting-mta", "dsn-gateway", "received-from-mta", "arrival-date"}
_PER_RECIPIENT = {"original-recipient", "final-recipient", "action", "status", "remote-mta", "diagnostic-code",
                  "last-attempt-date", "final-log-id", "will-retry-until"}


@dataclass(frozen=True)
class Report:
    message: EmailMessage
    human: str
    per_message: dict[str, str]
    recipients: list[dict[str, str]]
    headers: EmailMessage           # the third part: the header of the message reported on
    headers_type: str


def read_report(raw: bytes) -> Report:
    """Raises `AssertionError` at the first thing that the standards do not allow."""
    for line in raw.split(b"\r\n"):
        assert len(line) <= 998
        assert b"\r" not in line
        assert b"\n" not in line
        assert b"\0" not in line
    policy = email.policy.default.clone(raise_on_defect=True, utf8=True)
    message = email.message_from_bytes(raw, policy=policy)
    assert isinstance(message, EmailMessage)
    for name in ("From", "To", "Date", "Message-ID", "Auto-Submitted", "MIME-Version"):
        assert len(message.get_all(name, [])) == 1, f"{name} once"
    assert message["Auto-Submitted"].split(";")[0] in ("auto-replied", "auto-generated")
    assert message.get_content_type() == "multipart/report"
    assert message["Content-Type"].params["report-type"] == "delivery-status"
    parts = list(message.iter_parts())
    assert len(parts) == 3, "text, status, the header (RFC 6522 3)"
    human, _, headers = parts
    assert human.get_content_type() == "text/plain"
    headers_type = headers.get_content_type()
    assert headers_type in ("text/rfc822-headers", "message/global-headers")
    boundary = f"--{message.get_boundary()}".encode()
    pieces = raw.split(b"\r\n" + boundary)
    assert len(pieces) == 5, "the boundary is nowhere else"
    assert pieces[4] in (b"--\r\n", b"--")
    head, status = pieces[2].removeprefix(b"\r\n").split(b"\r\n\r\n", 1)
    assert head.lower() == b"content-type: message/delivery-status"
    groups = [_fields(group) for group in status.decode("ascii").strip("\r\n").split("\r\n\r\n")]
    _check_message(groups[0])
    for group in groups[1:]:
        _check_recipient(group)
    assert len(groups) > 1
    _, third = pieces[3].removeprefix(b"\r\n").split(b"\r\n\r\n", 1)
    assert third.isascii() or headers_type == "message/global-headers"
    return Report(message, human.get_content(), groups[0], groups[1:],
                  email.message_from_bytes(third, policy=policy), headers_type)  # type: ignore[arg-type]


def _fields(group: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in re.sub(r"\r\n[ \t]+", " ", group).split("\r\n"):
        match = _FIELD.fullmatch(line)
        assert match is not None, f"no field: {line!r}"
        assert match[1].lower() not in found, f"{match[1]} twice"
        assert match[2].isprintable()
        found[match[1].lower()] = match[2]
    return found


def _typed(value: str) -> tuple[str, str]:
    kind, separator, rest = value.partition(";")
    assert separator
    assert re.fullmatch(r"[A-Za-z0-9-]+", kind.strip())
    return kind.strip().lower(), rest.strip()


def _check_message(fields: dict[str, str]) -> None:
    assert fields.keys() <= _PER_MESSAGE
    kind, name = _typed(fields["reporting-mta"])
    assert kind == "dns"
    assert _DOMAIN.fullmatch(name)
    if "arrival-date" in fields:
        assert parsedate_to_datetime(fields["arrival-date"]).tzinfo is not None
    assert fields.get("original-envelope-id", "x")


def _check_recipient(fields: dict[str, str]) -> None:
    assert fields.keys() <= _PER_RECIPIENT
    for name in ("final-recipient", "original-recipient"):
        if name in fields:
            kind, address = _typed(fields[name])
            assert address
            if kind == "utf-8":
                assert _UTF8_XTEXT.fullmatch(address), address
            else:
                assert kind == "rfc822" or name == "original-recipient"
    assert "final-recipient" in fields
    assert fields["action"] == "failed"
    assert _STATUS.fullmatch(fields["status"])
    assert fields["status"][0] == "5"
    if "remote-mta" in fields:
        kind, name = _typed(fields["remote-mta"])
        assert kind == "dns"
        assert _DOMAIN.fullmatch(name)
    if "diagnostic-code" in fields:
        kind, text = _typed(fields["diagnostic-code"])
        assert kind == "smtp"
        assert re.match(r"[45]\d\d(?: |$)", text)
