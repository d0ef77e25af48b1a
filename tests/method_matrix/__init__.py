"""What each method allows in each family of bases, tried with real runs: the table of docs/methods.md."""
