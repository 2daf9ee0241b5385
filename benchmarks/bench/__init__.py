"""Benchmarks of training, coding and their parts: `hpcm bench`."""
