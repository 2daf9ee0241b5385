"""Photos to `.hpcm` files and back."""
