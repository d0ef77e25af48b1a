"""What every layer may use: durable files, and whether a hub can be reached. Imports no torch."""
