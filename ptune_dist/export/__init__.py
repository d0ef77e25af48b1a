"""Exports of trained prompts that need the base: an ordinary model whose tokens are the prompts, keys and values."""
