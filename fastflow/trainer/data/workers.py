"""Processes that draw batches ahead of the training loop."""

import atexit
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch
from torch import Tensor

from fastflow.trainer.data.source import DataError
from fastflow.trainer.signals import STOP_SIGNALS

Batch = tuple[Tensor, Tensor | None]


class WorkerError(RuntimeError):
    """A data-loading process that died; the message is one line."""


def drawn_by_workers(draw: Callable[[int], Batch], steps: range, count: int) -> Generator[Batch]:
    """Yield ``draw(step)`` for each of ``steps``, drawn ahead by ``count`` processes.

    Process i draws every ``count``-th step from the i-th on. Each has a pipe of its own and shares no lock
    and no shared memory, so that it can be killed at any moment. All end when the iterator is closed, when
    this process exits, and when it is killed.

    Raises the DataError or OSError of ``draw``, RuntimeError with the traceback of another error, and
    WorkerError if a process dies.
    """
    workers: list[tuple[BaseProcess, Connection]] = []
    end = partial(_end, workers)
    atexit.register(end)  # before multiprocessing's own exit, which would wait for the processes
    try:
        for i in range(min(count, len(steps))):
            ours, theirs = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.Process(target=_work, args=(draw, steps[i::count], theirs), daemon=True)
            process.start()
            theirs.close()  # the worker then holds the only copy, and its death ends the pipe
            workers.append((process, ours))
        for i in range(len(steps)):
            for process, _ in workers:
                _check(process)  # here, because its pipe may hold batches for many steps
            yield _received(*workers[i % count])
    finally:
        end()
        atexit.unregister(end)


def _check(process: BaseProcess) -> None:
    if code := process.exitcode:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = "; if memory ran out, use fewer --workers" if code == -signal.SIGKILL else ""
        raise WorkerError(f"a data-loading process {how}{hint}")


def _received(process: BaseProcess, connection: Connection) -> Batch:
    try:
        reply = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        _check(process)
        raise
    if isinstance(reply, Exception):
        raise reply
    x, labels = reply
    x = torch.from_numpy(x)
    labels = None if labels is None else torch.from_numpy(labels)
    return x.pin_memory() if torch.cuda.is_available() else x, labels


def _end(workers: list[tuple[BaseProcess, Connection]]) -> None:
    for process, _ in workers:
        process.kill()
    for process, connection in workers:
        process.join()
        connection.close()


def _work(draw: Callable[[int], Batch], steps: range, connection: Connection) -> None:
    """Draw and send each of ``steps``, or the error that ends them."""
    for signum in STOP_SIGNALS:
        # Ctrl-C and a scheduler's signal reach every process, but only the trainer must act on them
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # the processes share the cores; after a fork, OpenMP could also wait for ever
    try:
        for step in steps:
            x, labels = draw(step)
            # numpy arrays, because torch would send its tensors through shared memory
            connection.send((x.numpy(), None if labels is None else labels.numpy()))
    except BrokenPipeError:  # the trainer is gone
        pass
    except (DataError, OSError) as error:
        connection.send(error)
    except Exception:
        connection.send(RuntimeError(f"in a data-loading process:\n{traceback.format_exc()}"))


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
