"""The processes that share the store, what each has to itself, and which of them is sending a message."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "member",
        sa.Column("owner", sa.LargeBinary(), primary_key=True, nullable=False, autoincrement=False),
        sa.Column("until_ms", NUMBER, nullable=False),
        sa.Column("accounts", NUMBER, nullable=False, server_default="0"),
        sqlite_strict=True, sqlite_with_rowid=False,
    )
    op.create_table(
        "lease",
        sa.Column("name", sa.Text(), primary_key=True, nullable=False, autoincrement=False),
        sa.Column("owner", sa.LargeBinary(), nullable=False),
        sqlite_strict=True, sqlite_with_rowid=False,
    )
    op.add_column("journal", sa.Column("owner", sa.LargeBinary()))
