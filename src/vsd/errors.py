"""The one exception that the command line turns into a single readable line."""


class VSDError(Exception):
    """A mistake the user can mend: the message says what is wrong and what to do about it."""
