"""What is fuzzed: each target takes a Reader and fails by raising anything at all."""

from collections.abc import Callable, Mapping

from tests.fuzz.reader import Reader
from tests.fuzz.targets import commands, contents, declarations, schedules, subjects

Target = Callable[[Reader], None]

TARGETS: Mapping[str, Target] = {
    "subjects": subjects.one,
    "filters": subjects.filters,
    "envelopes": subjects.envelope,
    "bodies": contents.bodies,
    "metadata": contents.metadata,
    "redaction": contents.redaction,
    "pages": contents.pages,
    "failures": contents.failures,
    "rules": schedules.rules,
    "schedules": schedules.definitions,
    "form-times": schedules.form_moments,
    "subscribers": declarations.subscribers,
    "retries": declarations.retries,
    "settings": declarations.settings,
    "worker-options": declarations.worker_options,
    "arguments": commands.spellings,
    "command-lines": commands.lines,
    "command-bodies": commands.published_bodies,
}
