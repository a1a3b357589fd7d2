"""Questions of many runs: profile, planted delays, ladder, tree sizes, batches, long contexts, mask sweep, correctness, the first investigation."""
