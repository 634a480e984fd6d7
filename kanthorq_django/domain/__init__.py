"""The rules, without I/O: no Django, no PostgreSQL, tested without a database."""
