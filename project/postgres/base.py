"""The database backend: Django's own for PostgreSQL, and the first connection starts a server.

In DATABASES, ``EMBEDDED_PROJECT`` is the folder whose server it is, and ``EMBEDDED_DURABLE`` (True
by default) whether its data survives a crash of the machine. HOST, PORT and USER are set here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.db.backends.postgresql import base, client
from django.db.utils import OperationalError

from project.postgres import cluster, launcher
from project.postgres.exceptions import PostgresNotFound, ServerFailed


class DatabaseClient(client.DatabaseClient):
    """``dbshell``, which needs a server too."""

    connection: DatabaseWrapper

    def runshell(self, parameters: Iterable[str]) -> None:
        """Run psql. Raises what ``DatabaseWrapper.start_server`` does."""
        self.connection.start_server()
        super().runshell(parameters)


class DatabaseWrapper(base.DatabaseWrapper):
    """PostgreSQL, started on the first connection and stopped after the last process."""

    client_class = DatabaseClient

    def get_connection_params(self) -> dict[str, Any]:
        """Return psycopg's parameters for a running server. Raises what ``start_server`` does."""
        self.start_server()
        return super().get_connection_params()

    def start_server(self) -> None:
        """Start the server or join the running one, and point the settings at it.

        Raises ImproperlyConfigured if there is no PostgreSQL to start, OperationalError if it does
        not come up.
        """
        project = Path(self.settings_dict["EMBEDDED_PROJECT"])
        durable = self.settings_dict.get("EMBEDDED_DURABLE", True)
        try:
            server = launcher.project_server(project, durable=durable)
            server.start()
        except PostgresNotFound as error:
            raise ImproperlyConfigured(str(error)) from error
        except ServerFailed as error:
            raise OperationalError(str(error)) from error
        self.settings_dict.update(
            HOST=str(server.socket_dir), PORT=str(cluster.PORT), USER=cluster.USER
        )
