"""Schema versions, run by Alembic from inside the package: no configuration file, no logging set-up."""
