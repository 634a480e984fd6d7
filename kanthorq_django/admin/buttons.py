"""Verbs as buttons on a row's page, for those who have the permission of that name alone."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Protocol

from django.contrib.auth import get_permission_codename
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import URLPattern, path, reverse
from django.utils.functional import Promise
from django.views.decorators.http import require_POST

from kanthorq_django.admin.readonly import GuardedAdmin


class Button(Protocol):
    """What ``button`` does: ``action`` names its URL, ``verb`` the permission that it needs."""

    @property
    def action(self) -> str: ...
    @property
    def verb(self) -> str: ...
    @property
    def button(self) -> str | Promise: ...


class ButtonsAdmin(GuardedAdmin):
    """Has a URL for each of ``operations``, and a button where it would change the row."""

    operations: ClassVar[Sequence[Button]]

    def offered(self, row: Any) -> Iterable[Button]:
        """Return the operations that would change ``row``."""
        raise NotImplementedError

    def operate_on(self, row: Any, operation: Any, request: HttpRequest) -> HttpResponse | None:
        """Do it to ``row`` alone, and tell who asked for it; or return a page that asks first."""
        raise NotImplementedError

    def may(self, request: HttpRequest, verb: str) -> bool:
        """Tell whether the user has the permission of that name."""
        codename = get_permission_codename(verb, self.opts)
        return self.has_view_permission(request) and request.user.has_perm(
            f"{self.opts.app_label}.{codename}"
        )

    def back_to(self, row: Any, request: HttpRequest) -> str:
        """Return the address of the page of ``row``, as the button's own was filtered."""
        query = request.GET.urlencode()
        return self._url("change", row.pk) + (f"?{query}" if query else "")

    def get_urls(self) -> list[URLPattern]:
        return [
            path(
                f"<path:object_id>/{operation.action}/",
                self.admin_site.admin_view(require_POST(self._view_of(operation))),
                name=f"{self.opts.app_label}_{self.opts.model_name}_{operation.action}",
            )
            for operation in self.operations
        ] + super().get_urls()

    def render_change_form(
        self, request: HttpRequest, context: dict[str, Any], *args: Any, **kwargs: Any
    ) -> HttpResponse:
        row = context["original"]
        if row is not None:
            context["operations"] = [
                (operation, self._url(operation.action, row.pk))
                for operation in self.offered(row)
                if self.may(request, operation.verb)
            ]
        return super().render_change_form(request, context, *args, **kwargs)

    def _view_of(self, operation: Button) -> Callable[..., HttpResponse]:
        def operate(request: HttpRequest, object_id: str) -> HttpResponse:
            if not self.may(request, operation.verb):
                raise PermissionDenied
            row = self.get_object(request, object_id)
            if row is None:
                raise Http404
            asked = self.operate_on(row, operation, request)
            return asked or HttpResponseRedirect(self.back_to(row, request))

        return operate

    def _url(self, page: str, pk: object) -> str:
        name = f"admin:{self.opts.app_label}_{self.opts.model_name}_{page}"
        return reverse(name, args=(pk,), current_app=self.admin_site.name)
