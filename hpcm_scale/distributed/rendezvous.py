"""Start-up of a run: the ranks connect to one key-value store and compare configuration, versions and data."""

from __future__ import annotations

import atexit
import json
import os
import platform
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed
from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, Store, TCPStore, distributed_c10d

from hpcm_scale import __version__
from hpcm_scale.devices import CUDA
from hpcm_scale.distributed.processes import Launcher, RankInfo, format_ranks, gpu_index, world_size
from hpcm_scale.errors import Fault, UserError

POLL_SECONDS = 0.05
REFUSED_SECONDS = 10.0
"""How long a rank that cannot take part waits for the others, to share its error."""
READ_SECONDS = 5.0
"""How long rank 0, which hosts the store, waits for the others to read a result."""
_STORE_SECONDS = 30.0
"""Time-out of a request to the store."""

Facts = Mapping[str, Mapping[str, Any]]
"""JSON values by name, grouped by the keys of `_REMEDIES`."""
_REMEDIES = {
    "version": "install the same versions on all nodes",
    "launch": "start all nodes with the same hostfile and numbers",
    "setting": "run the same command on all nodes",
    "images": "give all nodes the same shards",
    "run folder": "put run.dir on a file system shared by all nodes",
}


def facts(settings: Mapping[str, Any], data_digest: str) -> dict[str, Mapping[str, Any]]:
    """Versions, launch, configuration (`settings`) and data, which must be the same on all ranks."""
    packages = {name: version(name) for name in ("torch", "deepspeed", "accelerate")}
    return {
        "version": {"Python": platform.python_version(), "hpcm_scale": __version__} | packages,
        "launch": {"WORLD_SIZE": str(world_size())},
        "setting": settings,
        "images": {"digest": data_digest},
    }


def difference(ranks: Sequence[RankInfo], all_facts: Sequence[Facts]) -> UserError | None:
    """The first difference from the facts of rank 0, as an error with a remedy; None if there is none."""
    for rank, other in zip(ranks[1:], all_facts[1:], strict=True):
        for kind, expected in all_facts[0].items():
            for name, here, there in differences(expected, other.get(kind)):
                return UserError(
                    "ranks-differ", name, f"{rank} has {name}={there}, but {ranks[0]} has {here}; {_REMEDIES[kind]}"
                )
    return None


