"""The configuration: strict, every fault at once, and an example file that cannot drift from the code."""

from __future__ import annotations

import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from malote.config import Config, Security, UpstreamConfig, load_config, parse_config
from malote.config_faults import config_faults
from malote.errors import ConfigError, ExitCode

EXAMPLE = Path(str(resources.files("malote"))) / "malote.example.toml"
ACCOUNT = {"name": "a", "host": "imap.example.org", "username": "a@example.org", "deliver": "replace", "password_file": "/p"}


def uncommented() -> dict[str, Any]:
    lines = [re.sub(r"^# (?=[a-z_]+ = |\[)", "", line) for line in EXAMPLE.read_text().splitlines()]
    return tomllib.loads("\n".join(lines))


def model_of(annotation: Any) -> type[BaseModel] | None:
    """The section a field holds, directly or in a tuple."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def compare(model: type[BaseModel], table: dict[str, Any], where: str, *, tables_too: bool) -> None:
    assert set(table) == set(model.model_fields), f"{where}: keys of the example differ from those of the code"
    for key, value in table.items():
        field = model.model_fields[key]
        if (inner := model_of(field.annotation)) is not None:
            entries = value if isinstance(value, list) else [value]
            for entry in entries:
                compare(inner, entry, f"{where}.{key}", tables_too=tables_too)


def test_example_names_every_key_and_no_other() -> None:
    compare(Config, uncommented(), "malote.example.toml", tables_too=True)


def test_example_is_at_the_defaults() -> None:
    ours = parse_config(uncommented(), source="example")
    default = Config()
    assert ours.store == default.store
    assert ours.keys == default.keys
    assert ours.log == default.log
    assert ours.limits == default.limits
    assert ours.outgoing.upstream == default.outgoing.upstream
    assert ours.outgoing.listeners == default.outgoing.listeners
    [rule] = ours.outgoing.rules
    assert rule == type(rule)()
    for name in ("enabled", "seal_to_self", "fold", "partial_failure", "domains", "seal_tag", "clear_tag"):
        assert getattr(ours.outgoing, name) == getattr(default.outgoing, name)
    [opening] = ours.incoming.listeners
    for name, field in type(opening).model_fields.items():
        if not field.is_required():
            assert getattr(opening, name) == field.get_default(), name
    named = {"host", "port", "protocol", "security"}        # there for example
    assert opening.upstream.model_dump(exclude=named) == UpstreamConfig().model_dump(exclude=named)
    [account] = ours.accounts
    for name, field in type(account).model_fields.items():
        if not field.is_required():
            assert getattr(account, name) == field.get_default(), name


OPENING = {"quarantine": "refuse", "upstream": {"host": "127.0.0.1", "security": "none"}}


@pytest.mark.parametrize(("changes", "fault"), [
    ({}, None),
    ({"quarantine": "{local}+quarantine@{domain}"}, None),
    ({"quarantine": "nowhere"}, "quarantine: must be"),
    ({"quarantine": "a@b.example\r\nDATA"}, "quarantine: must be"),
    ({"host": "192.0.2.1", "tls": "tls", "certificate": "/c", "certificate_key": "/k"}, "networks: must name"),
    ({"host": "192.0.2.1", "networks": ["192.0.2.0/24"]}, 'tls: "none"'),
    ({"host": "192.0.2.1", "networks": ["0.0.0.0/0"], "tls": "tls", "certificate": "/c", "certificate_key": "/k"}, "networks:"),
    ({"proxies": ["127.0.0.1"]}, "networks: must name whose mail is taken, since proxies"),
    ({"proxies": ["127.0.0.1"], "networks": ["0.0.0.0/0"]}, "networks: must name"),
    ({"proxies": ["127.0.0.1"], "networks": ["192.0.2.0/24"]}, None),
    ({"socket": "/run/malote/in", "proxies": ["unix"]}, "networks: must name"),
    ({"proxies": ["0.0.0.0/0"], "networks": ["192.0.2.0/24"]}, "proxies: would believe everybody"),
    ({"tls": "tls"}, "certificate: tls"),
    ({"late_days": 201}, "late_days: must be at most half"),
    ({"port": 2525}, "has the address of another listener"),
    ({"upstream": {"host": "192.0.2.1", "security": "none"}}, 'upstream.security: "none"'),
    ({"upstream": {}}, "upstream.host: must be set"),
])
def test_an_opening_listener_that_would_lose_or_show_mail_is_a_fault(changes: dict[str, Any], fault: str | None) -> None:
    """Said before the daemon starts, with the key."""
    table = {"incoming": {"listeners": [OPENING | changes]}, "outgoing": {"upstream": {"host": "smtp.example.org"}}}
    faults = config_faults(parse_config(table, source="test"))
    assert len(faults) == (fault is not None), faults
    for said in faults:
        assert said.startswith("incoming.listeners.1")
        assert str(fault) in said


def test_opening_mail_alone_is_something_to_do() -> None:
    table = {"incoming": {"listeners": [OPENING]}, "outgoing": {"enabled": False}}
    assert config_faults(parse_config(table, source="test")) == []


def test_example_can_be_copied_as_it_is() -> None:
    """What it then asks for is only what has no default."""
    assert config_faults(load_config(EXAMPLE)) == [
        "outgoing.upstream.host: must be set; name the server that carries your mail on, or set outgoing.enabled = false"]


def test_example_explains_every_key() -> None:
    bare = [line for line in EXAMPLE.read_text().splitlines() if re.match(r"^# [a-z_]+ = ", line) and line.count("#") < 2]
    obvious = ("enabled", "port", "password_file", "connect_seconds", "connections", "host")
    assert [line for line in bare if not line[2:].startswith(obvious)] == []


def test_every_fault_is_reported_at_once_with_file_and_key() -> None:
    table = {"outgoing": {"upstream": {"prot": 1, "port": 99999}}, "accounts": [{"name": "a"}], "colour": True}
    with pytest.raises(ConfigError) as caught:
        parse_config(table, source="my.toml")
    text = str(caught.value)
    for key in ("outgoing.upstream.prot: unknown key", "outgoing.upstream.port", "accounts.1.deliver: must be set",
                "colour: unknown key"):
        assert f"my.toml: {key}" in text
    assert caught.value.exit_code is ExitCode.CONFIG
    assert "unknown key; did you mean port?" in text


@pytest.mark.parametrize(("table", "cure"), [
    ({"outgoing": {"listners": []}}, "outgoing.listners: unknown key; did you mean listeners?"),
    ({"outgoing": {"listeners": [{"prt": 1}]}}, "outgoing.listeners.1.prt: unknown key; did you mean port?"),
    ({"xyz": 1}, "xyz: unknown key; there are: accounts, "),
])
def test_an_unknown_key_names_those_there_are(table: dict[str, object], cure: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(table, source="my.toml")
    assert f"my.toml: {cure}" in str(caught.value)


@pytest.mark.parametrize(("table", "reason"), [
    ({"outgoing": {"upstream": {"port": "587"}}}, "a number in quotes is a mistake, not a number"),
    ({"outgoing": {"fold": "yes"}}, "a word is not a truth value"),
    ({"store": {"remember_days": 27}}, "never less than twice the lateness window"),
    ({"log": {"level": "loud"}}, "unknown value"),
])
def test_values_of_the_wrong_kind_are_refused(table: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError):
        parse_config(table, source="x")


def test_the_value_of_a_wrong_key_is_not_repeated() -> None:
    """Somebody who writes the password into the file must not find it in the log as well."""
    with pytest.raises(ConfigError) as caught:
        parse_config({"accounts": [{**ACCOUNT, "password": "hunter2"}]}, source="x")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(("content", "word"), [
    (b"[store\n", "TOML"), (b"\xff\xfe", "UTF-8"), (None, "no such file"),
])
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes | None, word: str) -> None:
    file = tmp_path / "malote.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=word) as caught:
        load_config(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(("table", "fault"), [
    ({}, "outgoing.upstream.host: must be set"),
    ({"outgoing": {"enabled": False}}, "nothing would be done"),
    ({"keys": {"unlock": "file"}}, "keys.file"),
    ({"outgoing": {"upstream": {"host": "mx.example.org", "security": "none"}}}, "outgoing.upstream.security"),
    ({"outgoing": {"upstream": {"host": "h", "username": "u"}}}, "outgoing.upstream.password_file"),
    ({"outgoing": {"upstream": {"host": "h", "username": "u", "password_file": "/p"}}}, "outgoing.listeners.1.auth"),
    ({"outgoing": {"listeners": [{"host": "0.0.0.0"}]}}, "outgoing.listeners.1.tls"),
    ({"outgoing": {"listeners": [{"host": "0.0.0.0", "auth": "none"}]}}, "open relay"),
    ({"outgoing": {"listeners": [{"tls": "tls"}]}}, "certificate"),
    ({"outgoing": {"listeners": [{"auth": "local"}]}}, "users_file"),
    ({"outgoing": {"listeners": [{"auth": "peer"}]}}, "socket"),
    ({"accounts": [{**ACCOUNT, "security": "none"}]}, "accounts.1.security"),
    ({"accounts": [{**ACCOUNT, "deliver": "maildir"}]}, "accounts.1.maildir"),
    ({"accounts": [{**ACCOUNT, "credential": "c"}]}, "exactly one of"),
    ({"accounts": [ACCOUNT, ACCOUNT]}, "accounts.2.name"),
    ({"accounts": [{**ACCOUNT, "sealed_folder": "INBOX"}]}, "accounts.1.folders"),
    ({"accounts": [{**ACCOUNT, "keep_sealed_days": 7}]}, "accounts.1.keep_sealed_days"),
    ({"accounts": [{**ACCOUNT, "late_days": 201}]}, "accounts.1.late_days"),
])
def test_arrangements_that_cannot_work_or_would_leak_are_named(table: dict[str, Any], fault: str) -> None:
    assert any(fault in text for text in config_faults(parse_config(table, source="x")))


def test_a_sound_configuration_has_no_faults() -> None:
    table = {"outgoing": {"upstream": {"host": "smtp.example.org"}}, "accounts": [ACCOUNT]}
    config = parse_config(table, source="x")
    assert config_faults(config) == []
    assert config.outgoing.upstream.security is Security.STARTTLS
