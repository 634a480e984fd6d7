"""``manage.py demo``, run as a person runs it, on a small scale."""

import io
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from http.cookiejar import CookieJar
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, build_opener

import pytest
from django.contrib.auth import get_user_model
from django.core.management import CommandError, call_command
from django.db import connection

from kanthorq_django.models import Worker
from project.shop.invariants import audit
from project.shop.models import Payment, Sale, TillReport
from project.shop.patience import wait_until
from project.shop.serving import free_or_any, provide_login
from tests.processes import is_alive
from tests.shop.factories import SaleFactory
from tests.shop.running import demo, descendants, environment

CUSTOMERS = 40
WIDTH = 80
PIDS = r"processes (\d+) and (\d+)\."  # to the full stop: what is read may end anywhere
SERVED = r"Address +(\S+)\n +Login +admin\n +Password +(\S+)\n +Worker +process (\d+),"

BOOK_TWICE = """
    CREATE FUNCTION sabotage() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO shop_booking (order_id, event_id, amount)
        VALUES (new.order_id, new.event_id, new.amount);
        RETURN NULL;
    END $$;
    CREATE TRIGGER sabotage AFTER INSERT ON shop_booking
        FOR EACH ROW WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION sabotage();
"""


@pytest.fixture
def ledger_that_books_twice(transactional_db: None) -> Iterator[None]:
    with connection.cursor() as cursor:
        cursor.execute(BOOK_TWICE)
    yield
    with connection.cursor() as cursor:
        cursor.execute("DROP FUNCTION sabotage() CASCADE")


@pytest.mark.django_db(transaction=True)
def test_the_demo_ends_well_and_leaves_nothing_running(tmp_path: Path):
    with demo(tmp_path / "output", "--customers", CUSTOMERS) as run:
        assert run.wait() == 0, run.text()
    assert audit(Sale.objects.get()).is_sound
    assert Payment.objects.count() > CUSTOMERS / 2
    assert TillReport.objects.get().occurs_at == Sale.objects.get().report_at
    assert "A schedule lets the till report every day at " in run.text()
    assert "The till has reported, " in run.text()
    assert not any(map(is_alive, map(int, run.wait_for(PIDS).groups())))
    assert "kill -9" in run.text()
    assert "Nothing was lost, nothing was doubled, every cent is booked." in run.text()
    assert "Traceback" not in run.text()
    story = run.text().partition("KanthorQ for Django")[2]
    paths = ("kanthorq-demo-", "manage.py")  # as long as they are
    lines = [line for line in story.splitlines() if not any(path in line for path in paths)]
    assert max(map(len, lines)) <= WIDTH


@pytest.mark.usefixtures("ledger_that_books_twice")
def test_the_demo_fails_when_money_is_booked_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    output = io.StringIO()
    with pytest.raises(CommandError, match="must never be"):
        call_command("demo", customers=CUSTOMERS, stdout=output)
    bookings = sum(audit(Sale.objects.get()).doubled.values())
    assert f"duplicates {bookings:>15}  {bookings} bookings" in output.getvalue()
    assert "NOT EQUAL" in output.getvalue()
    assert "every cent" not in output.getvalue()


@pytest.mark.django_db(transaction=True)
def test_an_interrupted_demo_takes_its_workers_along(tmp_path: Path):
    with demo(tmp_path / "output", "--customers", 100_000) as run:
        pids = [int(pid) for pid in run.wait_for(PIDS).groups()]
        run.process.send_signal(signal.SIGINT)
        assert run.wait() == 130
    assert not any(map(is_alive, pids))
    assert run.text().rstrip().endswith("Stopped.")
    assert "Traceback" not in run.text()


