"""Outgoing mail: taken in by SMTP, sealed, handed to the upstream server before the client hears 250."""
