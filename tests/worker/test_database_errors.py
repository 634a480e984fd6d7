import pytest
from django.db import Error, InterfaceError, connection, transaction

from kanthorq_django.worker.connections.database_errors import is_about_values, is_unavailable

pytestmark = pytest.mark.django_db


def raised(code: str) -> Error:
    raising = f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{code}'; END $$"
    with pytest.raises(Error) as caught, transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(raising)
    return caught.value


@pytest.mark.parametrize(
    ("code", "is_away"),
    [
        ("25006", True),  # a primary that became a standby
        ("27000", False),  # a trigger's own
        ("2F002", False),  # a routine's own
        ("38000", False),
        ("39000", False),
        ("54000", False),  # a limit
        ("XX001", False),  # a damaged page
        ("XX002", False),  # a damaged index
        ("53300", True),  # too many connections
        ("57P01", True),  # an administrator's shutdown
        ("23505", False),
    ],
)
def test_what_an_error_is_about_tells_whether_to_try_again(code: str, is_away: bool):
    assert is_unavailable(raised(code)) is is_away


def test_a_connection_that_was_closed_is_as_one_to_a_database_that_is_away():
    assert is_unavailable(InterfaceError("connection already closed"))


@pytest.mark.parametrize(
    ("code", "is_about_them"),
    [
        ("22001", True),  # too long
        ("23514", True),  # a check
        ("54000", True),  # a limit
        ("23505", False),  # somebody else's may go
        ("42P01", False),  # a table that is missing
        ("57P01", False),
    ],
)
def test_what_an_error_is_about_tells_whether_values_are_to_blame(code: str, is_about_them: bool):
    assert is_about_values(raised(code)) is is_about_them
