"""A watcher in a process of its own that is killed (SIGKILL) at a chosen step of its first batch.

    python crash.py STORE PORT USER DELIVER IDENTITY STEP

IDENTITY is a file with the serialized identity. The exit code is -9 if the step was reached.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from malote.config import AccountConfig
from malote.core.identity import parse_identity
from malote.incoming.account import account_keys, device_name
from malote.incoming.mailbox import Mailbox
from malote.incoming.maildir import MaildirDelivery
from malote.incoming.watcher import Watcher
from malote.store import Store

# step -> (class, method, whether the kill comes after it)
STEPS: dict[str, tuple[type, str, bool]] = {
    "before the judgement": (Store, "judge", False),
    "judged": (Store, "judge", True),
    "stored": (Mailbox, "append_many", True),
    "written": (MaildirDelivery, "deliver", True),
    "before the move": (Mailbox, "move", False),
    "moved": (Mailbox, "move", True),
    "marked": (Store, "mark_delivered", True),
}


def kill_at(step: str) -> None:
    owner, name, after = STEPS[step]
    method: Callable[..., Any] = getattr(owner, name)

    async def replaced(*arguments: Any, **options: Any) -> Any:
        if after:
            await method(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.sleep(60)

    setattr(owner, name, replaced)


async def main(place: str, port: str, user: str, deliver: str, identity: str, step: str) -> None:
    store = await Store.open(Path(place))
    keys = account_keys([parse_identity(Path(identity).read_bytes())], (user,))
    account = AccountConfig(name="box", host="127.0.0.1", port=int(port), security="none", username=user, folders=("INBOX",),
                            deliver=deliver, maildir=Path(place).parent / "maildir")    # type: ignore[arg-type]

    async def password() -> str:
        return "secret"

    watcher = Watcher(account, store=store, keys=lambda: keys, device=device_name(await store.local_key("device")),
                      password=password)
    kill_at(step)
    await watcher.run_once()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
