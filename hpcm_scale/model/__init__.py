"""The HPCM model: transforms, coding order, context model, sizes, and weights."""
