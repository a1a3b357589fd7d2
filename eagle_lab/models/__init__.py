"""A target and its draft head, loaded and checked; prompts; the key/value cache. Knows what a checkpoint is."""
