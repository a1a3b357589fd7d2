"""Questions of many runs: profile, planted delays, ladder, tree sizes, how a cycle scales, mask sweep, correctness, seed."""
