"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something outside the program is wrong: a flag, a file, a value.

    The message is one line that names the thing and the way out. Mains print it without a stack trace and leave with
    exit status 2; any other exception is a fault of the program.
    """
