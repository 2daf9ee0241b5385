"""How fast, and with how much memory: paired runs of a baseline and what is to be better."""
