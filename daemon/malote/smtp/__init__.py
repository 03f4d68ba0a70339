"""SMTP and LMTP, both ends: the server that takes mail in, and the client that hands it on. Shared by outgoing and incoming."""
