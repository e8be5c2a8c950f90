"""Generate hooks, one file each (single_turn, multi_turn, agentic), and what they share."""
