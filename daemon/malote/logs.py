"""The log: one structured line per message, on stderr; JSON for machines, text for people.

What never enters it: text, subjects, header values, keys, credentials. Addresses only under `log.addresses`; modules pass them
in fields named `addresses`, `sender`, `recipients`, `login`, which are dropped here otherwise, so that forgetting the setting
somewhere cannot leak them. Records of the standard library's logging go the same way; of those that are not ours only the first
words and the places of the exception are kept, since libraries put what they were given into their messages.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import MutableMapping
from typing import Any

import structlog

from malote.config import LogConfig

ADDRESS_FIELDS = ("address", "addresses", "sender", "recipient", "recipients", "login", "username", "mail_from", "rcpt_to")
# aiosmtpd logs DATA lines and AUTH on "mail.log" and "mail.debug", aioimaplib each chunk received on its own
SILENCED = ("mail.log", "mail.debug", "mail", "aioimaplib", "asyncio", "sqlalchemy", "alembic")
OURS = "malote"
_WORDS = re.compile(r"[A-Za-z][A-Za-z ,-]{0,59}")      # ends before the first value: a repr, a quote, a number


def configure_logs(config: LogConfig) -> None:
    """Set up structlog and the standard library's logging; may be called again (SIGHUP)."""
    level = getattr(logging, config.level.upper())
    text = config.format == "text" or (config.format == "auto" and sys.stderr.isatty())
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if not config.addresses:
        processors.append(_drop_addresses)
    processors.append(_name_exceptions)
    processors.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()) if text else structlog.processors.JSONRenderer())
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=logging.WARNING, handlers=[_IntoOurs()], force=True)
    logging.getLogger(OURS).setLevel(level)
    for name in SILENCED:
        logging.getLogger(name).setLevel(logging.WARNING)


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
