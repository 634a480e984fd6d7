"""How large an answer may be: what did not fit into memory is not asked for again."""

from kanthorq_django.models.delivery.leased import BODIES_SIZE_MAX

ONE_TASK = 1  # byte: a body that is larger comes alone
SMALLEST = 2**20  # bytes; what small bodies need to come in hundreds


class AnswerSize:
    """Bytes of bodies that the next pull or claim may lease, as far as is known to fit."""

    def __init__(self) -> None:
        self.bytes_max = self._ceiling = BODIES_SIZE_MAX

    def fitted(self) -> None:
        self.bytes_max = min(2 * self.bytes_max, self._ceiling)

    def did_not_fit(self) -> None:
        """Go on with one task at a time, so that none is twice in an answer that is too large.

        Half of what was too much is enough for good: more would cost others an attempt.
        """
        self._ceiling = max(self._ceiling // 2, SMALLEST)
        self.bytes_max = ONE_TASK
