"""How fast, and with how much memory: paired runs of a baseline and what is to be better."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would announce itself on the terminal
