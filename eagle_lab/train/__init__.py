"""A draft head of your own: text that the target writes, training-time test, checkpoints."""
