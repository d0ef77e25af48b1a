"""Every private or undocumented name of other libraries that the package uses: where, and what for.

The tables are `of_deepspeed.py`, `of_transformers.py` and `of_others.py`, each in groups by the file of ours that uses
the name. `tests/test_private_names.py` checks every row against the installed releases. To lean on a new name, add a
row to the group of its file. A row whose name the file no longer contains fails the test: remove it.
"""
