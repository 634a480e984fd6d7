"""``ENGINE = "project.postgres"``: Django's PostgreSQL backend with a server of its own.

The first connection starts PostgreSQL, the last process to end has it stopped; importing starts
nothing. Read base, launcher, server, watcher; below them are cluster (the data), installation (the
programs) and account (whom they run as).
"""
