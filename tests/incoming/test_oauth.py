"""Logins by token at a real Dovecot, which checks the tokens itself."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from lab.imap_peers import secret
from lab.incoming import Box, verdicts
from lab.oauth import access_token, oauth_settings
from lab.servers import Dovecot, Lab
from malote.errors import MailboxError
from malote.incoming.mailbox import Mailbox

ANNA, BEN = f"anna-{uuid.uuid4().hex}@test.example", f"ben-{uuid.uuid4().hex}@test.example"


@pytest.fixture(scope="module")
def oauth(lab: Lab) -> Dovecot:
    return lab.dovecot([ANNA, BEN], extra=oauth_settings(lab.root / uuid.uuid4().hex))


@pytest.fixture
async def anna(oauth: Dovecot, tmp_path: Path) -> AsyncIterator[Box]:
    box = Box(oauth, tmp_path, ANNA)
    for uid in box.client.uids():
        box.client.imap.uid("STORE", str(uid), "+FLAGS", "\\Deleted")
    box.client.imap.expunge()
    yield box
    await box.close()


@pytest.fixture
def token(tmp_path: Path) -> Path:
    """What the token command prints."""
    return tmp_path / "token"


@pytest.mark.parametrize("auth", ["auto", "xoauth2", "oauthbearer"])
@pytest.mark.parametrize("security", ["tls", "starttls"])
async def test_mail_is_opened_after_a_login_by_token(lab: Lab, anna: Box, token: Path, auth: str, security: str) -> None:
    """The whole way; the command is asked anew for each connection, for tokens live an hour."""
    watcher = await anna.watcher(
        await anna.open_store(), auth=auth, token_command=("cat", str(token)), host="localhost", security=security,
        port=anna.dovecot.imaps_port if security == "tls" else anna.dovecot.port, ca_file=lab.certificate)
    for number in (1, 2):
        token.write_text(access_token(ANNA, good_for_seconds=600 * number))
        anna.client.put(anna.seal())
        await watcher.run_once()
        assert verdicts(anna.client.messages()) == ["FRESH"] * number
    method = {"auto": "OAUTHBEARER"}.get(auth, auth.upper())
    assert f"user=<{ANNA}>, method={method}" in anna.dovecot.log.read_text()


@pytest.mark.parametrize("auth", ["xoauth2", "oauthbearer"])
@pytest.mark.parametrize("wrong", [
    pytest.param(access_token(ANNA, key=b"another"), id="forged"),
    pytest.param(access_token(ANNA, good_for_seconds=-60), id="expired"),
    pytest.param(access_token(BEN), id="somebody else's"),
    pytest.param("no-token-at-all", id="garbage"),
])
async def test_a_refused_token(anna: Box, token: Path, auth: str, wrong: str) -> None:
    """No login, no hanging; what is said names the account and the cure, and not the token; nor does the log."""
    token.write_text(wrong)
    settings: dict[str, Any] = {"auth": auth, "token_command": ("cat", str(token))}
    with pytest.raises(MailboxError) as caught:
        await Mailbox.connect(anna.config(**settings), password=secret)
    assert caught.value.code == "AUTHENTICATIONFAILED"
    assert "token_command" in caught.value.hint
    with structlog.testing.capture_logs() as logs, contextlib.suppress(MailboxError):
        await (await anna.watcher(await anna.open_store(), **settings)).run_once()
    for piece in wrong.split("."):
        assert piece not in f"{caught.value!r} {caught.value} {caught.value.hint} {logs!r}"
