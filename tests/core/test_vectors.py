"""The published vectors: each opens, or fails in exactly the check that its file names. They test opening only."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from malote.core import primitives
from malote.core.card import parse_card
from malote.core.keys import DecryptionKey
from malote.core.open import Opened, authenticate, unseal
from malote.core.parts import find_parts
from malote.errors import Unreadable

VECTORS = sorted((Path(__file__).parent.parent / "vectors").glob("*.txt"))
CATEGORIES = {
    "success", "no match", "version failure", "header failure", "payload failure", "container failure", "manifest failure",
    "fold failure", "original failure", "over limit", "signature failure", "not addressed",
}


def parse(path: Path) -> tuple[dict[str, str], bytes]:
    head, _, raw = path.read_bytes().partition(b"\n\n")
    return dict(line.split(": ", 1) for line in head.decode().splitlines()), raw


def outcome(fields: dict[str, str], raw: bytes) -> tuple[str, Opened | None]:
    try:
        found = find_parts(raw)
        assert found is not None, "nothing sealed found"
        unsealed = unseal(found, [(fields["address"], DecryptionKey(bytes.fromhex(fields["key"])))])
    except Unreadable as error:
        return error.reason.partition(":")[0], None
    opened = authenticate(unsealed, parse_card(base64.b64decode(fields["card"])))
    if opened.signature != "valid":
        return "signature failure", opened
    return "success" if opened.addressed else "not addressed", opened


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_vector(path: Path) -> None:
    fields, raw = parse(path)
    category, opened = outcome(fields, raw)
    assert category == fields["expect"]
    if opened is not None:
        assert primitives.sha256(opened.original).hex() == fields["sha256"]
        assert (str(opened.unsealed.serial), str(opened.unsealed.prev)) == (fields["serial"], fields["prev"])
        assert opened.unsealed.forwarded is (fields["forwarded"] == "yes")


def test_every_category_has_its_vectors() -> None:
    assert {parse(path)[0]["expect"] for path in VECTORS} == CATEGORIES
