"""The error that the command lines show as one message, without a traceback."""


class UsageError(RuntimeError):
    """Raised when a command cannot run as asked: the message says why and what to do."""


class DataError(UsageError):
    """Raised when a file of a data set is damaged or does not fit the others."""
