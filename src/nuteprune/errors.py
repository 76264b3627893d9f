"""The exceptions that the command line shows as one line, and what any exception says in one."""


class UserError(Exception):
    """Something the user can mend: printed as one clear line, exit code 2."""


class RunFailed(Exception):
    """A run that began well and could not reach its end: printed as one line, exit code 1."""


class Interrupted(Exception):
    """A run that was asked to stop, and has saved its state.

    Args:
        message: what was saved, and how to go on.
        signal: number of the signal that asked.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def in_one_line(error: BaseException) -> str:
    """Return what an exception says without line breaks; its type's name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
