"""Training objectives: rate against distortion."""
