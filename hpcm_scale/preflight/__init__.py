"""Checks of a cluster before a training: links, devices, data, one step."""
