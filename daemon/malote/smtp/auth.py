"""The client's side of an AUTH exchange (RFC 4954): argument and answers decoded, cancellation told apart."""

from __future__ import annotations

import base64
import binascii

from malote.errors import Reply

MAX_AUTH_FAILURES = 3       # per connection; guessing is the upstream's to slow down, this keeps us from being its amplifier

ABORTED = Reply(501, "5.7.0", "Authentication cancelled")
NOT_BASE64 = Reply(501, "5.5.2", "Not base64")


class AuthFault(Exception):
    """The exchange ends here with that reply."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.text)
        self.reply = reply


def parse_auth(argument: str) -> tuple[str, bytes | None]:
    """`MECHANISM [initial-response]` -> name in capitals (they are case-insensitive, RFC 4422 3.1) and decoded response.

    `=` is a response of length zero. Raises `AuthFault`.
    """
    mechanism, _, rest = argument.strip().partition(" ")
    if not mechanism or " " in rest.strip():
        raise AuthFault(Reply(501, "5.5.4", "Syntax: AUTH mechanism [initial-response]"))
    if not rest.strip():
        return mechanism.upper(), None
    return mechanism.upper(), b"" if rest.strip() == "=" else decode_answer(rest.strip().encode(errors="surrogateescape"))


def decode_answer(line: bytes) -> bytes:
    """Raises `AuthFault` for `*` and for what is not base64."""
    if line == b"*":
        raise AuthFault(ABORTED)
    try:
        return base64.b64decode(line, validate=True)
    except (binascii.Error, ValueError):
        raise AuthFault(NOT_BASE64) from None
