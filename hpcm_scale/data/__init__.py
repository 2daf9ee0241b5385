"""Photos in: building, verifying and streaming shards, and plain image sets for evaluation."""
