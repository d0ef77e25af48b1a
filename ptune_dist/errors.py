"""The ways in which a command ends badly, each said in one line. Floor 0: imports nothing of ours."""


class UserError(Exception):
    """The user's mistake: the message names the file and the key or line, and the mend. Exit status 2."""


class RunFault(Exception):
    """A fault while running (NaN loss, full disk): the message says what happened and what is kept. Exit status 1."""


class NodeFault(RunFault):
    """A node that is not fit to train on; `node` is its name."""

    def __init__(self, message: str, node: str):
        super().__init__(message)
        self.node = node

    def __reduce__(self):  # ranks send errors to each other
        return type(self), (self.args[0], self.node)
