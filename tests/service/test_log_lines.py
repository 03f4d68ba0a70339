"""Lines that are held a moment on the event loop: none is lost, none overtakes another, the worse ones do not wait."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
import threading

from malote.logs import Lines


class File(io.StringIO):
    """Counts what would be system calls."""

    def __init__(self) -> None:
        super().__init__()
        self.flushes = 0

    def flush(self) -> None:
        self.flushes += 1


async def test_lines_of_a_moment_leave_together_and_in_order() -> None:
    file = File()
    lines = Lines(file, held=True)
    for number in range(100):
        lines.info(str(number))
    assert file.getvalue() == ""
    while not file.getvalue():
        await asyncio.sleep(0.01)
    assert file.getvalue().split() == [str(number) for number in range(100)]
    assert file.flushes == 1
    lines.info("later")
    while "later" not in file.getvalue():
        await asyncio.sleep(0.01)


async def test_a_warning_takes_along_what_is_before_it() -> None:
    file = File()
    lines = Lines(file, held=True)
    lines.info("one")
    lines.warning("two")
    assert file.getvalue() == "one\ntwo\n"


async def test_a_thread_does_not_wait() -> None:
    """It has no event loop to come back to: the store's thread logs that it cannot write."""
    file = File()
    lines = Lines(file, held=True)
    await asyncio.to_thread(lines.info, "from a thread")
    assert file.getvalue() == "from a thread\n"


async def test_none_is_lost_between_threads() -> None:
    file = File()
    lines = Lines(file, held=True)
    threads = [threading.Thread(target=lambda: [lines.warning("x") for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(500):
        lines.info("y")
    for thread in threads:
        thread.join()
    lines.flush()
    assert (file.getvalue().count("x\n"), file.getvalue().count("y\n")) == (2000, 500)


def test_without_holding_each_line_leaves_at_once() -> None:
    file = File()
    Lines(file, held=False).info("now")
    assert file.getvalue() == "now\n"


async def test_a_log_that_cannot_be_written_stops_nothing() -> None:
    class Broken(File):
        def write(self, _: str) -> int:
            raise BrokenPipeError
    Lines(Broken(), held=True).error("nobody reads this")


def test_the_last_lines_are_written_at_the_end_of_the_process() -> None:
    code = ("import asyncio, structlog\nfrom malote.config import LogConfig\nfrom malote.logs import configure_logs\n"
            "configure_logs(LogConfig(format='json'), held=True)\n"
            "async def main(): structlog.get_logger('malote').info('the last')\nasyncio.run(main())\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert '"event": "the last"' in done.stderr
