"""The admin with workers behind it, until somebody has seen enough."""

import random
import re
import secrets
import socket
from pathlib import Path

from django.contrib.auth import get_user_model
from django.utils import timezone

from project.shop.crowd import serve_one
from project.shop.interruption import rest
from project.shop.models import Sale
from project.shop.narrator import Narrator
from project.shop.patience import wait_until
from project.shop.processes import Process
from project.shop.tills import EACH_MINUTE, schedule_reports

HOST = "127.0.0.1"
LOGIN = "admin"
MARK = "admin@shop.example"  # the address of accounts that are ours to give a new password
CUSTOMER_EVERY = 3.0  # seconds
# What runserver writes once it has its port; asking the port could be answered by somebody else.
BOUND = re.compile(rf"http://{re.escape(HOST)}:(\d+)/")


class ServerEnded(Exception):
    """The web server ended that nobody had told to."""


class Serving:
    """A web server, a worker that is replaced when it dies, and a customer now and then."""

    def __init__(self, narrator: Narrator, logs: Path, port: int) -> None:
        self._narrator = narrator
        self._logs = logs
        self._port = free_or_any(port)

    def run(self) -> None:
        """Serve until Interrupted is raised; nothing of it runs any more after that.

        Raises ServerEnded if the web server fails, NothingHappens if it does not come up.
        """
        log = self._logs / "server.log"
        place = f"{HOST}:{self._port}"
        with Process("runserver", "--noreload", place, log=log) as self._server:
            self._worker = self._hire()
            try:
                wait_until(self._has_bound, lambda: log.stat().st_size)
                self._invite()
                self._stay_open()
            finally:
                self._worker.stop()

    def _hire(self) -> Process:
        return Process("runworker", "--processes", "2", log=self._logs / "worker.log")

    def _invite(self) -> None:
        self._narrator.heading("The shop is open")
        self._narrator.fact("Address", f"http://{HOST}:{self._port}/admin/")
        password = provide_login()
        self._narrator.fact("Login", LOGIN)
        self._narrator.fact("Password", password or "the one you gave it")
        self._narrator.fact("Worker", f"process {self._worker.pid}, and two of its own")
        self._narrator.fact("Logs", self._logs)
        self._narrator.line()
        self._narrator.line(
            "  A customer orders every few seconds, and the till reports every minute."
        )
        self._narrator.line("  Stop with Ctrl-C.")

    def _stay_open(self) -> None:
        sale = Sale.objects.create()
        schedule_reports(sale, EACH_MINUTE, timezone.now().replace(microsecond=0))
        chance = random.Random()  # noqa: S311  # not a secret
        while True:
            serve_one(sale, chance)
            rest(CUSTOMER_EVERY)
            self._check_server()
            if self._worker.status is not None:
                self._narrator.line(f"  The worker died ({self._worker.status}); another starts.")
                self._worker = self._hire()

    def _has_bound(self) -> bool:
        self._check_server()
        bound = BOUND.search(self._server.log.read_text())
        if bound is not None:
            self._port = int(bound[1])
        return bound is not None

    def _check_server(self) -> None:
        if self._server.status is not None:
            raise ServerEnded(f"The web server ended; its log is {self._server.log}.")


def free_or_any(wanted: int) -> int:
    """Return the port ``wanted``; 0, which lets the system choose any, if it is taken."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((HOST, wanted))
        except OSError:
            return 0
    return wanted


def provide_login() -> str | None:
    """Give the superuser ``admin`` a new password and return it; None if it is not ours."""
    user, is_new = get_user_model().objects.get_or_create(
        username=LOGIN, defaults={"email": MARK, "is_staff": True, "is_superuser": True}
    )
    if not is_new and user.email != MARK:
        return None
    password = secrets.token_urlsafe(9)
    user.set_password(password)
    user.save()
    return password
