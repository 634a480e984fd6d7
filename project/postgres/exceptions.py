"""What can go wrong before there is a connection."""


class EmbeddedPostgresError(Exception):
    """Base of the errors below. Never raised itself."""


class PostgresNotFound(EmbeddedPostgresError):
    """No PostgreSQL on this machine can be started; the message names the ways out."""


class ServerFailed(EmbeddedPostgresError):
    """PostgreSQL failed, or its folders cannot be used; the message holds its own words."""
