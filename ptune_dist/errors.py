"""The two ways in which a command ends badly, each said in one line. Floor 0: imports nothing of ours."""


class UserError(Exception):
    """The user's mistake: the message names the file and the key or line, and the mend. Exit status 2."""


class RunFault(Exception):
    """A fault while running (NaN loss, full disk): the message says what happened and what is kept. Exit status 1."""
