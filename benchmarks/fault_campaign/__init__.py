"""The fault campaign: what is done to real runs, and what is left of them; `benchmarks/faults.py` is its command."""
