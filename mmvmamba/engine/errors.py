"""The error that the command lines show as one message, without a traceback."""


class UsageError(RuntimeError):
    """Raised when a command cannot run as asked: the message says why and what to do."""
