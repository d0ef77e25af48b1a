"""The errors that a command reports in one line. They import nothing of ours, so every module may raise them."""


class UserError(Exception):
    """The user's mistake: the message names the file and the key or line, and the remedy. Exit status 2."""


class RunFault(Exception):
    """A fault while running (NaN loss, full disk): the message says what happened and what is kept. Exit status 1."""


class NodeFault(RunFault):
    """A node that cannot be used for training; `node` is its name."""

    def __init__(self, message: str, node: str):
        super().__init__(message)
        self.node = node

    def __reduce__(self):  # ranks send errors to each other
        return type(self), (self.args[0], self.node)
