"""The ways a script ends badly, each with one line for its user."""


class UserError(Exception):
    """Something the user can put right before the work starts: the line is printed; the exit code is 2."""


class RunError(Exception):
    """A run that failed under way; the script prints the line and exits with code 1."""


class Collapsed(RunError):
    """A run that --stop_on_collapse ended; one of several seeds does not end the others."""
