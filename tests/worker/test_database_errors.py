import pytest
from django.db import Error, connection, transaction

from kanthorq_django.worker.connections.database_errors import is_unavailable


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("code", "is_away"),
    [
        ("27000", False),  # a trigger's own
        ("2F002", False),  # a routine's own
        ("38000", False),
        ("39000", False),
        ("54000", False),  # a limit
        ("XX001", False),  # a damaged page
        ("53300", True),  # too many connections
        ("57P01", True),  # an administrator's shutdown
        ("23505", False),
    ],
)
def test_what_an_error_is_about_tells_whether_to_try_again(code: str, is_away: bool):
    raising = f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{code}'; END $$"
    with pytest.raises(Error) as caught, transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(raising)
    assert is_unavailable(caught.value) is is_away
