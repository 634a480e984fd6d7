"""Streams: who reads them and how much is in them."""

from typing import Any

from django.contrib import admin
from django.db.models import Count, OuterRef, QuerySet, Subquery
from django.http import HttpRequest
from django.utils.html import format_html_join
from django.utils.translation import gettext_lazy as _

from kanthorq_django.admin.display import (
    NOTHING,
    Minimum,
    exact_moment,
    moment,
    number,
)
from kanthorq_django.admin.links import links_of
from kanthorq_django.admin.paginator import COUNT_MAX
from kanthorq_django.admin.readonly import ReadOnlyAdmin
from kanthorq_django.models import Consumer, Event, Stream


@admin.register(Stream)
class StreamAdmin(ReadOnlyAdmin):
    """A stream is made by its first publisher, and never edited."""

    list_display = ("name", "consumer_count", "newest_event", "created")
    ordering = ("name",)
    sortable_by = ("name",)
    search_fields = ("name",)
    fields = ("name", "consumers", "events", "newest_event", "created_exactly")

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        # The end of an index range for each stream, however long it is.
        newest = Event.objects.filter(stream=OuterRef("pk")).order_by("-xid", "-id")
        streams: QuerySet[Any] = (
            super()
            .get_queryset(request)
            .annotate(
                consumer_count=Count("consumers"),
                newest_event_at=Subquery(newest.values("created_at")[:1]),
            )
        )
        return streams

    @admin.display(description=_("consumers"))
    def consumer_count(self, stream: Any) -> str:
        query = {"stream__id__exact": stream.pk}
        return links_of(stream).to_list(Consumer, stream.consumer_count, query)

    @admin.display(description=_("newest event"))
    def newest_event(self, stream: Any) -> str:
        return moment(stream.newest_event_at)

    @admin.display(description=_("created"))
    def created(self, stream: Stream) -> str:
        return moment(stream.created_at)

    @admin.display(description=_("created"))
    def created_exactly(self, stream: Stream) -> str:
        return exact_moment(stream.created_at)

    @admin.display(description=_("consumers"))
    def consumers(self, stream: Stream) -> str:
        readers = Consumer.objects.filter(stream=stream).order_by("name")
        links = [(links_of(stream).to_row(Consumer, reader.pk, reader),) for reader in readers]
        return format_html_join(", ", "{}", links) or NOTHING

    @admin.display(description=_("events"))
    def events(self, stream: Stream) -> str:
        count = Event.objects.filter(stream=stream).values("pk")[: COUNT_MAX + 1].count()
        told = number(Minimum(COUNT_MAX) if count > COUNT_MAX else count)
        return links_of(stream).to_list(Event, told, {"stream__id__exact": stream.pk})
