"""What a process finds of itself, one JSON line on stdout; the first argument says how it ends."""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from hpcm_scale.errors import STOPPED


def facts() -> dict[str, object]:
    return {
        "arguments": sys.argv,
        "command": sys.orig_argv[1:],
        "module": [__name__, __spec__.name, sys.modules["__main__"].__spec__.name],
        "environment": dict(os.environ),
        "search path": sys.path,
        "folder": str(Path.cwd()),
        "signals": {name.name: str(signal.getsignal(name)) for name in signal.Signals},
        "threads": threading.active_count(),
        "open files": [number for number in range(3, 20) if Path(f"/proc/self/fd/{number}").exists()],
        "terminal": [stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)],
        "leads a session": os.getsid(0) == os.getpid() == os.getpgrp(),
    }


def main() -> None:
    atexit.register(print, "at exit")
    sys.stdout.write(json.dumps(facts()) + "\n")  # at once: two processes share it
    sys.stdout.flush()
    match next(argument for argument in sys.argv[1:] if not argument.startswith("--")):
        case "asleep":
            time.sleep(100)
        case "message":
            raise SystemExit("a message")
        case "code":
            raise SystemExit(STOPPED)
        case "busy":
            threading.Timer(0.2, print, ["of a thread"]).start()
        case "failure":
            raise ValueError("a failure")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "interrupted":
            os.kill(os.getpid(), signal.SIGINT)


main()
