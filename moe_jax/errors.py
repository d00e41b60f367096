"""The error that commands show as one line: the person who asked can mend it, and the message says how."""


class MendableError(Exception):
    """What was wrong, where, what was expected and what to do, in one line."""
