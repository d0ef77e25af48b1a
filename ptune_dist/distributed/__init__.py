"""The process group, reductions over ranks, and errors that are raised on all ranks together."""
