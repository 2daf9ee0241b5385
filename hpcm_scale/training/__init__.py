"""Training: the loop, the engines, resumable checkpoints, schedules, stop signals."""
