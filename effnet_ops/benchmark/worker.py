"""The process of one provider: loads its model once, then answers the parent's requests and sleeps in between."""

from __future__ import annotations

import contextlib
import ctypes
import pickle
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import effnet_ops
from effnet_ops.benchmark.providers import Job, Provider, Runner
from effnet_ops.benchmark.timing import interleave

WARM_UP, LEAST = 2, 5


@dataclass
class Round:
    """One turn: seconds of each call, and how much of a core the process used since its last turn while others ran."""

    seconds: list[float]
    idle_load: float


def send(connection: Connection, value: Any) -> None:
    """Send by plain pickle: PyTorch makes ``Connection.send`` share tensors, which needs common ancestors."""
    connection.send_bytes(pickle.dumps(value))


def receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())


def serve(connection: Connection) -> None:
    """Receive a function with its arguments, call it, then run each request ``(method, arguments)`` on the result.

    Each is answered by (True, result), or by (False, what went wrong), which ends it; so does the parent's closing.
    """
    try:
        function, arguments = receive(connection)
        target = function(*arguments)
        send(connection, (True, None))
        while True:
            try:
                method, rest = receive(connection)
            except EOFError:
                return
            send(connection, (True, getattr(target, method)(*rest)))
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        send(connection, (False, f"{type(error).__name__}: {lines[0]}"))


class Measured:
    """One provider's fastest runner on prepared inputs."""

    def __init__(self, provider: Provider, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self._backend = contextlib.ExitStack()
        if not provider.ours:
            # Peers run our own models as plain PyTorch, as everybody else's are.
            self._backend.enter_context(effnet_ops.use_backend("reference"))
        self._inputs = job.inputs()
        self._runner = _fastest(list(provider.candidates(job)), self._inputs[0])
        self._prepared = [self._runner.prepare(x) for x in self._inputs]
        self._next = 0
        self._turns = Turns()

    def choice(self) -> str:
        return self._runner.choice

    def logits(self) -> list[Tensor]:
        """The output for each input, as float32."""
        results = [self._runner.logits(self._runner.run(x)).float().clone() for x in self._prepared]
        self._turns.rest()
        return results

    def round(self, seconds: float) -> Round:
        """Call for about ``seconds``, at least `LEAST` times, each time on the next input."""
        return self._turns.round(self._call, seconds, WARM_UP, LEAST)

    def peak_memory(self) -> int | None:
        """Bytes by which one inference raises the process's resident memory at its peak; None where it is not Linux."""
        with PeakMemory() as memory:
            self._call()
        return memory.bytes

    def _call(self) -> None:
        self._next = (self._next + 1) % len(self._prepared)
        self._runner.run(self._prepared[self._next])


class Turns:
    """Rounds of calls, and what the process does between them."""

    def __init__(self) -> None:
        self._mark = time.process_time(), time.perf_counter()

    def round(self, call: Callable[[], object], seconds: float, warm_up: int, least: int) -> Round:
        """Call for about ``seconds``, at least ``least`` times, after some calls that do not count."""
        cpu, wall = time.process_time(), time.perf_counter()
        idle_load = (cpu - self._mark[0]) / max(wall - self._mark[1], 1e-9)
        for _ in range(warm_up):
            call()
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < least or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        self.rest()
        return Round(times, idle_load)

    def rest(self) -> None:
        """Idle time counts from a little later, when the threads of the last call have gone to sleep."""
        time.sleep(0.02)
        self._mark = time.process_time(), time.perf_counter()


def saved_bytes(run: Callable[[], object], model: nn.Module) -> int:
    """Bytes of the distinct storages that autograd keeps of ``run`` for the backward pass, the model's own apart."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    # The graph holds what it packed until the result goes, so no address is used twice.
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    total = sum(sizes.values())
    del result
    return total


class PeakMemory:
    """A context: ``bytes`` by which it raised the process's resident memory at its peak, None where it is not Linux."""

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        with contextlib.suppress(OSError, AttributeError):
            # Memory that the heap keeps from earlier calls would hide what this one needs.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far: proc(5)
            self._before = resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self.bytes = max(resident("VmHWM") - self._before, 0)


def resident(field: str) -> int:
    """Bytes of this process's resident memory, VmRSS, or of its peak, VmHWM; OSError where it is not Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _fastest(runners: list[Runner], x: Tensor, seconds: float = 1.0) -> Runner:
    if len(runners) == 1:
        return runners[0]
    prepared = [runner.prepare(x) for runner in runners]
    calls = {
        str(index): (lambda runner=runner, value=value: runner.run(value))
        for index, (runner, value) in enumerate(zip(runners, prepared, strict=True))
    }
    times = interleave(calls, seconds)
    return runners[int(min(times, key=lambda index: times[index].p20))]
