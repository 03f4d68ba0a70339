"""`malote run`, killed (SIGKILL) once at a chosen step of its opening listener.

    MALOTE_TEST_STEP=... python killed.py --config FILE run
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from malote.cli.main import main
from malote.incoming.turns import Turn, Turns
from malote.store import Store

STEPS = ("taken by the next server", "written down", "judged")


def kill_at(step: str) -> None:
    delivered, mark_delivered, judge = Turns.delivered, Store.mark_delivered, Store.judge

    async def before(self: Turns, turn: Turn) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        await delivered(self, turn)

    async def after(self: Store, row_id: int) -> None:
        await mark_delivered(self, row_id)
        os.kill(os.getpid(), signal.SIGKILL)

    async def judged(self: Store, *arguments: Any, **options: Any) -> Any:
        await judge(self, *arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    if step == STEPS[2]:
        Store.judge = judged            # type: ignore[method-assign]
    elif step == STEPS[0]:
        Turns.delivered = before        # type: ignore[method-assign]
    elif step == STEPS[1]:
        Store.mark_delivered = after    # type: ignore[method-assign]


if __name__ == "__main__":
    kill_at(os.environ.get("MALOTE_TEST_STEP", ""))
    sys.exit(main())
