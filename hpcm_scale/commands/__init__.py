"""The commands of `hpcm`, one file each."""
