"""What is said of arguments that cannot be what they are."""

from collections.abc import Iterable


class ArgumentError(ValueError):
    """Raised when an argument of a model or a block cannot be what it is."""


def check_choice(name: str, value: object, valid: Iterable[str]) -> None:
    """Checks an argument that is one of a few words.

    Raises:
        ArgumentError: If it is none of them; the message lists them.
    """
    valid = tuple(valid)
    if value not in valid:
        raise ArgumentError(f"{name}={value!r} is unknown, choose from {', '.join(valid)}.")
