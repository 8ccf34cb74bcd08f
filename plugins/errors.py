"""The one exception that is meant for the person at the terminal."""


class UserError(Exception):
    """Something the user can put right: one sentence saying what was expected, what was found and what to do.

    The command line prints the sentence and exits with code 2; it never prints a traceback for it.
    """


def reason(error: Exception) -> object:
    """What went wrong, without the number and the path that the system's errors name besides."""
    return getattr(error, "strerror", None) or error


def shown(value: object, most: int = 100) -> str:
    """A value as an error shows it: as Python writes it, cut off after ``most`` characters; never raises."""
    if isinstance(value, str | bytes):
        value = value[: most + 1]  # the whole may be gigabytes
    try:
        text = repr(value)
    except (ValueError, RecursionError, MemoryError):  # a number of too many digits, lists too deep
        text = f"a value of type {type(value).__name__} that is too long to be shown"
    return text if len(text) <= most else f"{text[:most]}…"
