"""The one exception that users are meant to read."""


class EngineError(Exception):
    """Something the user can mend: one line that says what is wrong, where, and what to do.

    The command line prints it without a traceback and leaves with exit code 2.
    """
