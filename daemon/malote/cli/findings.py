"""What `malote check` found out about one thing, and how an error becomes that."""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum

from malote.errors import MaloteError

Findings = AsyncIterator["Finding"]


class State(StrEnum):
    OK = "ok"
    WARNING = "warning"     # works, or could not be tried here; worth knowing
    FAULT = "fault"         # the daemon cannot do its work


@dataclass(frozen=True, slots=True)
class Finding:
    what: str               # "store", "account anna: login"
    state: State
    text: str
    cure: str = ""


def ok(what: str, text: str) -> Finding:
    return Finding(what, State.OK, text)


def warning(what: str, text: str, cure: str = "") -> Finding:
    return Finding(what, State.WARNING, text, cure)


def fault(what: str, error: MaloteError, cure: str = "") -> Finding:
    """With the reason that the operating system or TLS gave, which the text for peers leaves out."""
    text, cause = str(error), error.__cause__
    reason = ""
    if isinstance(cause, ssl.SSLCertVerificationError):
        reason = cause.verify_message
    elif isinstance(cause, OSError):
        number = cause.errno or 0       # getaddrinfo's are negative; asyncio's own text repeats address and port
        reason = os.strerror(number) if number > 0 else cause.strerror or type(cause).__name__
    if reason and reason not in text:
        text += f" ({reason})"
    return Finding(what, State.FAULT, text, error.hint or cure)
