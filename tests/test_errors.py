"""The exception tree: each error knows its reply and exit code, and unknown means temporary."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from malote import errors
from malote.errors import ExitCode, MaloteError, Reply, StoreUnavailable, UpstreamRefused, map_exceptions

PERMANENT = {"FormatError", "Unreadable", "KeyMissing", "KeyRefused", "PolicyRefused", "SenderRefused", "MailLoop"}


def tree(kind: type[MaloteError] = MaloteError) -> Iterator[type[MaloteError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from tree(below)


@pytest.mark.parametrize("kind", sorted(set(tree()), key=lambda kind: kind.__name__))
def test_reply_and_exit_code_of_each_error(kind: type[MaloteError]) -> None:
    reply = kind.default_reply
    assert reply.enhanced[0] == str(reply.code)[0], "RFC 3463: the enhanced code has the class of the reply"
    assert (reply.code >= 500) == (kind.__name__ in PERMANENT), "what is not known to be permanent is temporary"
    assert reply.code >= 400, "no error is ever 250"
    assert kind.exit_code in ExitCode
    assert kind.exit_code is not ExitCode.OK


def test_all_errors_are_in_one_tree() -> None:
    ours = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    assert ours == set(tree())


def test_an_error_raised_without_words_says_what_was_not_done() -> None:
    assert "nothing was sent" in str(StoreUnavailable())


def test_reply_of_several_lines() -> None:
    assert str(Reply(550, "5.7.1", "one\ntwo")) == "550-5.7.1 one\r\n550 5.7.1 two"
    assert str(Reply(354, "", "go")) == "354 go"


def test_the_upstream_reply_is_passed_on_unchanged() -> None:
    reply = Reply(552, "5.2.2", "mailbox full")
    assert UpstreamRefused(reply).reply is reply


def test_foreign_exceptions_keep_their_text_to_themselves() -> None:
    with pytest.raises(StoreUnavailable) as caught, map_exceptions({OSError: StoreUnavailable}):
        raise OSError(28, "secret path")
    assert "secret" not in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


def test_exceptions_that_are_not_in_the_table_pass() -> None:
    with pytest.raises(ValueError, match="x"), map_exceptions({OSError: StoreUnavailable}):
        raise ValueError("x")
