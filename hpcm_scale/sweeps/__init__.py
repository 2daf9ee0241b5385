"""Sweeps: Hydra launchers that train many runs, and tables of their progress."""
