"""The one exception that is meant for the person at the terminal."""


class UserError(Exception):
    """Something the user can put right: one sentence saying what was expected, what was found and what to do.

    The command line prints the sentence and exits with code 2; it never prints a traceback for it.
    """


def reason(error: Exception) -> object:
    """What went wrong, without the number and the path that the system's errors name besides."""
    return getattr(error, "strerror", None) or error
