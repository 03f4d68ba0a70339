"""What somebody puts into the mailbox first must not push the genuine message aside, nor borrow its verdict.

The attacker is a co-recipient: he knows the original, its id and the session key of the shared copy, and can seal again (then
unsigned) or wrap the session key in a blob of his own (then not addressed). He sees no serial but his own.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from malote.core.freshness import Arrival, Claim, FreshnessLimits, Verdict
from malote.store import Store, Stored

DAY_MS = 86_400_000
LIMITS = FreshnessLimits()
Make = Callable[..., Claim]

RESEALED = {"signature": "bad", "payload_digest": b"x" * 32, "stream": b"x" * 8, "serial": 99, "prev": 0}
FORGED_BLOB = {"addressed": False, "stream": b"x" * 8, "serial": 99, "prev": 0}


async def receive(store: Store, claim: Claim, now_ms: int) -> Stored:
    stored = await store.judge(claim, Arrival(now_ms), LIMITS)
    assert stored.row_id is not None
    await store.mark_delivered(stored.row_id)
    return stored


@pytest.mark.parametrize("injected", [
    [RESEALED],                                                         # UNSIGNED
    [RESEALED, RESEALED | {"payload_digest": b"y" * 32}],               # and its repeat, a DUPLICATE of it
    [RESEALED | {"signature": "revoked"}],
    [FORGED_BLOB],                                                      # NOT-FOR-ME, the very sealed bytes of the genuine one
    [FORGED_BLOB, FORGED_BLOB | {"stream": b"y" * 8}],
    [RESEALED, FORGED_BLOB, RESEALED | {"payload_digest": b"y" * 32}],
    [RESEALED | {"original_sha512": b"x" * 64}, RESEALED | {"payload_digest": b"y" * 32}],
], ids=["resealed", "resealed twice", "revoked", "forged blob", "forged blob twice", "all", "other text and resealed"])
async def test_genuine_mail_after_an_injection(store: Store, claim: Make, now_ms: int, injected: list[dict[str, object]]) -> None:
    for changes in injected:
        stored = await receive(store, claim(**changes), now_ms)
        assert stored.judgement.verdict is not Verdict.FRESH
    genuine = await receive(store, claim(), now_ms)
    assert (genuine.judgement.verdict, genuine.judgement.deliver) == (Verdict.FRESH, True)
    for changes in [{}, *injected]:         # and from now on all of it is a repeat
        again = await store.judge(claim(**changes), Arrival(now_ms), LIMITS)
        assert again.judgement.verdict in {Verdict.DUPLICATE, Verdict.UNSIGNED, Verdict.REVOKED}
        assert again.judgement.verdict is Verdict.DUPLICATE or again.first is False or changes["original_sha512"] == b"x" * 64


async def test_repeats_of_an_injection_are_repeats(store: Store, claim: Make, now_ms: int) -> None:
    for changes in (RESEALED, FORGED_BLOB):
        await receive(store, claim(**changes), now_ms)
        assert (await store.judge(claim(**changes), Arrival(now_ms), LIMITS)).judgement.verdict is Verdict.DUPLICATE


@pytest.mark.parametrize("changes", [RESEALED, FORGED_BLOB], ids=["resealed", "forged blob"])
async def test_an_unproven_copy_does_not_borrow_a_verdict(
    store: Store, claim: Make, now_ms: int, changes: dict[str, object],
) -> None:
    """Judged FRESH and not yet delivered (a full mailbox): only that message may be delivered as FRESH."""
    waiting = await store.judge(claim(), Arrival(now_ms), LIMITS)
    copy = await receive(store, claim(sent_at_ms=now_ms, **changes), now_ms)
    assert copy.judgement.verdict in {Verdict.UNSIGNED, Verdict.NOT_FOR_ME}
    genuine = await store.judge(claim(), Arrival(now_ms), LIMITS)
    assert (genuine.judgement.verdict, genuine.row_id, genuine.delivered) == (Verdict.FRESH, waiting.row_id, False)


async def test_a_conflict_is_found_behind_an_injection(store: Store, claim: Make, now_ms: int) -> None:
    """Two signed contents under one id, and a forged copy of the second before it: still CONFLICT, and never an endless retry."""
    await receive(store, claim(), now_ms)
    second = {"original_sha512": b"2" * 64, "serial": 2, "prev": 1}
    await receive(store, claim(**RESEALED | second | {"payload_digest": b"z" * 32}), now_ms)
    conflict = await store.judge(claim(payload_digest=b"2" * 32, **second), Arrival(now_ms), LIMITS)
    assert conflict.judgement.verdict is Verdict.CONFLICT


async def test_first_contact_sealed_again_is_a_repeat(store: Store, claim: Make, now_ms: int) -> None:
    """Delivered while there was no card, then the sender tried again: one message, whatever is proven by then."""
    await receive(store, claim(signature="unknown-sender"), now_ms)
    assert (await store.judge(claim(payload_digest=b"2" * 32), Arrival(now_ms), LIMITS)).judgement.verdict is Verdict.DUPLICATE


async def test_what_was_forgotten_is_never_fresh(store: Store, claim: Make, now_ms: int) -> None:
    """After `remember`, a server that gives an old message its old date, in a folder that it calls new, gains nothing."""
    await receive(store, claim(), now_ms)
    later_ms = now_ms + 401 * DAY_MS
    await store.expire(later_ms, remember_days=400)
    again = await store.judge(claim(), Arrival(later_ms, now_ms, None), LIMITS)
    assert again.judgement.verdict in {Verdict.LATE, Verdict.UNVERIFIABLE}
    fresh = await store.judge(claim(2, sent_at_ms=later_ms - 1000), Arrival(later_ms), LIMITS)
    assert fresh.judgement.verdict is Verdict.FRESH
