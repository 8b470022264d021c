"""The one exception that stands for a mistake of the user's."""


class UserError(ValueError):
    """Something the user can put right: a field, a file, a value.

    The message is one line that names the field or file, what was found and what is allowed. The
    command prints it without a trace and exits with status 2; library code sees a ValueError.
    """
