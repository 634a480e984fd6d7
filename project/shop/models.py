"""Orders, and one row for each thing that happened to them.

Payments, refunds and bookings are written by handlers, in the transaction that ends their task.
Nothing here keeps a second row for the same event from being written, no constraint and no look
before the insert: whether each is there exactly once is what the demo finds out. E-mails leave
the database, so that they are recognised by the id of their event.
"""

from django.db import models
from django.db.models.functions import Now


class Sale(models.Model):
    """A day on which the shop is open; each run of the demo is one."""

    opened_at = models.DateTimeField(db_default=Now(), editable=False)
    # What customers were told at the till; whether the rows agree is another question.
    placed_count = models.PositiveIntegerField(default=0)
    declined_count = models.PositiveIntegerField(default=0)
    # When its till is to report, which a schedule is told as well.
    report_at = models.DateTimeField(null=True, blank=True)

    def __str__(self) -> str:
        return f"sale {self.pk}"


class Order(models.Model):
    """What a customer ordered, and how far it has come."""

    class Status(models.TextChoices):
        PLACED = "placed"
        PAID = "paid"
        CANCELLED = "cancelled"

    sale = models.ForeignKey(Sale, models.CASCADE, related_name="orders")
    customer = models.CharField(max_length=100)
    email = models.EmailField()
    total = models.DecimalField(max_digits=10, decimal_places=2)
    status = models.CharField(max_length=10, choices=Status, default=Status.PLACED)
    reviewed_at = models.DateTimeField(null=True, blank=True)
    placed_at = models.DateTimeField(db_default=Now(), editable=False)

    def __str__(self) -> str:
        return self.key

    @property
    def key(self) -> str:
        """What events and tasks about this order carry as their ``resource_key``."""
        return f"order-{self.pk}"


class Effect(models.Model):
    """What a handler wrote for one event."""

    order = models.ForeignKey(Order, models.CASCADE, related_name="%(class)ss")
    event_id = models.UUIDField(db_index=True)
    made_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        abstract = True

    def __str__(self) -> str:
        return f"{self._meta.verbose_name} of {self.order}"


class Movement(Effect):
    """An effect that is about money, in euros."""

    amount = models.DecimalField(max_digits=10, decimal_places=2)

    class Meta(Effect.Meta):
        abstract = True


class Payment(Movement):
    """Money that came in."""


class Refund(Movement):
    """Money that went back."""


class Booking(Movement):
    """A line of the ledger: money in is positive, money back negative."""


class Email(Effect):
    """A mail that the mail server took."""

    event_id = models.UUIDField(unique=True)
    recipient = models.EmailField()
    about = models.CharField(max_length=255)


class Parcel(Effect):
    """What became of a parcel that was packed."""

    class Fate(models.TextChoices):
        SENT = "sent"
        UNPACKED = "unpacked"

    fate = models.CharField(max_length=10, choices=Fate)


class TillReport(models.Model):
    """What had come in when the till reported; ``occurs_at`` is when it was to."""

    sale = models.ForeignKey(Sale, models.CASCADE, related_name="reports")
    event_id = models.UUIDField()
    occurs_at = models.DateTimeField()
    made_at = models.DateTimeField(db_default=Now(), editable=False)
    payment_count = models.PositiveIntegerField()
    taken = models.DecimalField(max_digits=10, decimal_places=2)

    def __str__(self) -> str:
        return f"till report of {self.sale} at {self.occurs_at}"
