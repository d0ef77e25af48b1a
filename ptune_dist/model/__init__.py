"""The prompted model: the layout of segments, attention over them, contexts and their cache, the head at targets."""
