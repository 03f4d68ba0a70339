"""The log: one structured line per message, on stderr; JSON for machines, text for people.

What never enters it: text, subjects, header values, keys, credentials. Addresses only under `log.addresses`; modules pass them
in fields named `addresses`, `sender`, `recipients`, `login`, which are dropped here otherwise, so that forgetting the setting
somewhere cannot leak them. Records of the standard library's logging go the same way; of those that are not ours only the first
words and the places of the exception are kept, since libraries put what they were given into their messages.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import re
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from typing import Any, TextIO

import structlog

from malote.config import LogConfig
from malote.terminal import fitted

ADDRESS_FIELDS = ("address", "addresses", "sender", "recipient", "recipients", "login", "username", "mail_from", "rcpt_to")
# aiosmtpd logs DATA lines and AUTH on "mail.log" and "mail.debug", aioimaplib each chunk received on its own
SILENCED = ("mail.log", "mail.debug", "mail", "aioimaplib", "asyncio", "sqlalchemy", "alembic")
OURS = "malote"
BLOCK_CHARS = 4096      # written at once: other workers write to the same pipe, and PIPE_BUF bytes do not mix (pipe(7))
HOLD_SECONDS = 0.05     # how long lines wait on a busy event loop for others: writing each costs more than making it
_WORDS = re.compile(r"[A-Za-z][A-Za-z ,-]{0,59}")      # ends before the first value: a repr, a quote, a number


class Lines:
    """Where the lines go. With `held`, those from the event loop up to `info` leave together, shortly after, in order; what is
    worse leaves at once, and so does everything at the end of the process. A crash can lose lines that were held, no message."""

    def __init__(self, file: TextIO, *, held: bool) -> None:
        self._file = file
        self._held = held
        self._lines: list[str] = []
        self._lock = threading.RLock()     # a destructor may log while a line is being written
        self._waiting = False

    def say(self, line: str) -> None:
        loop = asyncio._get_running_loop() if self._held else None      # None in other threads
        if loop is None:
            self.urgent(line)
            return
        with self._lock:
            self._lines.append(line)
        if not self._waiting:
            self._waiting = True
            loop.call_later(HOLD_SECONDS, self.flush)

    def urgent(self, line: str) -> None:
        with self._lock:
            self._lines.append(line)
            self.flush()

    def flush(self) -> None:
        self._waiting = False
        with self._lock, suppress(OSError, ValueError):     # a log that cannot be written, or was closed, does not stop the mail
            lines, self._lines = self._lines, []
            for block in _blocks(lines):
                self._file.write(block)
                self._file.flush()

    debug = info = msg = log = say      # structlog calls the method of the level
    warning = warn = error = err = critical = fatal = failure = exception = urgent


def _blocks(lines: list[str]) -> Iterator[str]:
    """Whole lines, up to BLOCK_CHARS together; a longer one goes alone."""
    block = ""
    for line in lines:
        if block and len(block) + len(line) >= BLOCK_CHARS:
            yield block
            block = ""
        block += line + "\n"
    if block:
        yield block


_lines: Lines | None = None
_encode = json.JSONEncoder(default=repr).encode     # made once: json.dumps with a default makes one for each line


@atexit.register
def flush_logs() -> None:
    """Write the lines that are held."""
    if _lines is not None:
        _lines.flush()


def configure_logs(config: LogConfig, *, held: bool = False) -> None:
    """Set up structlog and the standard library's logging; may be called again (SIGHUP). `held`: see `Lines`."""
    global _lines
    flush_logs()
    lines = _lines = Lines(sys.stderr, held=held)
    level = getattr(logging, config.level.upper())
    text = config.format == "text" or (config.format == "auto" and sys.stderr.isatty())
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        _stamp,
    ]
    if not config.addresses:
        processors.append(_drop_addresses)
    processors.append(_name_exceptions)
    processors.append(_for_people() if text else structlog.processors.JSONRenderer(serializer=lambda event, **_: _encode(event)))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: lines,
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=logging.WARNING, handlers=[_IntoOurs()], force=True)
    logging.getLogger(OURS).setLevel(level)
    for name in SILENCED:
        logging.getLogger(name).setLevel(logging.WARNING)


def _for_people() -> Any:
    """Text, broken between words where the terminal is narrower than the line."""
    stream = sys.stderr
    render = structlog.dev.ConsoleRenderer(colors=stream.isatty(), pad_event_to=0)
    return lambda logger, method, event: fitted(str(render(logger, method, event)), stream, indent=4)


def hook_uncaught() -> None:
    """What nobody caught, in threads and destructors, is logged like everything else: Python would print its text."""
    threading.excepthook = lambda what: _uncaught("thread failed", what.exc_value)
    sys.unraisablehook = lambda what: _uncaught("error in a destructor", what.exc_value)


def _uncaught(event: str, error: BaseException | None) -> None:
    structlog.get_logger("malote").error(event, exc_info=error)


class _IntoOurs(logging.Handler):
    """Records of the standard library's logging, made into events of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == OURS or record.name.startswith(OURS + "."):
            event = record.getMessage()
        else:
            words = _WORDS.match(str(record.msg))
            event = words[0].strip() if words else "(message withheld)"
        structlog.get_logger(record.name).log(record.levelno, event, logger=record.name, exc_info=record.exc_info)


_second = (-1, "")


def _stamp(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """ISO 8601, UTC, to the microsecond, as structlog's TimeStamper at a third of its cost: a second is spelled out once."""
    global _second
    second, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    spelled = _second                   # one look: other threads log too
    if spelled[0] != second:
        spelled = _second = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
    event["timestamp"] = f"{spelled[1]}.{nanoseconds // 1000:06}Z"
    return event


def _drop_addresses(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name in ADDRESS_FIELDS:
        event.pop(name, None)
    return event


def _name_exceptions(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """An exception becomes the names of its classes and the places in our code: its text may hold what must not be logged."""
    error = event.pop("exc_info", None)
    if error is True:
        error = sys.exc_info()[1]
    elif isinstance(error, tuple):
        error = error[1]
    if isinstance(error, BaseException):
        chain: list[str] = []
        seen: BaseException | None = error
        while seen is not None and len(chain) < 5:
            place, trace = "", seen.__traceback__
            while trace is not None:
                place = f"{trace.tb_frame.f_globals.get('__name__', '?')}:{trace.tb_lineno}"
                trace = trace.tb_next
            chain.append(f"{type(seen).__name__}@{place}")
            seen = seen.__cause__ or seen.__context__
        event["cause"] = " < ".join(chain)
    return event
