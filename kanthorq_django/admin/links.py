"""Links to other pages, for those who may follow them."""

from collections.abc import Mapping
from typing import Any

from django.contrib.admin import AdminSite
from django.db.models import Model
from django.http import HttpRequest

from kanthorq_django.admin.display import link, page_url


class Links:
    """Links of the pages of one request; text alone where its user would only be refused.

    Each row that a page looks up has them: what displays a row is given nothing else.
    """

    def __init__(self, request: HttpRequest, site: AdminSite) -> None:
        self._request = request
        self._site = site
        self._answers: dict[type[Model], bool] = {}

    def to_row(self, model: type[Model], pk: object, text: object) -> str:
        """Return ``text`` as a link to the page of a row of ``model``."""
        return self._to(model, "change", text, pk)

    def to_list(self, model: type[Model], text: object, query: Mapping[str, str | int]) -> str:
        """Return ``text`` as a link to the rows of ``model`` that ``query`` selects."""
        return self._to(model, "changelist", text, query=query)

    def _to(self, model: type[Model], page: str, text: object, *args: object, **query: Any) -> str:
        if not self._may_view(model):
            return link(None, text)
        name = f"{model._meta.model_name}_{page}"
        return link(page_url(self._site.name, name, *args, **query), text)

    def _may_view(self, model: type[Model]) -> bool:
        """Ask the page's own admin, once: a project may have replaced ours, or its rule."""
        if model not in self._answers:
            self._answers[model] = self._site.is_registered(model) and (
                self._site.get_model_admin(model).has_view_permission(self._request)
            )
        return self._answers[model]


def links_of(row: Any) -> Links:
    """Return the links of ``row``, which a page of ours has looked up."""
    return row.links  # type: ignore[no-any-return]  # set by GuardedAdmin
