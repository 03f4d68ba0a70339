"""Real mail clients see an opened message as any other: subject, date, flags, threading, attachments."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path

import pytest

from lab.incoming import Box, note
from lab.servers import PASSWORD, Lab

ATTACHMENT = bytes(range(256)) * 40


def with_attachment(to: str) -> bytes:
    message = EmailMessage(policy=policy.SMTP)
    message["From"], message["To"], message["Subject"] = "Anna Müller <anna@sender.example>", to, "Die Rechnung für März"
    message["Date"] = "Mon, 23 Nov 2026 10:00:00 +0100"
    message["Message-ID"], message["In-Reply-To"] = "<answer@sender.example>", "<question@test.example>"
    message["References"] = "<question@test.example>"
    message.set_content("Schöne Grüße\n")
    message.add_attachment(ATTACHMENT, maintype="application", subtype="octet-stream", filename="rechnung.bin")
    return message.as_bytes()


def files_of(maildir: Path) -> list[Path]:
    return [path for part in ("new", "cur") for path in (maildir / part).iterdir()]


async def run(*command: str, home: Path) -> str:
    """A client's output. Fails with its error text."""
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=60, check=False,
                                   env={**os.environ, "HOME": str(home), "TERM": "xterm", "LC_ALL": "C.UTF-8"})
    assert done.returncode == 0, (done.stderr + done.stdout).decode(errors="replace")[-2000:]
    return done.stdout.decode(errors="replace")


@pytest.fixture
async def opened(box: Box) -> Box:
    """A question in clear, and the sealed answer with an attachment, opened."""
    question = note("question", to="anna@sender.example", sender=box.user)
    box.client.put(re.sub(rb"Message-ID: <[^>]*>", b"Message-ID: <question@test.example>", question), flags="(\\Seen)")
    box.client.put(box.seal(with_attachment(box.user)), flags="(\\Flagged)", date="23-Nov-2026 09:00:05 +0000")
    await (await box.watcher(await box.open_store())).run_once()
    return box


@pytest.mark.skipif(shutil.which("mbsync") is None, reason="mbsync is not installed")
async def test_mbsync(lab: Lab, opened: Box, tmp_path: Path) -> None:
    """The whole mailbox synchronised to a Maildir, as with any other mail; and a flag set there comes back."""
    (tmp_path / "rc").write_text(f"""
IMAPAccount a
Host 127.0.0.1
Port {opened.dovecot.port}
User {opened.user}
Pass {PASSWORD}
SSLType None

IMAPStore far
Account a

MaildirStore near
Path {tmp_path}/mail/
Inbox {tmp_path}/mail/INBOX
SubFolders Verbatim

Channel c
Far :far:
Near :near:
Patterns INBOX Malote/*
Create Near
Sync All
CopyArrivalDate yes
SyncState *
""")
    (tmp_path / "mail").mkdir()
    await run("mbsync", "-c", str(tmp_path / "rc"), "-a", home=tmp_path)
    messages = {message["Subject"]: (path, message) for path in files_of(tmp_path / "mail" / "INBOX")
                if (message := message_from_bytes(path.read_bytes(), policy=policy.default))}
    path, message = messages["Die Rechnung für März"]
    assert message["References"] == "<question@test.example>"
    assert next(message.iter_attachments()).get_content() == ATTACHMENT
    assert "F" in path.name.rpartition(":2,")[2]
    assert len(files_of(tmp_path / "mail" / "Malote" / "Sealed")) == 1
    path.rename(path.parent.parent / "cur" / (path.name.partition(":2,")[0] + ":2,FRS"))
    await run("mbsync", "-c", str(tmp_path / "rc"), "-a", home=tmp_path)
    opened.client.select()
    assert opened.client.status_of(opened.client.uids()[-1])[0] == {"\\Flagged", "\\Answered", "\\Seen"}


@pytest.mark.skipif(shutil.which("neomutt") is None, reason="neomutt is not installed")
async def test_neomutt(opened: Box, tmp_path: Path) -> None:
    """Threads the opened answer below the question, shows subject and date, and saves the attachment."""
    (tmp_path / "rc").write_text(f"""
set imap_user="{opened.user}" imap_pass="{PASSWORD}" ssl_starttls=no ssl_force_tls=no
set folder="imap://127.0.0.1:{opened.dovecot.port}/" spoolfile="imap://127.0.0.1:{opened.dovecot.port}/INBOX"
set header_cache="" message_cachedir="" sort=threads wait_key=no mark_old=no
set tmpdir="{tmp_path}" charset=utf-8 index_format="%Z|%D|%s" date_format="%Y-%m-%d" attribution=""
""")
    script = (f"push <last-entry><view-attachments><last-entry><save-entry><kill-line>{tmp_path}/saved<enter>"
              "<exit><quit>")
    await run("script", "-qec", f"neomutt -n -F {tmp_path}/rc -e '{script}'", f"{tmp_path}/screen", home=tmp_path)
    assert (tmp_path / "saved").read_bytes() == ATTACHMENT
    screen = (tmp_path / "screen").read_text(errors="replace")
    assert re.search("->|─>", screen), "drawn as the answer in a thread"
    assert "Die Rechnung für März" in screen


async def test_curl(opened: Box, tmp_path: Path) -> None:
    """Searches and fetches like any client: the subject that nobody saw on the way can be searched for."""
    url = f"imap://127.0.0.1:{opened.dovecot.port}/INBOX"
    search = 'SEARCH HEADER In-Reply-To "<question@test.example>" FLAGGED ON 23-Nov-2026'
    found = await run("curl", "-sS", "-u", f"{opened.user}:{PASSWORD}", url, "-X", search, home=tmp_path)
    number = found.split()[-1]
    raw = await run("curl", "-sS", "-u", f"{opened.user}:{PASSWORD}", f"{url};MAILINDEX={number}", home=tmp_path)
    message = message_from_bytes(raw.encode(), policy=policy.default)
    assert message["Subject"] == "Die Rechnung für März"
    assert "Schöne Grüße" in message.get_body().get_content()
