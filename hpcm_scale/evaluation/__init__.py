"""Rate and distortion on sets of images."""
