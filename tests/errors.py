"""What the code of a project may raise."""


class Abort(BaseException):
    """No Exception, as asyncio's CancelledError is none, and errors of some test runners."""
