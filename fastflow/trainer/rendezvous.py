"""How the ranks that torchrun started find each other."""

import math
import os
import socket
import time
import uuid
from datetime import timedelta

from torch.distributed import (  # documented names, which its module imports without exporting them
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
    rendezvous,  # pyright: ignore[reportPrivateImportUsage]
)


class DeviceError(ValueError):
    """A device that a rank cannot use; the message is one line."""


class LostRankError(RuntimeError):
    """Another rank died or does not respond; its own error gives the reason."""


def rank_of_environment() -> tuple[int | None, int]:
    """Rank, and rank on this machine, as torchrun gives them; None without torchrun."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return None, 0
    world_size = _integer("WORLD_SIZE", 1)
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        return None, 0
    rank = _integer("RANK", 0, world_size - 1)
    for name, expected in (("MASTER_ADDR", "the first rank's machine"), ("MASTER_PORT", "a port")):
        if name not in os.environ:
            raise DeviceError(f"{name}: got none with RANK, expected {expected}, as torchrun sets it")
    _integer("MASTER_PORT", 1, 65535)
    return rank, _integer("LOCAL_RANK", 0) if "LOCAL_RANK" in os.environ else 0


def _integer(name: str, least: int, most: float = math.inf) -> int:
    given = os.environ[name]
    if not given.isdecimal() or not least <= int(given) <= most:
        bounds = f"at least {least}" if most == math.inf else f"{least} to {most}"
        raise DeviceError(f"{name}: got {given!r}, expected an integer, {bounds}, as torchrun sets it")
    return int(given)


def meet(rank: int, timeout: float) -> Store:
    """A store that exactly the ranks of this start share. Raises LostRankError after ``timeout`` seconds.

    The store of torchrun still has the addresses of the ranks that it restarted, and new ranks would connect to them.
    Therefore the first rank chooses a new name for this start, and answers each rank's own new key with it.
    """
    until = time.monotonic() + timeout
    _find_first_rank(rank, until, timeout)
    store, _, world_size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    ours = uuid.uuid4().hex
    if rank:
        store.set(f"fastflow/{rank}", ours)
        name = store.get(ours).decode()  # waits for it
        store.add(name, 1)
        return PrefixStore(name, store)
    while store.add(ours, 0) < world_size - 1:
        for other in range(1, world_size):
            if store.check([f"fastflow/{other}"]):
                store.set(store.get(f"fastflow/{other}").decode(), ours)
        if time.monotonic() > until:
            raise LostRankError(f"another rank did not start within {timeout:g} s; see its own error")
        time.sleep(0.01)
    return PrefixStore(ours, store)


def _find_first_rank(rank: int, until: float, timeout: float) -> None:
    """Wait until the first rank listens: torch would write lines of C++ for each attempt to connect."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    while True:
        try:
            if rank:
                socket.create_connection((address, int(port)), max(0.1, until - time.monotonic())).close()
            else:
                socket.getaddrinfo(address, int(port))
            return
        except OSError as error:
            if time.monotonic() > until:
                reason = f"{error.strerror or error} at {address}:{port} for {timeout:g} s"
                raise LostRankError(f"the first rank died or does not respond ({reason})") from None
        time.sleep(0.1)
