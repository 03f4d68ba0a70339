"""kill -9 at every step of a batch: the next run finishes it, and nothing is lost, doubled or called a repeat."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from email import message_from_bytes
from pathlib import Path

import pytest

from lab import crash
from lab.incoming import QUARANTINE, SEALED, Box, note, verdicts
from malote.core.identity import serialize_identity

IMAP_STEPS = ["before the judgement", "judged", "stored", "before the move", "moved", "marked"]
COUNT = 3


async def killed(box: Box, tmp_path: Path, deliver: str, step: str) -> None:
    """Put COUNT sealed messages there and have a watcher killed over them."""
    store = await box.open_store()
    await store.close()
    box.stores.clear()
    for number in range(COUNT):
        box.client.put(box.seal(note(f"number {number}", to=box.user)))
    identity = tmp_path / "identity"
    identity.write_bytes(serialize_identity(box.identity))
    root = Path(__file__).parents[2]
    command = [sys.executable, crash.__file__, str(tmp_path / "device"), str(box.dovecot.port), box.user, deliver,
               str(identity), step]
    paths = os.pathsep.join((str(root / "daemon"), str(root / "tests")))
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, check=False, timeout=60,
                                   env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]


@pytest.mark.parametrize("step", IMAP_STEPS)
@pytest.mark.parametrize("deliver", ["replace", "folder"])
async def test_imap_delivery(box: Box, tmp_path: Path, deliver: str, step: str) -> None:
    await killed(box, tmp_path, deliver, step)
    store = await box.open_store(card=False)
    await (await box.watcher(store, deliver=deliver)).run_once()
    opened = box.client.messages("INBOX" if deliver == "replace" else "Malote/Opened")
    assert sorted(message["Subject"] for message in opened) == ["number 0", "number 1", "number 2"]
    assert verdicts(opened) == ["FRESH"] * COUNT
    assert len(box.client.uids(SEALED)) == COUNT
    assert box.client.uids(QUARANTINE) == []
    assert len(box.client.uids()) == (COUNT if deliver == "replace" else 0)


@pytest.mark.parametrize("step", ["before the judgement", "judged", "written", "before the move", "moved", "marked"])
async def test_maildir_delivery(box: Box, tmp_path: Path, step: str) -> None:
    await killed(box, tmp_path, "maildir", step)
    store = await box.open_store(card=False)
    await (await box.watcher(store, deliver="maildir", maildir=tmp_path / "maildir")).run_once()
    files = [path for part in ("new", "cur") for path in (tmp_path / "maildir" / part).iterdir()]
    messages = [message_from_bytes(path.read_bytes()) for path in files]
    assert sorted(message["Subject"] for message in messages) == ["number 0", "number 1", "number 2"]
    assert verdicts(messages) == ["FRESH"] * COUNT
    assert len(box.client.uids(SEALED)) == COUNT
    assert box.client.uids() == []
    assert list((tmp_path / "maildir" / "tmp").iterdir()) == []
