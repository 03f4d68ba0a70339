"""docs/standards.md says what the code does: each file it names exists, and each RFC that the code cites stands in it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "daemon" / "malote"
TABLE = (ROOT / "docs" / "standards.md").read_text(encoding="utf-8")
ROWS = [line for line in TABLE.splitlines() if re.match(r"\| (RFC|draft|FIPS|C2SP) ?", line)]


def test_the_places_exist() -> None:
    """A table that points at nothing is worse than none."""
    places = {place for row in ROWS for place in re.findall(r"`([a-z_/0-9]+\.py)`", row)}
    assert len(places) > 30
    assert sorted(place for place in places if not (SOURCE / place).is_file()) == []


def test_every_row_has_an_answer() -> None:
    assert len(ROWS) > 60
    assert [row for row in ROWS if row.split(" | ")[1] not in ("yes", "partly", "no")] == []


def test_every_cited_rfc_is_listed() -> None:
    """What the code follows in one place is a promise everywhere."""
    cited = {
        number for path in SOURCE.rglob("*.py") for number in re.findall(r"\bRFC (\d{3,5})", path.read_text(encoding="utf-8"))
    }
    listed = set(re.findall(r"\bRFC (\d{3,5})", TABLE))
    assert sorted(cited - listed, key=int) == []
