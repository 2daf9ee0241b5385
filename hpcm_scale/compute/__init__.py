"""Compute: FLOPs, launches and memory of a step, peak rates of hardware."""
