"""Scaling laws: runs are read, laws fitted to them, and the results reported, planned with and published."""
