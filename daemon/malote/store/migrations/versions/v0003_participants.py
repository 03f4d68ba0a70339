"""Who a message that was opened was from and for: whoever answers it must not pass it on to others."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("outer_id", sa.Column("participants", sa.LargeBinary()))
