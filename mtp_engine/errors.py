"""The exceptions that users are meant to read."""


class EngineError(Exception):
    """Something the user can mend: one line that says what is wrong, where, and what to do.

    The command line prints it without a traceback and leaves with exit code 2.
    """


class EngineBusy(EngineError):
    """Too many requests are waiting: nothing is wrong with this one, which may be tried again later."""
