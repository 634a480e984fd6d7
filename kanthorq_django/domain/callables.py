"""What Django may do with a callable that it finds on an instance or on a queryset."""

from typing import Any


def alters_data(*verbs: Any, queryset_only: bool = False) -> None:
    """Let no template call ``verbs``, nor a manager have them if they are ``queryset_only``."""
    for verb in verbs:
        verb.alters_data = True
        if queryset_only:
            verb.queryset_only = True
