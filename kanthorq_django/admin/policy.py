"""Response headers of our pages: what a browser may load, run and frame there."""

import functools
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.templatetags.static import static

from kanthorq_django.conf import get_settings

HEADER = "Content-Security-Policy"
STYLE_SHEET = "kanthorq_django/admin.css"


def with_policy(view: Callable[..., HttpResponseBase]) -> Callable[..., HttpResponseBase]:
    """Let the responses of ``view`` carry strict headers, where the project has set none."""

    @functools.wraps(view)
    def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        response = view(request, *args, **kwargs)
        if not getattr(response, "xframe_options_exempt", False):
            response.headers.setdefault("X-Frame-Options", settings.X_FRAME_OPTIONS)
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        response.headers.setdefault("Referrer-Policy", "same-origin")
        if isinstance(response, HttpResponse) and _is_ours_to_set(request, response):
            response.headers.setdefault(HEADER, content_security_policy())
        return response

    return guarded


def content_security_policy() -> str:
    """Return the policy: nothing inline, nothing from elsewhere but the project's static files."""
    elsewhere = urlsplit(static(STYLE_SHEET))
    sources = "'self'" + (f" {elsewhere.scheme}://{elsewhere.netloc}" if elsewhere.netloc else "")
    framed_by = "'self'" if settings.X_FRAME_OPTIONS.upper() == "SAMEORIGIN" else "'none'"
    return (
        f"default-src {sources}; object-src 'none'; base-uri 'none'; form-action 'self'; "
        f"frame-ancestors {framed_by}"
    )


def _is_ours_to_set(request: HttpRequest, response: HttpResponse) -> bool:
    """Tell whether the policy is left to us: by the setting, the project and this response."""
    if not get_settings().ADMIN_CSP or hasattr(response, "_csp_config"):
        return False
    # What middlewares leave on a request: django-csp's, and that of Django 6, whose policy is
    # empty until the project writes one.
    has_django_csp = hasattr(request, "csp_nonce")
    has_policy = hasattr(request, "_csp_nonce") and getattr(settings, "SECURE_CSP", True)
    return not (has_django_csp or has_policy)
