"""Start the processes of a training, or find those that torchrun or Slurm started, and keep them together."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, TypeVar

import lightning as L
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from nidl_dcl.distributed import leave_at_exit
from nidl_dcl.errors import LostProcessError, NidlDclError, OnAnotherProcessError, UsageError
from nidl_dcl.models.context_managers import silence_lightning
from nidl_dcl.workflow.options import TrainingOptions

T = TypeVar("T")

_PATIENCE = 10.0
"""Seconds that processes have to end by themselves when one of them has."""

_TIMEOUT = "NIDL_DCL_TIMEOUT"

_PARENT = "NIDL_DCL_PARENT"


@dataclass(frozen=True)
class Rank:
    """Which of how many processes this is.

    Attributes
    ----------
    rank, processes : int
        Among all.
    local_rank : int
        Among those of this machine.
    starter : str
        ``"this command"``, ``"torchrun"``, ``"Slurm"``, or empty where nobody started several.
    """

    rank: int = 0
    processes: int = 1
    local_rank: int = 0
    starter: str = ""


def find_rank(environment: Mapping[str, str] | None = None) -> Rank:
    """Return which process this is, as torchrun or ``srun`` say in the environment.

    Raises
    ------
    UsageError
        When Slurm allotted several tasks and this process was not started by ``srun``.
    """
    variables = os.environ if environment is None else environment
    if "RANK" in variables and int(variables.get("WORLD_SIZE", "1")) > 1:
        return Rank(
            int(variables["RANK"]),
            int(variables["WORLD_SIZE"]),
            int(variables.get("LOCAL_RANK", "0")),
            "this command" if _PARENT in variables else "torchrun",
        )
    tasks = int(variables.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "SLURM_PROCID" in variables:
        return Rank(
            int(variables["SLURM_PROCID"]), tasks, int(variables.get("SLURM_LOCALID", "0")), "Slurm"
        )
    return Rank()


def _adopt_slurm_rank(own: Rank) -> None:
    """Say in torchrun's variables what Slurm says in its own."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "127.0.0.1")
    port = 15000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 10000
    os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
    os.environ.setdefault("MASTER_PORT", str(port))
    os.environ.update(
        RANK=str(own.rank),
        WORLD_SIZE=str(own.processes),
        LOCAL_RANK=str(own.local_rank),
        GROUP_RANK=os.environ.get("SLURM_NODEID", "0"),
    )


