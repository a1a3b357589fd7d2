"""From a prompt to tokens: tree, masks, attention, strategy, cycle, session. Knows what a cycle is."""
