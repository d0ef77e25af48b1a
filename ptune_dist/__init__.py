"""Distributed training of soft prompts against large frozen language models."""

__version__ = "0.1.0"
