"""What is done with a prompt: evaluate, generate, validate a config, compare."""
