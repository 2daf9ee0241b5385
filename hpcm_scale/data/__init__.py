"""Data: building, verifying and streaming shards, and image sets for evaluation."""
