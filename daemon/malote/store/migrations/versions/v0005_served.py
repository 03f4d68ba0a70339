"""Who was served, found by recipient: asked for each one that the upstream refuses, which anybody may bring about."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    served = sa.text("state = 2")
    op.create_index("journal_served", "journal", ["recipient"], sqlite_where=served, postgresql_where=served)
