"""Entropy models: how many bits a quantized latent costs."""
