"""Train learned image codecs from small to a billion parameters, and measure what scale buys."""

__version__ = "0.1.0"
