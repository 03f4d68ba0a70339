"""Numberings by slot: of the processes that share one database each has its own."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(        # SQLite cannot change a primary key
        "device_slot",
        sa.Column("address", sa.Text(), primary_key=True, nullable=False, autoincrement=False),
        sa.Column("skid", sa.LargeBinary(), primary_key=True, nullable=False, autoincrement=False),
        sa.Column("slot", NUMBER, primary_key=True, nullable=False, autoincrement=False),
        sa.Column("stream", sa.LargeBinary(), nullable=False),
        sa.Column("last_sent_ms", NUMBER, nullable=False),
        sqlite_strict=True, sqlite_with_rowid=False,
    )
    op.execute("INSERT INTO device_slot (address, skid, slot, stream, last_sent_ms) "
               "SELECT address, skid, 0, stream, last_sent_ms FROM device")
    op.drop_table("device")
    op.rename_table("device_slot", "device")
