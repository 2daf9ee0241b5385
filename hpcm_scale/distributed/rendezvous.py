"""Where the processes of a run meet: one key-value store, which tells all of them what keeps one of them away."""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, Store, TCPStore, distributed_c10d

from hpcm_scale.devices import CUDA
from hpcm_scale.distributed.processes import gpu_index
from hpcm_scale.distributed.ranks import Facts, Launcher, Peer, difference, numbers
from hpcm_scale.errors import Fault, UserError

POLL_SECONDS = 0.05
REFUSED_SECONDS = 10.0
"""How long a process that cannot take part waits for the others, to tell them."""
READ_SECONDS = 5.0
"""How long the process that keeps the store stays for others to read what it found."""
_ANSWER_SECONDS = 30.0
"""A store that answers at all answers within so long."""

_group: Group | None = None


class Group:
    """The processes of one launch, through a store that the first one keeps.

    Its methods are called by all processes, in the same order.
    """

    def __init__(self, deadline: float) -> None:
        """Connect; `deadline` is in seconds of time.monotonic(). Raises UserError where there is no store."""
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.launcher = Launcher()
        self.peers: list[Peer] = []
        self.failed = False
        """Whether a training ended in which the processes did not end together."""
        self.address = _address()
        self._exchanges = 0
        # torchrun keeps the store of the processes that it starts again.
        prefix = f"hpcm_scale/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        self.store: Store = PrefixStore(prefix, self._connect(deadline))
        self._take_seat()

    def keeps_store(self, rank: int) -> bool:
        """Whether the store is kept by process `rank`: the first one, unless torchrun keeps it."""
        return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def meet(self, facts: Facts, seconds: float, refusal: str | None = None) -> None:
        """Wait for all processes, `seconds` at most, and compare their facts with the first one's.

        `refusal` is why this process does not take part. Raises UserError on all processes that came, in the same
        words, unless all came, none refused, and the facts are the same.
        """
        entry = {"peer": Peer.this(self.rank)._asdict(), "facts": facts, "refusal": refusal}
        name = self._next()
        self.store.set(f"{name}/{self.rank}", json.dumps(entry))
        if refusal:
            self.store.add(f"{name}/refused", 1)
        self.store.add(f"{name}/came", 1)
        verdict = self._verdict(name, lambda: self._judge(name, seconds), seconds + 2 * REFUSED_SECONDS)
        self.peers = [Peer.from_dict(values) for values in verdict["peers"]]

    def agree(self, facts: Facts, seconds: float = 60.0) -> None:
        """Compare more facts; see `meet`."""
        self.meet(facts, seconds)

    def first(self, action: Callable[[], None], seconds: float = 600.0) -> None:
        """What the first process does while the others wait; its UserError is raised on all."""

        def judge() -> dict[str, Any]:
            try:
                action()
            except UserError as error:
                return {"refusal": str(error)}
            return {}

        name = self._next()
        self.store.add(f"{name}/came", 1)
        self._verdict(name, judge, seconds)

    def await_readers(self, name: str, readers: int) -> None:
        """The first process, which keeps the store, may end after this, and speaks last."""
        with suppress(DistNetworkError, DistStoreError):
            read = self.store.add(f"{name}/read", 1)
            deadline = time.monotonic() + READ_SECONDS
            while self.rank == 0 and read < readers and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                read = self.store.add(f"{name}/read", 0)

    def line(self) -> Store:
        """Another connection to the store, for another thread."""
        return self.store.clone()

    def _connect(self, deadline: float) -> TCPStore:
        address, port = self.address
        where = f"{address}:{port}"
        keeps = self.keeps_store(self.rank)
        if not keeps:
            self._await_answer(deadline)
        try:
            return TCPStore(
                address, port, is_master=keeps, wait_for_workers=False, timeout=timedelta(seconds=_ANSWER_SECONDS)
            )
        except (DistNetworkError, DistStoreError) as error:
            if "EADDRINUSE" in str(error):
                raise UserError(
                    f"port {port} of this machine is in use; choose another with --master_port (or MASTER_PORT)"
                ) from None
            whose = "MASTER_ADDR must name the machine of process 0" if keeps else "another program may use the port"
            raise _spoken(
                f"process {self.rank} on {socket.gethostname()} finds no processes of a run at {where}: {whose}; "
                "give another --master_addr or --master_port"
            ) from None

    def _await_answer(self, deadline: float) -> None:
        """Wait until something listens; torch's own waiting fills the terminal."""
        while True:
            try:
                socket.create_connection(self.address, timeout=5).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    address, port = self.address
                    raise _spoken(
                        f"process {self.rank} on {socket.gethostname()} got no answer from process 0 at "
                        f"{address}:{port} ({error.strerror or error}); start it, or mend --master_addr"
                    ) from None
            self._refuse_orphan()
            time.sleep(4 * POLL_SECONDS)

    def _take_seat(self) -> None:
        """Two runs that were given one port by mistake must not mix."""
        me = json.dumps(Peer.this(self.rank)._asdict())
        if self.store.compare_set(f"seat/{self.rank}", "", me) != me.encode():
            raise _spoken(
                f"port {self.address[1]} of {self.address[0]} is used by another run; choose another with "
                "--master_port (or MASTER_PORT)"
            )

    def _next(self) -> str:
        self._exchanges += 1
        return f"exchange{self._exchanges}"

    def _judge(self, name: str, seconds: float) -> dict[str, Any]:
        """By the first process: wait for all, and compare."""
        deadline = time.monotonic() + seconds
        while (came := self.store.add(f"{name}/came", 0)) < self.world_size and time.monotonic() < deadline:
            if self.store.add(f"{name}/refused", 0):
                deadline = min(deadline, time.monotonic() + REFUSED_SECONDS)
            self._refuse_orphan()
            time.sleep(POLL_SECONDS)
        ranks = range(self.world_size)
        here = [rank for rank in ranks if came == self.world_size or self.store.check([f"{name}/{rank}"])]
        entries = [json.loads(self.store.get(f"{name}/{rank}")) for rank in here]
        peers = [Peer.from_dict(entry["peer"]) for entry in entries]
        refusals = {entry["refusal"]: peer for entry, peer in zip(entries, peers, strict=True) if entry["refusal"]}
        refusal = None
        if refusals:
            text, peer = next(iter(refusals.items()))
            alike = len(refusals) == 1 and all(entry["refusal"] for entry in entries)
            refusal = text if alike else f"{peer}: {text}"
        elif len(here) < self.world_size:
            missing = [rank for rank in ranks if rank not in here]
            came_from = "; ".join(
                f"{numbers([peer.rank for peer in peers if peer.host == host])} from {host}"
                for host in dict.fromkeys(peer.host for peer in peers)
            )
            refusal = (
                f"{numbers(missing)} of {self.world_size} did not come within {seconds / 60:g} minutes ({came_from} "
                "did); start the missing machine, or raise engine.init_timeout"
            )
        else:
            refusal = difference(peers, [entry["facts"] for entry in entries])
        return {"refusal": refusal, "peers": [peer._asdict() for peer in peers], "came": len(here)}

    def _verdict(self, name: str, judge: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
        """What the first process says of an exchange. Raises UserError if it is a refusal."""
        key = f"{name}/verdict"
        try:
            if self.rank == 0:
                verdict = judge()
                self.store.set(key, json.dumps(verdict))
            else:
                self._await_key(key, seconds)
                verdict = json.loads(self.store.get(key))
        except (DistNetworkError, DistStoreError):
            raise Fault(f"process 0 at {self.address[0]} has gone while the others joined it") from None
        if verdict.get("refusal"):
            ignore_termination()
        self.await_readers(name, verdict.get("came", self.world_size))
        if verdict.get("refusal"):
            raise UserError(verdict["refusal"])
        return verdict

    def _await_key(self, key: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.store.check([key]):
            if time.monotonic() > deadline:
                raise Fault(f"process 0 at {self.address[0]} does not answer; see what it says, and start again")
            self._refuse_orphan()
            time.sleep(POLL_SECONDS)

    def _refuse_orphan(self) -> None:
        if self.launcher.is_gone():
            raise Fault("the launcher of these processes is gone; type the command again")


def join(facts: Facts, minutes: float) -> Group:
    """Meet the other processes of this launch, waiting for all at most `minutes`, and compare facts.

    A further training of the same processes meets in the same group. Raises UserError, one sentence and the same on
    all that can know, if one never comes, is refused (`telling_refusals`) or has other facts, and if the port is in
    use or nobody answers there.
    """
    group = _connected(60 * minutes)
    group.meet(facts, 60 * minutes)
    return group


def initialise(group: Group, watchdog_timeout: float) -> None:
    """Initialise torch.distributed with the group's store, once; the engines reuse it. May hang as long as it may
    take: guarded by a `Watch`."""
    if torch.distributed.is_initialized():
        return
    gpu = gpu_index()
    if gpu is not None:
        os.environ["LOCAL_RANK"] = str(gpu)  # DeepSpeed and accelerate take it for the index of the GPU
    # Longer than a stall may last, which is to be explained first; never shorter than DeepSpeed's half an hour.
    timeout = timedelta(minutes=max(30.0, watchdog_timeout + 5))
    # Of the groups that DeepSpeed makes, too: it gives them none, and NCCL's own is ten minutes.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    store = group.line()
    store.set_timeout(timeout)  # NCCL's processes wait for its id there
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
    """Close the connections before the process ends; the one that keeps the store ends last.

    Not after a failure: then others may be gone, and the connections would wait for them.
    """
    if torch.distributed.is_initialized() and not group.failed:
        torch.distributed.destroy_process_group()
        group.await_readers("end", group.world_size)


@contextmanager
def telling_refusals() -> Iterator[None]:
    """A UserError of what is done in here, before `join`, ends the other processes too, within seconds.

    All that were refused for the same reason say it once; what only some were refused for is said with their names.
    """
    try:
        yield
    except UserError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _tell(error)
        raise


def ignore_termination() -> None:
    """The launcher, which sees others end, is not to cut short what this process has to say last."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _tell(error: UserError) -> None:
    """Raises what is to be said in place of the error, if that is something else."""
    try:
        group = _connected(REFUSED_SECONDS)
    except UserError:
        error.local = True  # nobody else hears of it
        return
    try:
        group.meet({}, REFUSED_SECONDS, refusal=str(error))
    except Fault:
        error.local = True
    except UserError as verdict:
        if str(verdict) != str(error):
            raise verdict from None


def _connected(seconds: float) -> Group:
    global _group
    if _group is None:
        _group = Group(time.monotonic() + seconds)
    return _group


def _address() -> tuple[str, int]:
    try:
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except KeyError as error:
        raise UserError(
            f"RANK is set and {error.args[0]} is not; set it to where process 0 is, or start with deepspeed"
        ) from None


def _spoken(text: str) -> UserError:
    """For the one process of a machine that says what the others of it meet as well; process 0 does not meet it."""
    error = UserError(text)
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    error.local = local_rank == 0 or rank == 1
    return error
