"""The one exception that the command line shows as a plain line."""


class UserError(Exception):
    """Something the user can mend: printed as one clear line, exit code 2."""
