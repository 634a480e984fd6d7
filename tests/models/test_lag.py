from datetime import timedelta

import pytest

from kanthorq_django import publish, publish_many
from kanthorq_django.models import Consumer, Event
from kanthorq_django.models.delivery.cursor import Lag
from kanthorq_django.models.registration import Registration

pytestmark = pytest.mark.django_db(transaction=True)

NOTHING = Lag(0, is_bounded=False, oldest=None)


@pytest.fixture
def consumer() -> Consumer:
    return Consumer.objects.register("counted", Registration(stream="s", includes=["wanted.>"]))


def test_an_empty_stream_has_no_lag(consumer: Consumer):
    assert consumer.lag() == NOTHING


def test_lag_counts_unread_events_whether_they_match_or_not(consumer: Consumer):
    publish_many([Event(subject="wanted.a"), Event(subject="other.a")], stream="s")
    publish("wanted.a", stream="another")

    lag = consumer.lag()

    assert (lag.count, lag.is_bounded) == (2, False)
    assert lag.oldest is not None
    assert timedelta(0) <= lag.oldest < timedelta(minutes=1)


def test_lag_counts_no_further_than_its_limit(consumer: Consumer):
    publish_many([Event(subject="wanted.a") for _ in range(3)], stream="s")

    assert consumer.lag(limit=2)[:2] == (2, True)
    assert consumer.lag(limit=3)[:2] == (3, False)


def test_lag_shrinks_with_each_page_and_ends_at_nothing(consumer: Consumer):
    for _ in range(4):
        publish_many([Event(subject="wanted.a") for _ in range(2)], stream="s")
    counts = []
    while consumer.pull(limit=3):
        counts.append(consumer.lag().count)

    assert counts == [5, 2, 0]
    assert consumer.lag() == NOTHING


def test_lag_refuses_a_limit_that_is_no_count(consumer: Consumer):
    with pytest.raises(ValueError, match="limit must be 1 to 1,000,000, not 0"):
        consumer.lag(limit=0)
