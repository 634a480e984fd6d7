"""What the pages of all nouns share; most of them show and never edit."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from django.contrib import admin
from django.contrib.admin import SimpleListFilter
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.views.main import ChangeList
from django.core.exceptions import BadRequest, FieldDoesNotExist, PermissionDenied, ValidationError
from django.db import router
from django.db.models import Model, QuerySet
from django.http import HttpRequest, HttpResponse
from django.urls import URLPattern
from django.utils.functional import Promise
from django.utils.text import capfirst

from kanthorq_django.admin.display import NOTHING
from kanthorq_django.admin.links import Links
from kanthorq_django.admin.paginator import BoundedPaginator
from kanthorq_django.admin.policy import with_policy

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[Any]
else:
    _ModelAdmin = admin.ModelAdmin


class RelatedFilter(admin.RelatedFieldListFilter):
    """Filters by a related row, also when there is only one to choose from.

    Django drops such a filter, and with it what a link asked for.
    """

    def has_output(self) -> bool:
        return True


class GuardedAdmin(_ModelAdmin):
    """Counts and looks up no more than it has to, and refuses what no page of ours sends."""

    paginator = BoundedPaginator
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER  # each facet would be a full count
    empty_value_display = NOTHING
    list_per_page = 100
    list_max_show_all = 100
    # Lookups that links of other pages use, beside those of list_filter.
    linked_lookups: tuple[str, ...] = ()

    class Media:
        css = {"all": ("kanthorq_django/admin.css",)}

    @property
    def urls(self) -> list[URLPattern]:
        """Every page of ours, also those that subclasses add, with strict headers."""
        patterns = self.get_urls()
        for pattern in patterns:
            pattern.callback = with_policy(pattern.callback)
        return patterns

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """Show what a router's replica has, and change what the primary has."""
        rows: QuerySet[Any] = super().get_queryset(request)
        return rows.using(router.db_for_write(self.model)) if request.method == "POST" else rows

    def get_changelist_instance(self, request: HttpRequest) -> ChangeList:
        listed = super().get_changelist_instance(request)
        links = Links(request, self.admin_site)
        for row in listed.result_list:
            row.links = links
        return listed

    def get_object(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        row: Any = super().get_object(request, *args, **kwargs)
        if row is not None:
            row.links = Links(request, self.admin_site)
        return row

    def lookup_allowed(self, lookup: str, value: str, request: HttpRequest) -> bool:
        """Allow only what the page itself links to.

        Django allows every lookup on a model's own columns, which would let those guess a
        body, letter by letter, who must not see it.
        """
        if lookup in self._offered_lookups(request):
            return True
        try:
            self.opts.get_field(lookup.split("__", maxsplit=1)[0])
        except FieldDoesNotExist:
            return True  # Django answers those with the unfiltered page.
        return False

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        if request.method == "POST":
            self._check_action(request)
        title = capfirst(self.opts.verbose_name_plural)
        return super().changelist_view(request, {"title": title} | (extra_context or {}))

    def _offered_lookups(self, request: HttpRequest) -> set[str]:
        offered = set(self.linked_lookups)
        for item in self.get_list_filter(request):
            if isinstance(item, type) and issubclass(item, SimpleListFilter):
                offered.add(str(item.parameter_name))
                continue
            field = item[0] if isinstance(item, tuple) else item
            offered |= {f"{field}__exact", f"{field}__id__exact", f"{field}__isnull"}
        return offered

    def _check_action(self, request: HttpRequest) -> None:
        """Refuse a hand-made request; Django would quietly show the list instead.

        Raises PermissionDenied for an action that is not offered, BadRequest for ids that
        are none.
        """
        asked = {action for action in request.POST.getlist("action") if action}
        if not asked <= self.get_actions(request).keys():
            raise PermissionDenied
        for selected in request.POST.getlist(ACTION_CHECKBOX_NAME):
            try:
                self.opts.pk.to_python(selected)
            except ValidationError as error:
                raise BadRequest("A selected id is not valid.") from error


class ReadOnlyAdmin(GuardedAdmin):
    """Rows belong to code and workers: nobody adds, changes or deletes them by hand.

    ``labels`` and ``help_texts`` are of columns that their names do not explain.
    """

    labels: ClassVar[Mapping[str, str | Promise]] = {}
    help_texts: ClassVar[Mapping[str, str | Promise]] = {}

    def get_form(
        self, request: HttpRequest, obj: Model | None = None, change: bool = False, **kwargs: Any
    ) -> Any:
        named = {"labels": self.labels, "help_texts": self.help_texts}
        return super().get_form(request, obj, change, **named | kwargs)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False
