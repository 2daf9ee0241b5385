"""Tracking: the journal, its wandb view, progress bars and the environment of a run."""
