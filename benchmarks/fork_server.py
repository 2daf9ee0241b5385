"""A process that has imported once what trainings import, and forks one whenever one is wanted.

To start `python -m hpcm_scale.train` takes seconds of imports, and to train a few steps hardly more than one; so tests
and fault campaigns, which start many, let them fork. Such a process is otherwise like a fresh one: its own session,
environment, working folder, arguments, search path, signals, standard streams and end. It differs in what Python
settles before it reads a module (PYTHONHASHSEED, the command line that `ps` shows), in what libraries read from the
environment on import (OMP_NUM_THREADS, DS_ACCELERATOR): these are the server's; and after its exit handlers it is gone
at once, without the destructors of what is left. For the CPU only: CUDA does not survive a fork.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Any

TRAINING = (
    "hpcm_scale.train",
    "hpcm_scale.commands.cooldown",
    "hpcm_scale.training.run",
    "hpcm_scale.training.engines.deepspeed",
    "hpcm_scale.training.engines.accelerate",
    # Imported by torch and DeepSpeed only when first called, and slow.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._inductor.compile_fx",
    "torch._refs",
)
"""What a training imports sooner or later."""
LONGEST_REQUEST = 2**17
"""Bytes."""
NOTICING_SECONDS = 1
"""DeepSpeed's launcher looks so often whether one of its processes has failed."""
GRACE_SECONDS = 30
"""From SIGTERM to SIGKILL for the others when one of several processes has failed, as DeepSpeed's launcher has it."""


class Forked:
    """A forked process, seen as `subprocess.Popen` shows one; what it says waits in `output`, two files or none.

    Of several processes it is the one that started them and waits for them. `pid` leads a session and its process
    group, so that `os.killpg` reaches all.
    """

    def __init__(self, args: list[str], status: int, output: Sequence[IO[Any]]) -> None:
        self.args = args
        self.returncode: int | None = None
        self._status = os.fdopen(status)
        self._output = output
        self.pid = int(self._line())

    def poll(self) -> int | None:
        """The exit code, minus the signal where one ended the process, or None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, at the end; `timeout` in seconds. Raises `subprocess.TimeoutExpired`."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self._line())
            self._status.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What was written to stdout and stderr, at the end: nothing where they went to a file that was given.

        Raises `subprocess.TimeoutExpired`.
        """
        self.wait(timeout)
        if not self._output:
            return "", ""
        for file in self._output:
            file.seek(0)
        out, err = (file.read() for file in self._output)
        return out, err

    def send_signal(self, number: int) -> None:
        """Send a signal to `pid` alone, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL to `pid` alone, if it runs."""
        self.send_signal(signal.SIGKILL)

    def _line(self) -> str:
        line = self._status.readline()
        if not line:
            raise RuntimeError("the fork server has ended")
        return line


class ForkServer:
    """Imports `preload`, modules by name, in a process with the environment `env`, and forks it on demand.

    Use it as a context; what it has forked outlives it.
    """

    def __init__(self, preload: Sequence[str], env: Mapping[str, str]) -> None:
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # Unbuffered, as processes are under DeepSpeed's launcher.
            command = [sys.executable, "-u", __file__, str(theirs.fileno()), *preload]
            streams = {"stdin": subprocess.DEVNULL, "pass_fds": [theirs.fileno()]}
            self._process = subprocess.Popen(command, env=env, start_new_session=True, **streams)

    @property
    def pid(self) -> int:
        """The process that forks."""
        return self._process.pid

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()
        self._process.wait()

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        cwd: str | Path,
        env: Mapping[str, str],
        processes: int = 1,
        output: IO[Any] | None = None,
    ) -> Forked:
        """Do what `python -m module arguments…` would, in the folder `cwd` with the environment `env`.

        The output goes to the file `output`, or waits for `Forked.communicate`. Several `processes` are started as one
        group, and stopped together, as by `deepspeed --num_gpus N --module module arguments…`.
        """
        request = {"module": module, "arguments": arguments, "cwd": str(cwd), "env": dict(env), "processes": processes}
        kept: list[IO[Any]] = []
        if output is None:
            kept = [tempfile.TemporaryFile("w+", encoding="utf-8") for _ in range(2)]  # noqa: SIM115 (read at the end)
        ours, theirs = os.pipe()
        try:
            descriptors = [*(file.fileno() for file in kept or (output, output)), theirs]
            socket.send_fds(self._connection, [json.dumps(request).encode()], descriptors)
        finally:
            os.close(theirs)
        return Forked([sys.executable, "-m", module, *arguments], ours, kept)


