"""HPCM: transforms, coding order, context model, and weights in and out."""
