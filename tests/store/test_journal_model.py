"""Journal and serials against a model that fits on a page, in any order of events and with restarts in between."""

from __future__ import annotations

import asyncio
import tempfile
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from malote.store import Outcome, SendIntent, SendPlan, SendRecipient, SendState, Store

NOW_MS = time.time_ns() // 1_000_000
CONTENTS = st.integers(0, 2)
RECIPIENTS = st.dictionaries(st.sampled_from(["a@x.example", "b@x.example", "c@y.example"]), st.booleans(), min_size=1)


@dataclass
class Part:
    state: SendState
    numbers: tuple[bytes, int, int] | None
    attempt: int


@dataclass
class Submission:
    id: bytes
    parts: dict[str, Part] = field(default_factory=dict)


class Journal(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.place = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.store = self.runner.run(Store.open(self.place.name))
        self.model: dict[int, Submission] = {}
        self.plans: list[tuple[int, SendPlan]] = []
        self.given: set[tuple[bytes, str, int]] = set()
        self.accepted: dict[str, int] = {}
        self.last_sent_ms = 0

    def teardown(self) -> None:
        self.runner.run(self.store.close())
        self.runner.close()
        self.place.cleanup()

    @rule(content=CONTENTS, recipients=RECIPIENTS)
    def begin(self, content: int, recipients: dict[str, bool]) -> None:
        wanted = [SendRecipient(address, sealed) for address, sealed in recipients.items()]
        plan = self.runner.run(self.store.begin_send(SendIntent(
            "login", "me@x.example", b"k" * 32, bytes([content]) * 32, wanted, NOW_MS)))
        submission = self.model.setdefault(content, Submission(plan.submission_id))
        assert plan.submission_id == submission.id
        assert {row.address for row in plan.rows} == set(recipients)
        for row in plan.rows:
            self.check_row(submission, row.address, recipients[row.address], plan)
        if any(recipients.values()):
            assert plan.sent_at_ms > self.last_sent_ms
            self.last_sent_ms = plan.sent_at_ms
        self.plans.append((content, plan))

    def check_row(self, submission: Submission, address: str, sealed: bool, plan: SendPlan) -> None:
        row, part = plan.row(address), submission.parts.get(address)
        assert row.state is (SendState.NEW if part is None else part.state)
        if row.state is SendState.ACCEPTED:
            return
        numbers = None
        if sealed and part is not None and part.numbers is not None:
            numbers = part.numbers
        elif sealed:
            numbers = (row.stream, row.serial, self.accepted.get(address, 0))
            assert (row.stream, address, row.serial) not in self.given
            self.given.add((row.stream, address, row.serial))
        assert (row.stream, row.serial, row.prev) == (numbers or (b"", 0, 0))
        submission.parts[address] = Part(SendState.IN_DOUBT, numbers, 1 if part is None else part.attempt + 1)

    @precondition(lambda self: self.plans)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome))
    def finish(self, data: st.DataObject, outcome: Outcome) -> None:
        content, plan = self.plans.pop(data.draw(st.integers(0, len(self.plans) - 1)))
        self.runner.run(self.store.finish_send(plan, {row.address: (outcome, "reply") for row in plan.rows}, NOW_MS))
        submission = self.model.get(content)
        if submission is None or submission.id != plan.submission_id:
            self.note_accepted(plan, outcome)
            return
        for row in plan.rows:
            if row.state is SendState.ACCEPTED or row.address not in submission.parts:
                continue
            part = submission.parts[row.address]
            last = part.attempt == row.attempt and part.state is SendState.IN_DOUBT
            if outcome is Outcome.UNSENT and row.state is SendState.NEW and last:
                del submission.parts[row.address]
            elif outcome is Outcome.UNSENT and last:
                part.state = row.state
            elif outcome in (Outcome.ACCEPTED, Outcome.REFUSED, Outcome.SETTLED) and part.state is not SendState.ACCEPTED:
                part.state = SendState.REFUSED if outcome is Outcome.REFUSED else SendState.ACCEPTED
        self.note_accepted(plan, outcome)
        if not submission.parts:
            del self.model[content]

    def note_accepted(self, plan: SendPlan, outcome: Outcome) -> None:
        for row in plan.rows:
            if outcome is Outcome.ACCEPTED and row.state is not SendState.ACCEPTED and row.sealed:
                self.accepted[row.address] = max(self.accepted.get(row.address, 0), row.serial)

    @precondition(lambda self: self.plans)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        content, plan = self.plans[data.draw(st.integers(0, len(self.plans) - 1))]
        self.store.forget_send(plan)
        submission = self.model.get(content)
        if submission is not None and submission.id == plan.submission_id:
            for row in plan.rows:
                if row.address in submission.parts and submission.parts[row.address].state is not SendState.IN_DOUBT:
                    del submission.parts[row.address]
            if not submission.parts:
                del self.model[content]

    @rule()
    def restart(self) -> None:
        self.runner.run(self.store.close())
        self.store = self.runner.run(Store.open(self.place.name))

    @invariant()
    def numbers_are_given_once(self) -> None:
        assert all(serial <= len(self.given) for _, _, serial in self.given)


TestJournal = pytest.mark.timeout(300)(Journal.TestCase)
TestJournal.settings = settings(max_examples=settings.default.max_examples if settings.default else 60, stateful_step_count=25)
