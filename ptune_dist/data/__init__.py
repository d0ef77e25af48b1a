"""From files to batches of token ids: sources -> template -> encode -> batches. No model, no prompt."""
