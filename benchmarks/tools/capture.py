"""GPU time of a call without the host: calls are captured in a CUDA graph, which is replayed.

Times of calls from Python include gaps in which the GPU waits for the host; forward and backward of small
tensors are mostly gaps. A graph has none. Its calls go through the same sets of inputs as the plain timing.
Small inputs stay in the L2 cache, which the plain timing clears before each call.
"""

from collections.abc import Callable

import numpy as np
import torch


def times(call: Callable, seconds: float) -> list[float]:
    """Microseconds per call in ten replays of a graph; each replay takes about a twentieth of ``seconds``.

    Raises RuntimeError if ``call`` cannot be captured. One that synchronizes raises before the capture, since
    a capture that fails can leave torch's generator unusable.
    """
    from triton.testing import do_bench_cudagraph

    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [1e3 * ms for ms in do_bench_cudagraph(call, rep=50 * seconds, return_mode="all")]


def captured(
    calls: dict[str, Callable], seconds: float, time: Callable[[Callable, float], list[float]] = times
) -> tuple[dict[str, float], dict[str, str]]:
    """Median microseconds of each call in a graph, and a note for each call that cannot be captured."""
    medians, notes = {}, {}
    for name, call in calls.items():
        try:
            medians[name] = float(np.median(time(call, seconds)))
        except RuntimeError as error:  # out of memory is one as well
            notes[name] = f"not captured: {str(error).strip().splitlines()[0]}"
    return medians, notes
