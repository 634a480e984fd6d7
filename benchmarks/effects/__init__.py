"""A Django app with the one row that handlers insert when a database write is measured."""
