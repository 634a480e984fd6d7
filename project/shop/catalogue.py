"""What is sold and to whom, drawn by chance."""

import random
from decimal import Decimal
from typing import NamedTuple

ARTICLES = {
    "espresso beans, 1 kg": Decimal("19.90"),
    "filter papers": Decimal("3.49"),
    "hand grinder": Decimal("64.00"),
    "milk jug": Decimal("17.25"),
    "moka pot": Decimal("32.95"),
    "porcelain cup": Decimal("8.50"),
    "pour-over kettle": Decimal("79.90"),
    "scale, 0.1 g": Decimal("41.75"),
}
FIRST_NAMES = ("Ada", "Amina", "Björn", "Chiara", "Dmitri", "Grace", "Jun", "Lucía", "Noor", "Olu")
LAST_NAMES = ("Adeyemi", "Bauer", "Conti", "Dubois", "Ito", "Kowalska", "Lind", "Moreau", "Ruiz")
CHANNELS = ("web", "app", "phone")
LINES_MAX = 4
QUANTITY_MAX = 3
MISTYPED_SHARE = 0.005  # of all customers give an address that does not exist
MISTYPED = "shop.invalid"


class Line(NamedTuple):
    """One article of a basket."""

    article: str
    quantity: int
    price: Decimal


class Basket(NamedTuple):
    """What a customer brings to the till."""

    customer: str
    email: str
    channel: str
    lines: tuple[Line, ...]

    @property
    def total(self) -> Decimal:
        return sum((line.quantity * line.price for line in self.lines), Decimal("0.00"))


def draw_basket(chance: random.Random) -> Basket:
    """Return the basket of some customer."""
    first, last = chance.choice(FIRST_NAMES), chance.choice(LAST_NAMES)
    domain = MISTYPED if chance.random() < MISTYPED_SHARE else "mail.example"
    articles = chance.sample(sorted(ARTICLES), chance.randint(1, LINES_MAX))
    return Basket(
        customer=f"{first} {last}",
        email=f"customer-{chance.randrange(10_000)}@{domain}",
        channel=chance.choice(CHANNELS),
        lines=tuple(
            Line(article, chance.randint(1, QUANTITY_MAX), ARTICLES[article])
            for article in articles
        ),
    )
