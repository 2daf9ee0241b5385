"""What coded images are worth to machines: agreement of networks with the original, and text that is read."""
