"""Errors that a user can correct. The command line prints their message as one line, without a traceback."""


class VSDError(Exception):
    """Base class: the message names the mistake and the remedy."""


class ConfigurationError(VSDError):
    """An option, a recipe or a combination of settings that cannot work."""


class DataError(VSDError):
    """A file, a line or a conversation that cannot be read or trained on."""


class TargetError(VSDError):
    """A target that cannot be loaded, or whose architecture is not supported."""


class MismatchError(VSDError):
    """Things that do not belong together: a drafter or a feature store of another target, a resumed run of another."""


class FileError(VSDError):
    """A file or a folder that cannot be written: a full disk, missing permissions."""


def in_a_line(error: BaseException) -> str:
    """The class and the message of an error of another package, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")
