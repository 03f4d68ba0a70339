"""Hops are counted at the top level only, and by our own name as well."""

from __future__ import annotations

import pytest

from malote.core.message import MAX_HOPS
from malote.core.trace import MAX_OWN_HOPS, check_hops, received_line
from malote.errors import MailLoop

OURS = received_line("gw.test.example", helo="mx.test.example", peer="192.0.2.1", protocol="LMTP", now_ms=1_700_000_000_000)
OTHER = b"Received: from a by b;\r\n Tue, 14 Nov 2023 22:13:20 +0000\r\n"


def test_the_line_that_we_add() -> None:
    assert OURS == (b"Received: from mx.test.example ([192.0.2.1])\r\n by gw.test.example (malote) with LMTP;\r\n"
                    b" Tue, 14 Nov 2023 22:13:20 +0000\r\n")
    unsaid = received_line("gw", helo="gr\u00fc\u00df.example", peer="", protocol="LMTP", now_ms=0)
    assert unsaid.startswith(b"Received: by gw (malote)")


@pytest.mark.parametrize(("header", "loop"), [
    (OTHER * MAX_HOPS, False), (OTHER * (MAX_HOPS + 1), True),
    (OURS * MAX_OWN_HOPS, False), (OURS * (MAX_OWN_HOPS + 1), True),
    (OURS.replace(b"Received", b"received").replace(b"\r\n by", b"\r\n\tBY") * (MAX_OWN_HOPS + 1), True),
    (OURS.replace(b"gw.test", b"other.test") * (MAX_OWN_HOPS + 1), False),
    (OTHER.replace(b"\r\n", b"\n") * (MAX_HOPS + 1), True),
    (b"X: " + b"y" * 600_000 + b"\r\n" + OTHER * (MAX_HOPS + 1), True),     # beyond what we would parse
])
def test_a_loop_is_told_by_the_header(header: bytes, loop: bool) -> None:
    message = header + b"From: a@b.example\r\n\r\ntext\r\n"
    if loop:
        with pytest.raises(MailLoop):
            check_hops(message, "gw.test.example")
    else:
        check_hops(message, "gw.test.example")


def test_lines_of_a_forwarded_message_below_do_not_count() -> None:
    check_hops(b"From: a@b.example\r\n\r\n" + OTHER * 100, "gw.test.example")
