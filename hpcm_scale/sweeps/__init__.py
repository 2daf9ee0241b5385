"""Sweeps: Hydra launchers that train many runs, and tables of their progress.

hydra-submitit-launcher is not used for Slurm: its jobs are pickled functions for whose results the command waits, while
this one submits scripts that requeue themselves and can be edited, and exits.
"""
