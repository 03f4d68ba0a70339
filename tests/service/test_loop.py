"""Two relays, each of which is the other's upstream server: nobody waits for ever, and nothing goes round."""

from __future__ import annotations

import smtplib
from pathlib import Path

import pytest

from lab.daemon import Home, listener, upstream
from lab.servers import free_port
from outgoing.harness import HOST, submit, text


@pytest.mark.parametrize("sender", ["alice@test.example", ""])
def test_two_relays_that_are_each_others_upstream_end_in_one_refusal(tmp_path: Path, sender: str) -> None:
    """Each asks the other what it can carry when a client says EHLO, and puts each RCPT to it: both would go on for ever. Also
    the bounce that the refusal makes of a queue in front (null sender) ends there."""
    ports = free_port(), free_port()
    homes = [Home(tmp_path / name) for name in ("one", "two")]
    for home, own, other in zip(homes, ports, ports[::-1], strict=True):
        served = listener(own, 'auth = "none"')
        home.configure(f'[outgoing]\npartial_failure = "relay"\n{upstream(other, None)}{served}')
    with homes[0].daemon() as one, homes[1].daemon() as two:
        done = submit(ports[0], sender, ["bob@test.example"], text())
        assert done.rcpts["bob@test.example"].startswith("554 5.4.6"), done
        with smtplib.SMTP(HOST, ports[1], timeout=60) as client:
            client.ehlo()
            assert client.has_extn("size"), "and who connects is served"
        for daemon in (one, two):
            assert not [record for record in daemon.records() if record.get("event") == "fault"]
            daemon.stop()