def differences(one: Any, other: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name and both values of each entry of nested dictionaries that differs; None for a missing value."""
    nested = [value if isinstance(value, dict) else {} for value in (one, other)]
    for key in nested[0] | nested[1]:
        yield from differences(nested[0].get(key), nested[1].get(key), f"{name}.{key}" if name else key)
    if not (nested[0] or nested[1]) and one != other:
        yield name, one, other


def polling(seconds: float) -> Iterator[None]:
    """Yield every POLL_SECONDS until `seconds` have passed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield
        time.sleep(POLL_SECONDS)


class Group:
    """The ranks of one launch, connected by a key-value store that rank 0 hosts.

    All ranks call the public methods in the same order.
    """

    def __init__(self, address: tuple[str, int], seconds: float) -> None:
        """Connect to the store at `address`, within `seconds`. Raises UserError if that fails."""
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.launcher = Launcher()
        self.members: list[RankInfo] = []
        self.failed = False
        """Whether a training has failed, so that other ranks may be gone."""
        self._address = address
        self._exchanges = 0
        # torchrun keeps the store when it restarts the ranks.
        prefix = f"hpcm_scale/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        self.store: Store = PrefixStore(prefix, self._connect(time.monotonic() + seconds))
        me = json.dumps(RankInfo.of_this_process(self.rank))
        if self.store.compare_set(f"rank/{self.rank}", "", me) != me.encode():
            host, port = address
            raise UserError(
                "port-of-another-run",
                "--master_port",
                f"port {port} of {host} is used by another run; choose another with --master_port (or MASTER_PORT)",
            )

    def hosts_store(self, rank: int) -> bool:
        """Whether `rank` hosts the store: rank 0, unless torchrun does."""
        return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def compare(self, facts: Facts, seconds: float = 60.0, error: UserError | None = None) -> None:
        """Wait at most `seconds` for all ranks, then compare their facts with those of rank 0.

        `error`: why this rank cannot take part. Raises UserError, the same on all ranks that came, if a rank is
        missing, has an error, or has different facts.
        """
        entry = {"rank": RankInfo.of_this_process(self.rank), "facts": facts, "error": error and error.args}
        name = self._begin_exchange()
        self.store.set(f"{name}/{self.rank}", json.dumps(entry))
        if error:
            self.store.add(f"{name}/refused", 1)
        self.store.add(f"{name}/came", 1)
        result = self._result(name, lambda: self._compare(name, seconds), seconds + 2 * REFUSED_SECONDS)
        self.members = [RankInfo(*values) for values in result["members"]]

    def on_rank_zero(self, action: Callable[[], None], seconds: float = 600.0) -> None:
        """Run `action` on rank 0 while the others wait; its UserError is raised on all ranks."""

        def act() -> dict[str, Any]:
            try:
                action()
            except UserError as error:
                return {"error": error.args}
            return {}

        self._result(self._begin_exchange(), act, seconds)

    def await_readers(self, name: str, readers: int) -> None:
        """Have rank 0, whose end closes the store, wait until `readers` ranks have called this."""
        with suppress(DistNetworkError, DistStoreError):
            self.store.add(f"{name}/read", 1)
            for _ in polling(READ_SECONDS):
                if self.rank != 0 or self.store.add(f"{name}/read", 0) >= readers:
                    return

    def _connect(self, deadline: float) -> TCPStore:
        host, port = self._address
        hosts = self.hosts_store(self.rank)
        if not hosts:
            self._await_answer(deadline)
        try:
            return TCPStore(
                host, port, is_master=hosts, wait_for_workers=False, timeout=timedelta(seconds=_STORE_SECONDS)
            )
        except (DistNetworkError, DistStoreError) as error:
            if "EADDRINUSE" in str(error):
                raise UserError(
                    "port-in-use",
                    "--master_port",
                    f"port {port} of this node is in use; choose another with --master_port (or MASTER_PORT)",
                ) from None
            cause = "MASTER_ADDR must be the node of rank 0" if hosts else "another program may use the port"
            raise UserError(
                "no-store",
                "--master_addr",
                f"rank {self.rank} on {socket.gethostname()} finds no run at {host}:{port}: {cause}; give another "
                "--master_addr or --master_port",
            ) from None

    def _await_answer(self, deadline: float) -> None:
        """Wait until the port accepts connections; torch's own waiting prints many lines."""
        while True:
            try:
                socket.create_connection(self._address, timeout=5).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    host, port = self._address
                    raise UserError(
                        "no-answer",
                        "--master_addr",
                        f"rank {self.rank} on {socket.gethostname()} got no response from rank 0 at {host}:{port} "
                        f"({error.strerror or error}); start it, or correct --master_addr",
                    ) from None
            self._check_launcher()
            time.sleep(4 * POLL_SECONDS)

    def _begin_exchange(self) -> str:
        self._exchanges += 1
        return f"exchange{self._exchanges}"

    def _compare(self, name: str, seconds: float) -> dict[str, Any]:
        """On rank 0: wait for all ranks and compare what they sent."""
        deadline = time.monotonic() + seconds
        while (came := self.store.add(f"{name}/came", 0)) < self.world_size and time.monotonic() < deadline:
            if self.store.add(f"{name}/refused", 0):
                deadline = min(deadline, time.monotonic() + REFUSED_SECONDS)
            self._check_launcher()
            time.sleep(POLL_SECONDS)
        ranks = range(self.world_size)
        present = [rank for rank in ranks if came == self.world_size or self.store.check([f"{name}/{rank}"])]
        entries = [json.loads(self.store.get(f"{name}/{rank}")) for rank in present]
        members = [RankInfo(*entry["rank"]) for entry in entries]
        errors = {tuple(entry["error"]): rank for entry, rank in zip(entries, members, strict=True) if entry["error"]}
        if errors:
            (code, key, sentence), rank = next(iter(errors.items()))
            same = len(errors) == 1 and all(entry["error"] for entry in entries)
            found = code, key, sentence if same else f"{rank}: {sentence}"
        elif len(members) < self.world_size:
            found = self._missing([rank for rank in ranks if rank not in present], members, seconds).args
        else:
            error = difference(members, [entry["facts"] for entry in entries])
            found = error and error.args
        return {"members": members, "came": len(members), "error": found}

    def _missing(self, missing: Sequence[int], members: Sequence[RankInfo], seconds: float) -> UserError:
        hosts = dict.fromkeys(rank.host for rank in members)
        ranks_of = {host: format_ranks([rank.rank for rank in members if rank.host == host]) for host in hosts}
        came = "; ".join(f"{ranks} from {host}" for host, ranks in ranks_of.items())
        return UserError(
            "missing-ranks",
            "engine.init_timeout",
            f"{format_ranks(missing)} of {self.world_size} did not connect within {seconds / 60:g} minutes ({came} "
            "did); start the missing node, or raise engine.init_timeout",
        )

    def _result(self, name: str, work: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
        """The result of `work`, which rank 0 does; every rank returns it, or raises its UserError."""
        key = f"{name}/result"
        try:
            if self.rank == 0:
                result = work()
                self.store.set(key, json.dumps(result))
            else:
                deadline = time.monotonic() + seconds
                while not self.store.check([key]):
                    if time.monotonic() > deadline:
                        raise Fault(
                            "rank-zero-silent",
                            "",
                            f"rank 0 at {self._address[0]} does not respond; check its output and start again",
                        )
                    self._check_launcher()
                    time.sleep(POLL_SECONDS)
                result = json.loads(self.store.get(key))
        except (DistNetworkError, DistStoreError):
            raise Fault(
                "rank-zero-lost",
                "",
                f"rank 0 at {self._address[0]} exited during start-up; check its output and start again",
            ) from None
        if result.get("error"):
            ignore_sigterm()
        self.await_readers(name, result.get("came", self.world_size))
        if result.get("error"):
            raise UserError(*result["error"])
        return result

    def _check_launcher(self) -> None:
        if self.launcher.is_gone():
            raise launcher_gone()


def launcher_gone() -> Fault:
    """The error of ranks whose launcher has ended."""
    return Fault("launcher-gone", "", "the launcher of these processes has exited; run the same command again")


_group: Group | None = None


def _connected(seconds: float) -> Group:
    global _group
    if _group is None:
        try:
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except KeyError as error:
            name = error.args[0]
            raise UserError(
                "no-master-address",
                "",
                f"RANK is set but {name} is not; set it to the same value for all ranks, or start with deepspeed",
            ) from None
        try:
            _group = Group(address, seconds)
        except UserError as error:  # rank 0 does not raise most of these: one rank of each node prints them
            error.local = os.environ.get("LOCAL_RANK", "0") == "0" or os.environ["RANK"] == "1"
            raise
    return _group


def join(facts: Facts, minutes: float) -> Group:
    """Wait at most `minutes` for all ranks of this launch, compare their facts and return their group.

    Further trainings of the same processes reuse the group. Raises UserError, the same on all reachable ranks, if a
    rank is missing, has an error (`share_errors`) or different facts, if the port is in use, or rank 0 does not answer.
    """
    group = _connected(60 * minutes)
    group.compare(facts, 60 * minutes)
    return group


def init_process_group(group: Group, watchdog_timeout: float) -> None:
    """Initialize torch.distributed once, through the group's store; both engines reuse it.

    It may block for long, so call it inside a `Watchdog`, whose time-out is `watchdog_timeout` minutes.
    """
    if torch.distributed.is_initialized():
        return
    gpu = gpu_index()
    if gpu is not None:
        os.environ["LOCAL_RANK"] = str(gpu)  # DeepSpeed and accelerate use it as the index of the GPU
    # Longer than the watchdog's time-out, which explains a stall better; never shorter than DeepSpeed's 30 minutes.
    timeout = timedelta(minutes=max(30.0, watchdog_timeout + 5))
    # Also for the groups that DeepSpeed creates without a time-out; NCCL's default is 10 minutes.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    store = group.store.clone()  # pyright: ignore[reportAttributeAccessIssue]
    store.set_timeout(timeout)  # NCCL waits there for its id
    torch.distributed.init_process_group(
        "gloo" if gpu is None else "nccl",
        store=store,
        rank=group.rank,
        world_size=group.world_size,
        device_id=None if gpu is None or group.world_size == 1 else torch.device(CUDA, gpu),
        timeout=timeout,
    )
    atexit.register(_leave, group)


def _leave(group: Group) -> None:
    """Close the connections; rank 0, which hosts the store, last. After a failure this would wait for lost ranks."""
    if torch.distributed.is_initialized() and not group.failed:
        torch.distributed.destroy_process_group()
        group.await_readers("end", group.world_size)


@contextmanager
def share_errors() -> Iterator[None]:
    """A UserError raised in here, before `join`, ends the other ranks within seconds, too.

    An error of all ranks is printed once; an error of some ranks names the first of them.
    """
    try:
        yield
    except UserError as error:
        if world_size() > 1:
            _share(error)
        raise


def _share(error: UserError) -> None:
    """Send an error to all ranks; raises a different one if rank 0 chose that."""
    try:
        group = _connected(REFUSED_SECONDS)
    except UserError:
        error.local = True  # no other rank knows of it
        return
    try:
        group.compare({}, REFUSED_SECONDS, error)
    except Fault:
        error.local = True
    except UserError as chosen:
        if str(chosen) != str(error):
            raise chosen from None


def ignore_sigterm() -> None:
    """Ignore SIGTERM, which the launcher sends once a rank has exited, so that this rank can print the cause."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
