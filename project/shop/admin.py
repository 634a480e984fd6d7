"""The shop's rows: facts that code wrote, to be read, and addresses, which may be corrected."""

from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.db.models import Model, QuerySet
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html

from project.shop.models import (
    Booking,
    Effect,
    Email,
    Order,
    Parcel,
    Payment,
    Refund,
    Sale,
    TillReport,
)

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[Any]
    _TabularInline = admin.TabularInline[Any, Any]
    _Mixin = admin.options.BaseModelAdmin[Any]
else:
    _ModelAdmin, _TabularInline, _Mixin = admin.ModelAdmin, admin.TabularInline, object


def tasks_link(term: str, text: str) -> str:
    """Return a link to the tasks that a search for ``term`` finds."""
    url = reverse("admin:kanthorq_django_task_changelist", query={"q": term})
    return format_html('<a href="{}">{}</a>', url, text)


class ReadOnly(_Mixin):
    """Nobody adds, changes or deletes."""

    def has_add_permission(self, request: HttpRequest, *_: Any) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


class EffectInline(ReadOnly, _TabularInline):
    fields = ["made_at", "amount", "task"]
    readonly_fields = ["made_at", "task"]
    can_delete = False
    extra = 0

    @admin.display(description="written by")
    def task(self, effect: Effect) -> str:
        return tasks_link(str(effect.event_id), "task")


class PaymentInline(EffectInline):
    model = Payment


class RefundInline(EffectInline):
    model = Refund


class BookingInline(EffectInline):
    model = Booking


class EmailInline(EffectInline):
    model = Email
    fields = ["made_at", "about", "recipient", "task"]


class ParcelInline(EffectInline):
    model = Parcel
    fields = ["made_at", "fate", "task"]


@admin.register(Sale)
class SaleAdmin(ReadOnly, _ModelAdmin):
    list_display = ["id", "opened_at", "placed_count", "declined_count"]


@admin.register(Order)
class OrderAdmin(ReadOnly, _ModelAdmin):
    """An order and all that came of it; its tasks can be resumed once its address is right."""

    list_display = ["key", "customer", "total", "status", "placed_at", "tasks"]
    list_filter = ["status", "sale"]
    search_fields = ["customer", "email", "pk"]
    show_full_result_count = False
    inlines = [PaymentInline, RefundInline, BookingInline, EmailInline, ParcelInline]
    fields = ["sale", "customer", "email", "total", "status", "placed_at", "reviewed_at", "tasks"]
    readonly_fields = ["sale", "customer", "total", "status", "placed_at", "reviewed_at", "tasks"]

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return super(ReadOnly, self).has_change_permission(request, obj)

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        """Find an order by its key as well."""
        return super().get_search_results(request, queryset, search_term.removeprefix("order-"))

    @admin.display
    def tasks(self, order: Order) -> str:
        return tasks_link(order.key, "tasks")


class EffectAdmin(ReadOnly, _ModelAdmin):
    """What handlers wrote, one row for each event."""

    list_select_related = ["order"]
    show_full_result_count = False
    readonly_fields = ["task", "made_at"]

    @admin.display(description="written by")
    def task(self, effect: Effect) -> str:
        return tasks_link(str(effect.event_id), "task")


@admin.register(Payment, Refund, Booking)
class MovementAdmin(EffectAdmin):
    list_display = ["id", "order", "amount", "task", "made_at"]
    fields = ["order", "amount", "task", "made_at"]


@admin.register(Email)
class EmailAdmin(EffectAdmin):
    list_display = ["id", "order", "about", "recipient", "task", "made_at"]
    fields = ["order", "about", "recipient", "task", "made_at"]


@admin.register(Parcel)
class ParcelAdmin(EffectAdmin):
    list_display = ["id", "order", "fate", "task", "made_at"]
    fields = ["order", "fate", "task", "made_at"]
    list_filter = ["fate"]


@admin.register(TillReport)
class TillReportAdmin(ReadOnly, _ModelAdmin):
    """What the till reported, each time its schedule was due."""

    list_display = ["id", "occurs_at", "made_at", "payment_count", "taken", "task"]
    fields = ["sale", "occurs_at", "made_at", "payment_count", "taken", "task"]
    readonly_fields = ["task", "made_at"]

    @admin.display(description="written by")
    def task(self, report: TillReport) -> str:
        return tasks_link(str(report.event_id), "task")
