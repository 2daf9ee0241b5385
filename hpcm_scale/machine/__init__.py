"""Machine receivers: networks that look at decoded pictures, and how to train codecs for them."""