def serve(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork a process for each request and tell the other side its id and, at its end, its exit code.

    Returns in each forked process, with the request and the descriptors of its stdout and stderr.
    """
    running: dict[int, tuple[int, int]] = {}  # by a descriptor that can be read at the end: process id, where to tell
    while True:
        ready, _, _ = select.select([connection, *running], [], [])
        for descriptor in ready:
            if descriptor is connection:
                message, descriptors, _, _ = socket.recv_fds(connection, LONGEST_REQUEST, 3)
                if not message:
                    raise SystemExit
                pid = os.fork()
                if pid == 0:
                    connection.close()
                    for inherited in (descriptors[2], *running, *(status for _, status in running.values())):
                        os.close(inherited)
                    return json.loads(message), descriptors[:2]
                *output, status = descriptors
                for inherited in output:
                    os.close(inherited)
                running[os.pidfd_open(pid)] = pid, status
                _send(status, pid)
            else:
                pid, status = running.pop(descriptor)
                _send(status, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                os.close(status)
                os.close(descriptor)


def _send(descriptor: int, number: int) -> None:
    with suppress(BrokenPipeError):  # nobody is interested any more
        os.write(descriptor, f"{number}\n".encode())


def become(request: dict[str, Any], output: list[int]) -> None:
    """Make a process of the server one that was started to run the request's module."""
    os.setsid()
    for descriptor, number in zip(output, (1, 2), strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["cwd"])
    ours = _search_path(os.environ)
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[:] = [request["cwd"], *_search_path(os.environ), *(path for path in sys.path[1:] if path not in ours)]
    arguments, options = request["arguments"], []
    if request["processes"] > 1:
        rank = _fork_ranks(request["processes"])
        arguments, options = [f"--local_rank={rank}", *arguments], ["-u"]
    sys.argv = [request["module"], *arguments]  # runpy puts the file's path for the first
    sys.orig_argv = [sys.executable, *options, "-m", request["module"], *arguments]


def _search_path(env: Mapping[str, str]) -> list[str]:
    return [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]


def _fork_ranks(processes: int) -> int:
    """Start all processes of a launch and wait for them; returns in each of them its rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(WORLD_SIZE=str(processes), LOCAL_SIZE=str(processes))
    ranks = set()
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # until there is someone to pass them on
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            return rank
        ranks.add(pid)
    os._exit(_wait_for(ranks) % 256)


_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


def _wait_for(ranks: set[int]) -> int:
    """The exit code of the first that fails, or 0; passes on signals, and a failure is the end of the others.

    They have as long as DeepSpeed's launcher takes to notice, to say what they have to say and end by themselves.
    """

    def pass_on(number: int, frame: object) -> None:
        for pid in ranks:
            os.kill(pid, signal.SIGKILL if number == signal.SIGALRM else signal.SIGTERM)

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    failed, noticed = 0, 0.0
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG if noticed else 0)
        ranks.discard(pid)
        if status and not failed:
            failed, noticed = os.waitstatus_to_exitcode(status), time.monotonic() + NOTICING_SECONDS
        elif pid == 0 and time.monotonic() < noticed:
            time.sleep(0.01)
        elif pid == 0:
            noticed = 0.0
            pass_on(signal.SIGTERM, None)
            signal.alarm(GRACE_SECONDS)
    return failed


class Leaving:
    """The last of the exit handlers: ends the process without taking apart what it has imported.

    That takes longer than most of what is forked here: all pages are the server's, and would be copied first.
    """

    def __init__(self) -> None:
        self._code: int | None = None
        atexit.register(self._leave)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note the exit code with which Python ends a program that ends as this context does."""
        try:
            yield
            self._code = 0
        except SystemExit as end:
            self._code = end.code if isinstance(end.code, int) else int(end.code is not None)
            raise
        except KeyboardInterrupt:
            raise  # ends by the signal, not with a code
        except BaseException:
            self._code = 1
            raise

    def _leave(self) -> None:
        if self._code is not None:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(self._code & 0xFF)


def main() -> None:
    """The server: the descriptor of its connection and the modules to import."""
    leaving = Leaving()  # before any module registers an exit handler: the last comes first
    connection = socket.socket(fileno=int(sys.argv[1]))
    for name in sys.argv[2:]:
        import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a forked process would have all pages copied
    if len(threads := list(Path("/proc/self/task").iterdir())) > 1:
        raise RuntimeError(f"{len(threads) - 1} threads of what was imported would be missing after a fork")
    request, output = serve(connection)
    become(request, output)
    sys.modules.pop(request["module"], None)  # run as the main module, it is no import of that name
    with leaving.noting():
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
