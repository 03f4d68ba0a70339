"""The one timer of a connection: moved with each command, seldom fires, and moving it costs no timer of the event loop."""

from __future__ import annotations

import asyncio


class Timed:
    """Mixed into both ends of the proxy. A base class, not an object beside: that would refer back to its connection, and each
    closed connection would wait for the garbage collector. Times are loop time, in seconds."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._deadline = 0.0        # may be moved later by assignment
        self._timer: asyncio.TimerHandle | None = None
        self._fires = 0.0           # uvloop's handle for "now" has no `when`

    def timed_out(self) -> None:
        """The deadline has come."""
        raise NotImplementedError

    def start_timer(self, seconds: float) -> None:
        """That many seconds from now, whatever it was before. The handle is left alone if the deadline only moves later."""
        self._deadline = self.loop.time() + seconds
        if self._timer is None or self._fires > self._deadline:
            if self._timer is not None:
                self._timer.cancel()
            self._set_timer()

    def stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self) -> None:
        self._fires = self._deadline
        self._timer = self.loop.call_at(self._deadline, self._tick)

    def _tick(self) -> None:
        self._timer = None
        if self.loop.time() < self._deadline:
            self._set_timer()
        else:
            self.timed_out()
