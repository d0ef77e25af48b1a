"""The Python API beside the command: the same work in one process, with exceptions in place of exit statuses.

Nothing here starts ranks: a script under torchrun may call it in every rank, a notebook has a world of one.
"""
