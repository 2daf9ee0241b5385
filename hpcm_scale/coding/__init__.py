"""Encode images to `.hpcm` files and decode them."""
