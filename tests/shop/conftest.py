"""A mail server that is never too busy."""

import pytest

from project.shop import mailserver


@pytest.fixture
def idle_mailserver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailserver, "BUSY_SHARE", 0)
    monkeypatch.setattr(mailserver, "SECONDS", (0, 0))
