"""A stand-in for a mail server: somewhere else, a little slow, and at times too busy."""

import asyncio
import random

from project.shop.catalogue import MISTYPED

BUSY_SHARE = 0.04
SECONDS = (0.001, 0.010)


class ServerBusy(Exception):
    """The server took nothing; it asks to try again later."""


class AddressUnknown(Exception):
    """There is no such mailbox; it makes no sense to try again."""


async def send(recipient: str, about: str) -> None:
    """Send a mail. Raises ServerBusy or AddressUnknown if it was not taken."""
    await asyncio.sleep(random.uniform(*SECONDS))  # noqa: S311  # not a secret
    if recipient.endswith(MISTYPED):
        raise AddressUnknown(f"550 <{recipient}>: no such mailbox")
    if random.random() < BUSY_SHARE:  # noqa: S311  # not a secret
        raise ServerBusy(f"421 too many connections, try {about!r} later")
