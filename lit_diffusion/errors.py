"""The two kinds of failure that a person should read as one line."""


class UserError(Exception):
    """Something the user can mend: a wrong key, a missing file, a step that must diverge.

    The message is one line: what is wrong, with the name and the value, and how to mend it. The command line prints it
    without a traceback and exits with code 2; in a notebook it is an ordinary exception.
    """
