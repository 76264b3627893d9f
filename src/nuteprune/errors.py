"""The exceptions that the command line shows as a plain line."""


class UserError(Exception):
    """Something the user can mend: printed as one clear line, exit code 2."""


class RunFailed(Exception):
    """A run that began well and could not reach its end: printed as one line, exit code 1."""
