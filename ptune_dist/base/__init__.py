"""The frozen base: loading it, and what is known about its architecture. Floor 2."""
