"""Questions of many runs: profile, planted delays, ladder, tree sizes, batches, mask sweep, correctness, the first investigation."""