@pytest.mark.django_db(transaction=True)
def test_the_demo_gives_up_when_a_worker_dies_that_it_did_not_kill(tmp_path: Path):
    with demo(tmp_path / "output", "--customers", 100_000) as run:
        _, second = run.wait_for(PIDS).groups()
        os.kill(int(second), signal.SIGKILL)
        assert run.wait() == 1
        assert "A worker ended with status -9; its log is" in run.text().splitlines()[-1]
        wait_until(is_alone, lambda: None)


@pytest.mark.django_db(transaction=True)
def test_the_admin_is_served_with_a_worker_until_it_is_stopped(tmp_path: Path):
    SaleFactory.create(placed_count=1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with demo(tmp_path / "output", "--serve", "--port", port) as run:
            address, password, worker = run.wait_for(SERVED).groups()
            assert f":{port}/" not in address
            assert "Log out" in log_in(address, password)
            os.kill(int(worker), signal.SIGKILL)
            run.wait_for("another starts")
            run.process.send_signal(signal.SIGTERM)
            assert run.wait() == 0
            # The processes of the killed worker see by themselves that it is gone.
            wait_until(lambda: not Worker.objects.exists() and is_alone(), lambda: None)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(address.split(":")[2].split("/")[0])))


@pytest.mark.django_db(transaction=True)
def test_a_test_that_fails_leaves_no_process_of_its_demo_behind(tmp_path: Path):
    SaleFactory.create(placed_count=1)
    output = tmp_path / "output"
    with pytest.raises(ZeroDivisionError) as failure:
        fail_while_serving(output)
    assert "development server at http:" in failure.value.__notes__[0]
    assert descendants(output) == []
    wait_until(is_alone, lambda: None)


def fail_while_serving(output: Path) -> None:
    with demo(output, "--serve", "--port", 0) as run:
        *_, supervisor = run.wait_for(SERVED).groups()
        wait_until(lambda: Worker.objects.count() == 2, lambda: None)
        os.kill(int(supervisor), signal.SIGKILL)  # its processes are orphans for a while
        raise ZeroDivisionError


def is_alone() -> bool:
    """Tell whether nobody but the test is connected to its database."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND backend_type = 'client backend'"
        )
        return bool(cursor.fetchone() == (1,))


def log_in(address: str, password: str) -> str:
    """Return the page that follows the login."""
    cookies = CookieJar()
    browser = build_opener(HTTPCookieProcessor(cookies))
    browser.open(f"{address}login/").close()
    token = {cookie.name: cookie.value for cookie in cookies}["csrftoken"]
    form = {
        "username": "admin",
        "password": password,
        "csrfmiddlewaretoken": token,
        "next": "/admin/",
    }
    with browser.open(f"{address}login/", urlencode(form).encode()) as page:
        return str(page.read().decode())


@pytest.mark.django_db(transaction=True)
def test_a_database_that_is_not_there_is_said_in_one_line(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgres://nobody@127.0.0.1:1/nowhere")
    with demo(tmp_path / "output") as run:
        assert run.wait() == 1
    assert "The database cannot be reached: connection failed" in run.text().splitlines()[-1]
    assert "Traceback" not in run.text()


def test_a_port_that_is_free_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert free_or_any(port) == 0
    assert free_or_any(port) == port


@pytest.mark.django_db
def test_the_login_gets_a_new_password_each_time():
    assert provide_login() != provide_login()


@pytest.mark.django_db
def test_an_account_that_is_not_ours_keeps_its_password():
    get_user_model().objects.create_superuser("admin", "boss@company.example", "secret")
    assert provide_login() is None
    assert get_user_model().objects.get().check_password("secret")


def test_the_admin_is_not_served_without_debug(settings):
    settings.DEBUG = False
    with pytest.raises(CommandError, match="needs DEBUG"):
        call_command("demo", serve=True)


@pytest.mark.parametrize("customers", [-1, 0, 9, 1_000_001])
def test_a_number_of_customers_that_makes_no_story_is_refused(customers):
    with pytest.raises(CommandError, match=r"--customers must be 10 to 1,000,000"):
        call_command("demo", customers=customers)
