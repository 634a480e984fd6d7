"""Handlers for contestants that call plain functions; ten run at a time, as in KanthorQ."""

from benchmarks.peers import django_app
from benchmarks.peers.board import board, stopwatch

HANDLERS_AT_A_TIME = 10


def warm(number: int) -> None:
    """Do nothing, for publications that are not measured."""


def noop(number: int) -> None:
    board().mark(number)


def insert(number: int) -> None:
    django_app.insert_effect(number)


def ping(number: int) -> None:
    stopwatch().handled(number)
