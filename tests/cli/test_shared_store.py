"""Two installations with one store in PostgreSQL, as their administrators see them: real commands, real daemon, real database."""

from __future__ import annotations

import json
import smtplib
from pathlib import Path

import pytest

from lab.daemon import Home
from lab.postgres import PASSWORD, Postgres
from lab.servers import Lab, free_port

ANNA, BOB = "anna@a.example", "bob@b.example"
NO_MAIL = """
[[outgoing.listeners]]
auth = "none"
[outgoing.upstream]
host = "127.0.0.1"
port = 9
security = "none"
"""


@pytest.fixture
def nodes(tmp_path: Path, postgres: Postgres) -> list[Home]:
    """The first by a socket, the second with a password."""
    name = postgres.new_database()
    one, two = Home(tmp_path / "one"), Home(tmp_path / "two")
    one.configure(NO_MAIL, store=f'url = "{postgres.url(name)}"')
    secret = two.secret("database", PASSWORD + "\n")
    two.configure(NO_MAIL, store=f'url = "postgresql://malote@127.0.0.1:{postgres.port}/{name}"\npassword_file = "{secret}"')
    return [one, two]


def test_keys_of_one_node_are_those_of_the_other(nodes: list[Home]) -> None:
    one, two = nodes
    one.keys("new", "--algorithm", "ed25519", ANNA)
    listed = json.loads(two.keys("list", "--json"))
    assert [(entry["address"], entry["own"]) for entry in listed] == [(ANNA, True)]
    two.keys("rotate", ANNA)
    again = json.loads(one.keys("list", "--json"))
    assert again[0]["sequence"] > listed[0]["sequence"]
    assert not list((one.root / "store").glob("*.sqlite"))


def test_an_empty_database_is_said(nodes: list[Home]) -> None:
    done = nodes[0].malote("keys", "list")
    assert b"the store is empty" in done.stderr


def test_check_of_a_store_in_a_database(nodes: list[Home]) -> None:
    nodes[0].keys("new", "--algorithm", "ed25519", ANNA)
    for node in nodes:
        lines = [json.loads(line) for line in node.malote("check", "--json").stdout.splitlines()]
        assert {line["state"] for line in lines if line["what"] == "store"} == {"ok"}
    nodes[1].secret("database", "the wrong one\n")
    done = nodes[1].malote("check", "--json")
    [fault] = [json.loads(line) for line in done.stdout.splitlines() if json.loads(line)["what"] == "store"]
    assert "login" in fault["text"]
    assert b"the wrong one" not in done.stdout + done.stderr


def test_a_password_in_the_configuration_is_refused(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.configure(NO_MAIL, store='url = "postgresql://malote:sesame@db.example.org/malote"')
    for command in (("check",), ("keys", "list"), ("run",)):
        done = home.malote(*command)
        assert done.returncode == 2
        assert b"holds a password" in done.stdout + done.stderr
        assert b"sesame" not in done.stdout + done.stderr


def test_two_daemons_send_with_one_store(nodes: list[Home], lab: Lab, postgres: Postgres) -> None:
    """Each seals with the one identity; the receiver sees two numberings, and no number twice."""
    sink = lab.sink()
    ports = [free_port(), free_port()]
    for node, port in zip(nodes, ports, strict=True):
        text = node.config.read_text().replace(NO_MAIL, f"""
[[outgoing.listeners]]
port = {port}
auth = "none"
[outgoing.upstream]
host = "127.0.0.1"
port = {sink.port}
security = "none"
""")
        node.config.write_text(text)
    nodes[0].keys("new", "--algorithm", "ed25519", ANNA)
    nodes[0].keys("new", "--algorithm", "ed25519", BOB)
    with nodes[0].daemon(), nodes[1].daemon():
        for number in range(3):
            for port in ports:
                with smtplib.SMTP("127.0.0.1", port) as client:
                    client.sendmail(ANNA, [BOB], f"From: {ANNA}\r\nTo: {BOB}\r\nSubject: {number} {port}\r\n\r\nhello\r\n")
    name = nodes[0].config.read_text().partition("@/")[2].partition("?")[0]
    assert postgres.execute(name, "SELECT last FROM serial").splitlines() == ["3", "3"]
    assert all(PASSWORD not in (node.root / "log").read_text() for node in nodes)
