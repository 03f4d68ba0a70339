"""Whether this process can take mail now: the checks behind /readyz.

Each is a fixed sentence without a path, a host or an address, as whoever reaches the port may read it. What is asked of others
(a write to the store, a connection to the upstream server) is remembered for a while, so that nobody who asks often puts a load
on them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import structlog

from malote.errors import MaloteError

STORE_SECONDS = 5.0         # how long "the store can be written" counts
UPSTREAM_SECONDS = 30.0     # and "the upstream server could be reached"
AGAIN_SECONDS = 2.0         # what was not good is soon asked again
ANSWER_SECONDS = 5.0        # how long either may take to answer

log = structlog.get_logger("malote.service")


@dataclass(frozen=True, slots=True)
class Check:
    """`good` is asked each time, or, with `seconds`, not before that long has passed since the last time."""

    name: str
    fault: str                                  # what is said when it is not good
    good: Callable[[], Awaitable[bool]]
    seconds: float = 0.0


@dataclass(slots=True)
class _Known:
    at: float = -1e9
    good: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)    # many who ask at once ask once


class Health:
    """The checks and what they last said."""

    def __init__(self, checks: Mapping[str, Check]) -> None:
        self._checks = checks
        self._known = {name: _Known() for name in checks}

    async def faults(self) -> list[str]:
        """Why this process is not ready; empty: it is."""
        good = await asyncio.gather(*(self._ask(check) for check in self._checks.values()))
        return [check.fault for check, fine in zip(self._checks.values(), good, strict=True) if not fine]

    @property
    def known(self) -> dict[str, bool]:
        """What was last found, by check."""
        return {name: known.good for name, known in self._known.items()}

    async def _ask(self, check: Check) -> bool:
        known = self._known[check.name]
        async with known.lock:
            if time.monotonic() - known.at >= (check.seconds if known.good else min(check.seconds, AGAIN_SECONDS)):
                known.good = await _answer(check)
                known.at = time.monotonic()
            return known.good


async def _answer(check: Check) -> bool:
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await check.good()
    except (MaloteError, TimeoutError):
        return False
    except Exception:       # a fault of ours is no readiness either
        log.exception("readiness check failed", check=check.name)
        return False
