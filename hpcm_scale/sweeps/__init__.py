"""Sweeps: training of many runs, and tables of their progress."""
