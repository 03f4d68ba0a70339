"""Every error malote raises, with the SMTP reply it becomes and the exit code of the command it ends.

An error has two readers. The peer or the person at the terminal sees `reply` or `str(error)`: what happened, what was not
done, what to do next; never a path of the server, key material, message text or the text of a foreign exception. The cause
goes to the log, by `raise ... from`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the `malote` command, documented in docs/operating.md."""

    OK = 0
    FAILED = 1          # temporary or unknown: trying again may help
    CONFIG = 2          # configuration or usage: trying again does not help (systemd: RestartPreventExitStatus=2)
    UNREADABLE = 3      # a message that cannot be opened
    NOT_FRESH = 4       # opened, but the verdict is not FRESH
    KEY = 5             # a key or card is missing, refused, or locked
    STORE = 6           # the store cannot be read or written
    CHECK = 7           # `malote check` found something to mend


@dataclass(frozen=True, slots=True)
class Reply:
    """One SMTP reply (RFC 5321 4.2, RFC 3463). `text` may hold several lines, split by LF."""

    code: int
    enhanced: str       # "" for replies that carry none (354, EHLO, upstream replies without one)
    text: str

    @property
    def temporary(self) -> bool:
        return 400 <= self.code < 500

    def __str__(self) -> str:
        prefix = f"{self.enhanced} " if self.enhanced else ""
        if "\n" not in self.text:
            return f"{self.code} {prefix}{self.text}"
        lines = self.text.split("\n")
        return "\r\n".join(
            f"{self.code}{'-' if number < len(lines) else ' '}{prefix}{line}" for number, line in enumerate(lines, 1)
        )


class MaloteError(Exception):
    """Root of the tree. Unknown means temporary: the mail stays queued at the sender."""

    default_reply = Reply(451, "4.3.0", "Local error, nothing was sent, try again later")
    exit_code = ExitCode.FAILED

    def __init__(self, message: str = "", *, reply: Reply | None = None, hint: str = "") -> None:
        super().__init__(message or self.default_reply.text)
        self._reply = reply
        self.hint = hint    # what the person can do next; the command line prints it on a line of its own

    @property
    def reply(self) -> Reply:
        return self._reply or self.default_reply


class ConfigError(MaloteError):
    """The configuration file is wrong; the message names file and key."""

    exit_code = ExitCode.CONFIG


class CryptoUnsupported(ConfigError):
    """The cryptography library here was built without the post-quantum algorithms."""


class FormatError(MaloteError):
    """Bytes that do not follow the format they should: an address, a card, a message header."""

    default_reply = Reply(554, "5.6.0", "Message cannot be processed, nothing was sent")


class Unreadable(MaloteError):
    """A sealed message that cannot be opened. One outward failure, whatever the reason (docs/format.md, Errors).

    The reason is for the local log only; it holds no plain text and no key.
    """

    default_reply = Reply(554, "5.6.0", "Message cannot be opened")
    exit_code = ExitCode.UNREADABLE

    def __init__(self, reason: str = "") -> None:
        super().__init__("cannot be opened (no matching key, or damaged)")
        self.reason = reason


class BadSignature(MaloteError):
    """A signature does not verify. Internal to core: becomes a verdict or a refused card."""

    exit_code = ExitCode.KEY


class KeyMissing(MaloteError):
    """No card for a recipient, or no identity for a sender."""

    default_reply = Reply(550, "5.7.1", "No encryption key for this recipient, nothing was sent")
    exit_code = ExitCode.KEY


class KeyRefused(MaloteError):
    """A card or key file that is not accepted: damaged, wrongly signed, or a change its predecessor did not sign."""

    default_reply = Reply(550, "5.7.1", "The encryption key of this recipient is not accepted, nothing was sent")
    exit_code = ExitCode.KEY


class KeysLocked(MaloteError):
    """The private keys cannot be unlocked: wrong passphrase, missing or too open key file."""

    exit_code = ExitCode.KEY


class PolicyRefused(MaloteError):
    """A rule forbids to send this; the reply names the recipients and the reason."""

    default_reply = Reply(550, "5.7.1", "Refused by policy, nothing was sent")


class SenderRefused(MaloteError):
    """The From address is not one that this login may have signed."""

    default_reply = Reply(550, "5.7.1", "This login may not sign for the From address, nothing was sent")


class MailLoop(MaloteError):
    default_reply = Reply(554, "5.4.6", "Too many hops, this message is in a loop")


class TooBusy(MaloteError):
    """The memory budget or another limit is used up for the moment."""

    default_reply = Reply(452, "4.3.1", "Too much mail at once, try again later")


class ClockWrong(MaloteError):
    """The clock is before the last signed timestamp by more than a day, or before this version was made."""

    default_reply = Reply(451, "4.3.0", "The clock of this server is wrong, nothing was sent, try again later")


class SentElsewhere(MaloteError):
    """Another process that shares the store is sending the very same message now."""

    default_reply = Reply(451, "4.3.0", "The same message is being sent already, try again later")


class LeaseLost(MaloteError):
    """What this process had to itself among those that share the store may be another's now."""

    default_reply = Reply(451, "4.3.0", "Another server has taken this over, try again later")


class SecretUnavailable(MaloteError):
    """A password file, credential or token command that gives nothing, or is open to others. It may be mended while we run."""

    exit_code = ExitCode.CONFIG


class StoreUnavailable(MaloteError):
    """Disk full, locked, read-only or damaged store."""

    default_reply = Reply(451, "4.3.0", "Storage is not available, nothing was sent, try again later")
    exit_code = ExitCode.STORE


class Contended(StoreUnavailable):
    """Another process changed in between what an operation of the store had read: run again, it sees that. Only on PostgreSQL."""


class CommitInDoubt(StoreUnavailable):
    """The answer of the database to COMMIT did not come: written or not, both are possible."""


class NotProven(MaloteError):
    """What was about to leave is not what was decided: a fault of ours, stopped by the last check. The text names the piece."""

    default_reply = Reply(451, "4.3.0", "The message failed the last check before sending, nothing was sent, try again later")


class AuditUnavailable(MaloteError):
    """The audit log cannot be written, and nothing may leave without it (`audit.required`)."""

    default_reply = Reply(451, "4.3.0", "The audit log cannot be written, nothing was sent, try again later")


class UpstreamError(MaloteError):
    """The upstream server cannot be reached, or the connection broke. `in_doubt`: after our final dot, before its reply."""

    default_reply = Reply(451, "4.4.1", "The next mail server cannot be reached, nothing was sent, try again later")

    def __init__(self, message: str = "", *, reply: Reply | None = None, hint: str = "", in_doubt: bool = False) -> None:
        super().__init__(message, reply=reply, hint=hint)
        self.in_doubt = in_doubt


class UpstreamRefused(UpstreamError):
    """The upstream server's own refusal, passed on with its code and text."""

    def __init__(self, reply: Reply) -> None:
        super().__init__("the next mail server refused", reply=reply)


class MailboxError(MaloteError):
    """An IMAP command was answered NO or BAD, or the server lacks what we need. `code` is its response code, as OVERQUOTA."""

    def __init__(self, message: str = "", *, code: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code


class MailboxLost(MailboxError):
    """The IMAP connection is gone; the state of a command under way is unknown."""


@contextmanager
def map_exceptions(table: Mapping[type[BaseException], type[MaloteError]]) -> Iterator[None]:
    """Translate foreign exceptions at a border, once: the new error has its own text, the cause stays for the log."""
    try:
        yield
    except tuple(table) as error:
        for foreign, ours in table.items():
            if isinstance(error, foreign):
                raise ours() from error
        raise