class Team:
    """The processes of a training, or one process alone, for which everything is a plain call.

    Parameters
    ----------
    own : Rank
        This process.
    device : str
        What each one trains on: "cpu", "cuda", …

    Raises
    ------
    LostProcessError
        When the others do not come in time.
    """

    def __init__(self, own: Rank, device: str = "cpu") -> None:
        self.own = own
        self.device = device
        self.rank, self.processes = own.rank, own.processes
        self._group: Any = None
        self._has_sent = False

    def __enter__(self) -> Self:
        if self.processes == 1:
            return self
        if self.own.starter == "Slurm":
            _adopt_slurm_rank(self.own)
        if self.own.starter == "this command":
            _end_with_parent(int(os.environ[_PARENT]))
        seconds = float(os.environ.get(_TIMEOUT, "1800"))
        try:
            # By its name: Lightning must know that gloo cannot average.
            backend = dist.get_default_backend_for_device(self.device)
            dist.init_process_group(backend, timeout=datetime.timedelta(seconds=seconds))
            leave_at_exit()
            # Preparing the images may take the first process hours.
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
        except (RuntimeError, ValueError) as error:
            raise LostProcessError(
                f"The {self.processes} processes of the training did not meet at "
                f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} within "
                f"{seconds:.0f} s ({_first_line(error)}). Look at what the others say; the first "
                "node must be reachable at this address and port."
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.dismiss()

    def broadcast(self, value: T | None = None) -> T | None:
        """Return the first process's value on every process; it waits until that one sends."""
        if self._group is None:
            return value
        self._has_sent = True
        values = [value]
        self._meet(lambda: dist.broadcast_object_list(values, src=0, group=self._group))
        return values[0]

    def each(self, work: Callable[[], T]) -> list[T]:
        """Do some work on every process and return what each returned; raise on all what one raises.

        Raises
        ------
        OnAnotherProcessError
            On those who have no error of their own.
        """
        if self._group is None:
            return [work()]
        failure: Exception | None = None
        result: Any = None
        try:
            result = work()
        except Exception as error:
            failure = error
        status = getattr(failure, "exit_status", 1)
        said: list[Any] = [None] * self.processes
        own = (result, None if failure is None else (status, str(failure)))
        self._meet(lambda: dist.all_gather_object(said, own, group=self._group))
        if failure is not None:
            raise failure
        for rank, (_, problem) in enumerate(said):
            if problem is not None:
                raise OnAnotherProcessError(f"Process {rank}: {problem[1]}", problem[0])
        return [value for value, _ in said]

    def here(self, work: Callable[[], T]) -> T:
        """Do some work on every process and return this one's result; errors as of `each`."""
        found: list[T] = []
        self.each(lambda: found.append(work()))
        return found[0]

    def run(self, work: Callable[[], T]) -> T:
        """Do work in which the processes meet; tell the loss of another from a fault of this one.

        Raises
        ------
        LostProcessError
        """
        return work() if self._group is None else self._meet(work)

    def disband(self) -> None:
        """End the group when all have come here; the first process goes on alone."""
        if self._group is not None:
            self._meet(lambda: dist.barrier(group=self._group))
            self.dismiss()

    def dismiss(self) -> None:
        """Leave the group without waiting; if the first process has sent nothing, it sends None."""
        if self._group is None:
            return
        if self.rank == 0 and not self._has_sent:
            with suppress(LostProcessError):
                self.broadcast(None)
        self._group = None
        dist.destroy_process_group()

    def _meet(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except NidlDclError:
            raise
        except RuntimeError as error:
            if not _is_loss(error):
                raise
            raise LostProcessError(
                "Another process of the training has ended, or does not answer "
                f"({_first_line(error)}). What it said tells why; the same command goes on from the "
                "last checkpoint."
            ) from error


def run_processes(command: Sequence[str], count: int, *, node: int = 0, nodes: int = 1) -> int:
    """Run a command as several processes on this machine and return the exit status of all.

    When one fails the others are ended, so that none waits for it. Signals are passed on. The
    processes end when this one does.

    Parameters
    ----------
    command : sequence of str
        Program and words.
    count : int
        Processes on this machine.
    node, nodes : int
        This machine's number, and how many there are.

    Returns
    -------
    int
        That of the first process that failed; 0 if none did; 1 for one that was killed.
    """
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda n, frame: received.append(n))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    ours, theirs = os.pipe()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        common = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            **os.environ,
            "WORLD_SIZE": str(count * nodes),
            "LOCAL_WORLD_SIZE": str(count),
            "GROUP_RANK": str(node),
            _PARENT: str(ours),
        }
        for local in range(count):
            place = {"RANK": str(node * count + local), "LOCAL_RANK": str(local)}
            processes.append(
                subprocess.Popen(
                    command, env=common | place, pass_fds=[ours], start_new_session=True
                )
            )
        return _watch(processes, received)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        os.close(ours)
        os.close(theirs)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _watch(processes: Sequence[subprocess.Popen[bytes]], received: list[int]) -> int:
    """Wait for all processes; return the status of all."""
    first, ended, passed_on, asked = 0, 0.0, 0, False
    while None in [process.poll() for process in processes]:
        while passed_on < len(received):
            for process in processes:
                if process.poll() is None:  # who asks again does not want to wait
                    process.kill() if passed_on else process.send_signal(received[0])
            passed_on += 1
        if not first:
            first, ended = _first_failure(processes), time.monotonic()
        if first and time.monotonic() - ended > _PATIENCE:
            for process in processes:
                if process.poll() is None:
                    process.kill() if asked else process.terminate()
            asked, ended = True, time.monotonic()
        time.sleep(0.05)
    return first or _first_failure(processes)


