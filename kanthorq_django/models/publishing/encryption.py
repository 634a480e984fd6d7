"""Bodies at rest: encrypted where ``KANTHORQ["BODY_KEYS"]`` is set, and opened when they are read.

A sealed body is a mark and a Fernet token of its owner's id and the plain bytes: the id binds
it to its row, so that nobody who can write the table can put it under another event. Subject,
metadata, keys, results and errors stay clear.
"""

import functools
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID

from django.db import models
from django.db.models.query_utils import DeferredAttribute
from django.db.models.signals import post_save, pre_save

from kanthorq_django.conf import get_settings
from kanthorq_django.exceptions import ConfigurationError, UndecodableEvent
from kanthorq_django.models.publishing.body import MARK

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cryptography.fernet import MultiFernet

    _BinaryField = models.BinaryField[Any, bytes]
else:
    _BinaryField = models.BinaryField

_ID_SIZE = 16  # bytes of the id in front of the plain body
# The attribute that holds a sealed body until somebody opens it, and the id that it is bound to: a
# copy of the instance may get another id.
_SEALED = "_sealed_body"


def seal(owner: UUID, body: bytes) -> bytes:
    """Return ``body`` as it is stored under ``owner``: as it is, unless there are keys."""
    keys = get_settings().BODY_KEYS
    return MARK + fernet(keys).encrypt(owner.bytes + body) if keys else body


def unseal(owner: UUID, stored: bytes) -> bytes:
    """Return the plain body that was stored under ``owner``.

    Raises UndecodableEvent if no key fits, or if it was sealed for another owner.
    """
    if not is_sealed(stored):
        return stored
    from cryptography.fernet import InvalidToken

    keys = get_settings().BODY_KEYS
    try:
        plain = fernet(keys).decrypt(bytes(stored[len(MARK) :])) if keys else None
    except InvalidToken:
        plain = None
    if plain is None:
        raise UndecodableEvent(
            f"The body of {owner} is encrypted, and none of the {len(keys)} keys of "
            "KANTHORQ['BODY_KEYS'] opens it: a key is missing, or the body was altered."
        )
    if plain[:_ID_SIZE] != owner.bytes:
        raise UndecodableEvent(f"The body of {owner} was encrypted for another row.")
    return plain[_ID_SIZE:]


def is_sealed(stored: bytes) -> bool:
    """Tell whether ``stored`` is encrypted, by its mark."""
    return stored[: len(MARK)] == MARK


def is_sealed_with(key: str, stored: bytes) -> bool:
    """Tell whether ``stored`` is sealed, and with ``key``."""
    from cryptography.fernet import InvalidToken

    try:
        return is_sealed(stored) and bool(fernet((key,)).decrypt(bytes(stored[len(MARK) :])))
    except InvalidToken:
        return False


@functools.cache
def fernet(keys: tuple[str, ...]) -> "MultiFernet":
    """Return what encrypts with the first of ``keys`` and decrypts with any of them.

    Raises ConfigurationError without the library, or for a key that is none.
    """
    try:
        from cryptography.fernet import Fernet, MultiFernet
    except ImportError as error:
        raise ConfigurationError(
            "KANTHORQ['BODY_KEYS'] needs cryptography: install the extra 'encryption', or "
            "pip install cryptography"
        ) from error
    try:
        return MultiFernet([Fernet(key) for key in keys])
    except ValueError as error:
        raise ConfigurationError(
            "KANTHORQ['BODY_KEYS'] holds what is no key; make one with: python -c 'from "
            "cryptography.fernet import Fernet; print(Fernet.generate_key().decode())'"
        ) from error


class _BodyAttribute(DeferredAttribute):
    """Opens a sealed body on its first use; a plain one is in the instance, where Python looks."""

    def __get__(self, instance: Any, cls: Any = None) -> Any:
        if instance is None:
            return self
        held = instance.__dict__
        sealed = held.get(_SEALED) or (instance.pk, _read(instance, self.field.attname))
        held[_SEALED] = sealed  # stays, if it cannot be opened
        held[self.field.attname] = unseal(*sealed)
        held.pop(_SEALED, None)  # another thread may have been faster
        return held[self.field.attname]


def _read(instance: Any, column: str) -> bytes:
    """Return a deferred body as it is stored."""
    stored = type(instance)._base_manager.using(instance._state.db).filter(pk=instance.pk)
    return bytes(stored.values_list(column, flat=True).get())


class BodyField(_BinaryField):
    """Plain bytes in Python; sealed in the table, where there are keys."""

    descriptor_class = _BodyAttribute

    def deconstruct(self) -> Any:
        """Be a BinaryField to migrations: the column is one."""
        name, _, args, kwargs = super().deconstruct()
        return name, "django.db.models.BinaryField", args, kwargs

    def pre_save(self, model_instance: models.Model, add: bool) -> Any:
        return seal(model_instance.pk, bytes(super().pre_save(model_instance, add)))


class SealableModel(models.Model):
    """A row with a ``body``, and an id that it is bound to."""

    class Meta:
        abstract = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        pre_save.connect(_seal_loaded, sender=cls)
        post_save.connect(_forget_sealed, sender=cls)

    @classmethod
    def from_db(cls, *args: Any, **kwargs: Any) -> Self:
        """Set a sealed body aside: one that cannot be opened is its reader's trouble alone."""
        row = super().from_db(*args, **kwargs)
        if is_sealed(row.__dict__.get("body", b"")):
            row.__dict__[_SEALED] = row.pk, row.__dict__.pop("body")
        return row

    def refresh_from_db(
        self,
        using: str | None = None,
        fields: "Iterable[str] | None" = None,
        from_queryset: Any = None,
    ) -> None:
        """Forget the body as well; it is read again when somebody wants it."""
        named = None if fields is None else list(fields)
        if named is None or "body" in named:
            self.__dict__.pop("body", None)
            self.__dict__.pop(_SEALED, None)
        super().refresh_from_db(using, named, from_queryset)

    def unread_columns(self) -> set[str]:
        """Return the deferred columns; a sealed body was read."""
        return self.get_deferred_fields() - ({"body"} if _SEALED in vars(self) else set())


def _seal_loaded(instance: SealableModel, *, raw: bool, **_: Any) -> None:
    """Seal a body that comes from a fixture: ``loaddata`` writes columns past ``pre_save()``."""
    held = instance.__dict__
    if raw and "body" in held and not is_sealed(bytes(held["body"])):
        held["body"] = seal(instance.pk, bytes(held["body"]))


def _forget_sealed(instance: SealableModel, *, raw: bool, **_: Any) -> None:
    """Let the instance be read as before; its body is opened when somebody wants it."""
    held = instance.__dict__
    if raw and is_sealed(bytes(held.get("body", b""))):
        held[_SEALED] = instance.pk, held.pop("body")
