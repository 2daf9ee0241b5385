"""`hpcm check`: measurements on the nodes of a job before a training."""
