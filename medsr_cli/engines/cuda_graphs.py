"""CUDA graphs: the hundreds of kernels of a forward started at once, for inputs of a shape that keeps coming.

At batch 1 starting RDST's kernels takes longer than running them. A captured graph starts them all with one call, but
has its shapes and addresses for good: inputs are copied into it, and what it makes is copied out before the next run
overwrites it (PyTorch's notes on CUDA semantics, "CUDA Graphs").

A shape is captured when it comes again after `EAGER_RUNS` ordinary runs, which fill caches and let cuDNN find its
algorithms; jobs that are shorter do not pay. `torch.compile` would fuse kernels, too, but takes a minute and a half
for a network here, which few jobs win back; it is left out.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

EAGER_RUNS = 3
"""Runs of a shape before it is captured."""
MOST_GRAPHS = 4
"""Captured shapes that are kept: each holds the memory of its inputs and results, and all share that in between."""
MOST_COUNTED = 256
"""Shapes that are counted before counting starts anew: images of many sizes must not fill the memory."""

Results = tuple[Tensor, ...]
Forward = Callable[..., Tensor | Results]


class Captured(Protocol):
    """A forward that was captured for one shape of its inputs."""

    def replay(self, inputs: Results) -> Results:
        """Run it on inputs of that shape; the results are overwritten by the next call."""
        ...


Capture = Callable[[Forward, Results], Captured]


class CudaGraph:
    """A forward as one CUDA graph, see `Captured`; everything belongs to one device and its current stream."""

    def __init__(self, forward: Forward, inputs: Results, pool: Any, stream: torch.cuda.Stream) -> None:
        self._inputs = tuple(given.clone() for given in inputs)
        self._graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(inputs[0].device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            # Libraries set up workspaces for each stream, which a capture does not allow.
            forward(*self._inputs)
        current.wait_stream(stream)
        # The outer block restores the stream where the capture fails, which the inner one does not. Other threads, such
        # as those of a program that uses medsr, may allocate memory meanwhile.
        with (
            torch.cuda.stream(current),
            torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            self._results = as_tuple(forward(*self._inputs))

    def replay(self, inputs: Results) -> Results:
        """See `Captured`."""
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._results


class CudaCapture:
    """Captures on one side stream and into one pool of memory, which graphs that run one after the other can share."""

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._device = device

    def __call__(self, forward: Forward, inputs: Results) -> Captured:
        """A graph for inputs of this shape; RuntimeError where the forward cannot be captured."""
        with torch.cuda.device(self._device):
            return CudaGraph(forward, inputs, self._pool, self._stream)


class Graphs:
    """A forward that is captured for shapes that keep coming, and run as it is for all others.

    A forward that cannot be captured (one that reads values on the CPU, say) is run as it is from then on; `failure`
    says why. Results are the caller's: no later call changes them.

    Args:
        forward: tensors of one device to one or several, without effects beside; called in inference mode.
        capture: how; a test gives one of its own.
        eager_runs: ordinary runs of a shape before it is captured.
        most: captured shapes that are kept; the one that was not used for longest goes first.
    """

    def __init__(
        self, forward: Forward, capture: Capture, *, eager_runs: int = EAGER_RUNS, most: int = MOST_GRAPHS
    ) -> None:
        self._forward, self._capture = forward, capture
        self._eager_runs, self._most = eager_runs, most
        self._runs: Counter[tuple[Any, ...]] = Counter()
        self._graphs: OrderedDict[tuple[Any, ...], Captured] = OrderedDict()
        self.failure: str | None = None

    def __call__(self, *inputs: Tensor) -> Results:
        """The forward's results, always a tuple."""
        key = tuple((given.shape, given.dtype) for given in inputs)
        graph = self._graphs.get(key) or self._new(key, inputs)
        if graph is None:
            return as_tuple(self._forward(*inputs))
        self._graphs.move_to_end(key)
        return tuple(result.clone() for result in graph.replay(inputs))

    def release(self) -> None:
        """Give the graphs and their memory back; shapes have to come as often again."""
        self._graphs.clear()
        self._runs.clear()

    def _new(self, key: tuple[Any, ...], inputs: Results) -> Captured | None:
        """A graph of a shape that has come often enough, or None."""
        if self.failure is not None:
            return None
        self._runs[key] += 1
        if self._runs[key] <= self._eager_runs:
            if len(self._runs) > MOST_COUNTED:
                self._runs.clear()
            return None
        while len(self._graphs) >= self._most:
            oldest, _ = self._graphs.popitem(last=False)
            del self._runs[oldest]
        try:
            graph = self._capture(self._forward, inputs)
        except RuntimeError as error:  # out of memory is one, too: without graphs there is more of it
            self.failure = str(error).partition("\n")[0] or type(error).__name__
            self.release()
            return None
        self._graphs[key] = graph
        return graph


def as_tuple(results: Tensor | Results) -> Results:
    """One or several, as a tuple."""
    return results if isinstance(results, tuple) else (results,)
