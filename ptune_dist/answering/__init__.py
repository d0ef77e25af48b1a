"""More ways to be answered than `generate` of one prompt: many members of a sweep at once, and a chat in a terminal."""
