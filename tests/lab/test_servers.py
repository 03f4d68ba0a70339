"""The lab itself: what the other tests stand on really carries mail."""

from __future__ import annotations

import imaplib
import smtplib
import time

from lab.servers import PASSWORD, Dovecot, Lab, Postfix


def wait_for_messages(dovecot: Dovecot, user: str, count: int) -> list[bytes]:
    deadline = time.monotonic() + 20
    while len(messages := dovecot.messages(user)) < count and time.monotonic() < deadline:
        time.sleep(0.05)
    return messages


def test_postfix_delivers_to_dovecot_and_imap_shows_it(lab: Lab, dovecot: Dovecot, postfix: Postfix) -> None:
    dovecot.add_user("lab-one@test.example")
    with smtplib.SMTP("127.0.0.1", postfix.port) as client:
        client.starttls(context=lab.client_tls())
        client.sendmail("alice@test.example", ["lab-one@test.example"], b"Subject: hello\r\n\r\nbody\r\n")
    [message] = wait_for_messages(dovecot, "lab-one@test.example", 1)
    assert b"Subject: hello" in message
    with imaplib.IMAP4_SSL("127.0.0.1", dovecot.imaps_port, ssl_context=lab.client_tls()) as mailbox:
        mailbox.login("lab-one@test.example", PASSWORD)
        assert mailbox.select() == ("OK", [b"1"])


def test_submission_wants_a_login_that_dovecot_knows(lab: Lab, postfix: Postfix) -> None:
    with smtplib.SMTP("127.0.0.1", postfix.submission_port) as client:
        client.starttls(context=lab.client_tls())
        client.login("alice@test.example", PASSWORD)
        assert client.noop()[0] == 250


def test_two_servers_of_a_kind_run_side_by_side(lab: Lab) -> None:
    first, second = lab.sink(), lab.sink()
    for sink in (first, second):
        with smtplib.SMTP("127.0.0.1", sink.port) as client:
            assert client.sendmail("a@a.example", ["b@b.example"], "x") == {}
