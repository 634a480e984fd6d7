"""Database connections in threads that live for weeks: lent to handlers, looked after, replaced."""
