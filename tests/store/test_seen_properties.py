"""Seen state under any order of arrivals, deliveries, other devices and crashes: a repeat is never fresh, nothing is lost."""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
import time
from typing import Literal

from hypothesis import given
from hypothesis import strategies as st

from malote.core.freshness import Arrival, Claim, FreshnessLimits, Verdict
from malote.store import Store, Stored

NOW_MS = time.time_ns() // 1_000_000
GENUINE = Claim("bob@b.example", "anna@a.example", b"1" * 16, b"k" * 32, b"s" * 8, 1, 0, NOW_MS - 1000, None, b"p" * 32,
                b"o" * 64, "valid", True)

CLAIMS = st.builds(
    lambda number, content, cipher, serial, signature: dataclasses.replace(
        GENUINE, manifest_id=bytes([number]) * 16, original_sha512=bytes([number, content]) * 32, serial=serial, prev=serial - 1,
        payload_digest=bytes([number, content, cipher, serial]) * 8, signature=signature),
    st.integers(1, 3), st.integers(0, 1), st.integers(0, 1), st.integers(1, 3),
    st.sampled_from(["valid", "valid", "valid", "bad"]))
Step = tuple[Literal["judge", "deliver", "foreign", "crash"], Claim]
STEPS = st.lists(st.tuples(st.sampled_from(["judge", "deliver", "deliver", "foreign", "crash"]), CLAIMS), max_size=25)


async def _run(steps: list[Step]) -> list[tuple[str, Claim, Stored]]:
    done: list[tuple[str, Claim, Stored]] = []
    with tempfile.TemporaryDirectory() as place:
        store = await Store.open(place)
        for what, claim in steps:
            if what == "crash":
                await store.close()
                store = await Store.open(place)
                continue
            judge = store.record_foreign if what == "foreign" else store.judge
            stored = await judge(claim, Arrival(NOW_MS), FreshnessLimits())
            if what == "deliver" and stored.row_id is not None:
                await store.mark_delivered(stored.row_id)
            done.append((what, claim, stored))
        await store.close()
    return done


@given(STEPS)
def test_delivered_once(steps: list[Step]) -> None:
    delivered: set[bytes] = set()           # sealed bytes that reached somebody, here or on another device
    fresh_ids: dict[bytes, bytes] = {}      # id -> the original that was fresh under it
    fresh_serials: dict[int, bytes] = {}
    for what, claim, stored in asyncio.run(_run(steps)):
        verdict = stored.judgement.verdict
        assert stored.row_id is not None
        assert stored.judgement.deliver != stored.judgement.quarantine
        if claim.payload_digest in delivered and what != "foreign":
            assert verdict is Verdict.DUPLICATE
        if verdict is Verdict.FRESH:
            assert claim.signature == "valid" or not stored.first
            assert fresh_ids.setdefault(claim.manifest_id, claim.original_sha512) == claim.original_sha512
            assert fresh_serials.setdefault(claim.serial, claim.manifest_id) == claim.manifest_id or not stored.first
        if what in ("deliver", "foreign"):
            delivered.add(claim.payload_digest)


@given(STEPS)
def test_a_forgery_changes_no_verdict_of_genuine_mail(steps: list[Step]) -> None:
    """Take the unproven messages out: every genuine one is judged as before, unless it has the very content of a forged one."""
    forged = {claim.original_sha512 for _, claim in steps if claim.signature == "bad"}
    genuine = [(what, claim) for what, claim in steps if claim.signature == "valid" and claim.original_sha512 not in forged]
    with_forged = [(what, claim) for what, claim in steps if claim.signature == "bad" or claim.original_sha512 not in forged]
    alone = [stored.judgement.verdict for _, claim, stored in asyncio.run(_run(genuine))]
    among = [stored.judgement.verdict for _, claim, stored in asyncio.run(_run(with_forged)) if claim.signature == "valid"]
    assert alone == among
