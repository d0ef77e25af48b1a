"""The prompts' own training state: gradient sum, clipping, optimizers, learning-rate schedules, loss scale."""
