"""The `malote` command."""
