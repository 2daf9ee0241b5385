"""Train learned image codecs from small to a billion parameters, and measure what scale buys."""

import os

__version__ = "0.1.0"

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would announce itself; read when torch is imported
