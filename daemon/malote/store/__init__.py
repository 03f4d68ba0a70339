"""What must survive a restart: identities, cards, serial numbers, journal, seen state. One schema for SQLite and PostgreSQL."""

from malote.store.members import Tenure
from malote.store.places import PostgresPlace, configured_place
from malote.store.records import (
    Attempt,
    CardRecord,
    FolderState,
    Level,
    LockedIdentity,
    Outcome,
    OutcomeEntry,
    PastCard,
    SendIntent,
    SendPlan,
    SendRecipient,
    SendRow,
    SendState,
    Stored,
)
from malote.store.store import Store

__all__ = [
    "Attempt", "CardRecord", "FolderState", "Level", "LockedIdentity", "Outcome", "OutcomeEntry", "PastCard", "PostgresPlace",
    "SendIntent", "SendPlan", "SendRecipient", "SendRow", "SendState", "Store", "Stored", "Tenure", "configured_place",
]
