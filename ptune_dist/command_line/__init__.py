"""The command line of `ptune-dist`: its parser, and what each command does."""
