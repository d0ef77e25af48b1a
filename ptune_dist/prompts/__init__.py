"""Prompts: one file per method, how they start, and how they are stored. Floor 2."""
