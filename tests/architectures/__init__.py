"""A survey of all architectures that transformers has: tiny random bases, and what of ptune-dist works on each."""
