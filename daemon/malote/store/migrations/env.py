"""Alembic's entry: everything comes from `migrate.upgrade`, which already holds the transaction."""

from __future__ import annotations

from alembic import context

from malote.store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