def _first_failure(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    for rank, process in enumerate(processes):
        if process.returncode is not None and process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            sys.stderr.write(
                f"nidl-dcl: Process {rank} of {len(processes)} was killed ({name}), perhaps for "
                "want of memory. The same command goes on from the last checkpoint.\n"
            )
            return 1
    return next((p.returncode for p in processes if p.returncode), 0)


def _end_with_parent(pipe: int) -> None:
    """Have this process received to end when the one that started it is gone, which closes a pipe."""

    def wait() -> None:
        os.read(pipe, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_loss(error: RuntimeError) -> bool:
    text = str(error).lower()
    signs = ("connection closed", "connection reset", "broken pipe", "timed out", "timeout",
             "gloo", "nccl", "connection refused", "socket")  # fmt: skip
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def run_options(training: TrainingOptions) -> dict[str, Any]:
    """Return what Lightning's Trainer is received about where and how a training runs."""
    return {
        "accelerator": training.accelerator,
        "devices": int(training.devices) if training.devices.isdigit() else training.devices,
        "num_nodes": training.num_nodes,
        "strategy": training.strategy,
        "precision": training.precision,
    }


def start_processes(training: TrainingOptions, command: Sequence[str]) -> int | None:
    """Run `command` as the processes of this machine that a training wants, and wait for them.

    Returns
    -------
    int or None
        Their exit status; None where one process is enough, or somebody else starts them.

    Raises
    ------
    UsageError
        For devices that there are not, or several machines that nobody named.
    """
    if find_rank().processes > 1:
        return None
    here, _ = _processes_here(training)
    if here * training.num_nodes == 1:
        return None
    if training.num_nodes > 1:
        missing = [n for n in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
        if missing:
            raise UsageError(
                f"--num-nodes {training.num_nodes}: start the command on every node by srun or "
                f"torchrun, or set {', '.join(missing)}."
            )
    node = int(os.environ.get("NODE_RANK", "0"))
    return run_processes(command, here, node=node, nodes=training.num_nodes)


def on_one_process(training: TrainingOptions) -> TrainingOptions:
    """Return the options for one process, of which "auto" may have wanted several.

    Raises
    ------
    UsageError
        When several were asked for.
    """
    here, _ = _processes_here(training)
    if here * training.num_nodes == 1:
        return training
    if training.devices == "auto" and training.num_nodes == 1:
        return replace(training, devices="1", strategy="auto")
    raise UsageError(
        f"--devices {training.devices} --num-nodes {training.num_nodes}: several processes train "
        "through the command nidl-dcl only, or with a team (nidl_dcl.workflow.launcher.team_of)."
    )


def team_of(training: TrainingOptions) -> Team:
    """Return the processes of a training, among which this one is.

    Raises
    ------
    UsageError
        When another number of processes was started than the options ask for.
    """
    own = find_rank()
    if own.processes == 1:
        return Team(Rank())
    (here, device), nodes = _processes_here(training), training.num_nodes
    if here * nodes != own.processes:
        raise UsageError(
            f"{own.starter} started {own.processes} processes, and the options ask for "
            f"{here * nodes} ({here} a node, {nodes} node{'s' * (nodes > 1)}). Make --devices times "
            f"--num-nodes {own.processes}, with --strategy ddp."
        )
    return Team(own, device)


def _processes_here(training: TrainingOptions) -> tuple[int, str]:
    """Return how many processes of this machine train, and on what kind of device each."""
    try:
        with silence_lightning():
            trainer = L.Trainer(
                **run_options(training),
                plugins=[LightningEnvironment()],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
    except (MisconfigurationException, ValueError) as error:
        raise UsageError(f"--accelerator, --devices, --strategy or --precision: {error}") from error
    spawning = isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
    parallel = isinstance(trainer.strategy, ParallelStrategy) and not spawning
    return int(trainer.num_devices) if parallel else 1, trainer.strategy.root_device.type
