"""Incoming mail: a watched mailbox is searched for sealed mail, which is opened, judged and delivered."""
