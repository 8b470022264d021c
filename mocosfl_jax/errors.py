"""What can go wrong in a way that is told in one line and without a trace."""


class UserError(ValueError):
    """Something the user can put right: a field, a file, a value.

    The message is one line that names the field or file, what was found and what is allowed. The
    command prints it and exits with status 2; library code sees a ValueError.
    """


class NonFiniteError(ArithmeticError):
    """The loss or a parameter is not finite after the step that the message names."""
