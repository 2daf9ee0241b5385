"""Laws of the loss: over parameters, over compute, over both, and along the cheapest path."""
