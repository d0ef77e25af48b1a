"""From files to batches of token ids: sources -> template -> encode -> batches. Floor 2: knows no model, no prompt."""
