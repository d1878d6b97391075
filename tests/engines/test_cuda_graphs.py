"""The policy of CUDA graphs, with graphs that only pretend: what is captured when, kept, given up and copied."""

from __future__ import annotations

import pytest
import torch

from medsr_cli.engines.cuda_graphs import MOST_COUNTED, Graphs


class PretendedGraph:
    """Has one buffer for its results, as a CUDA graph has."""

    def __init__(self, forward, inputs) -> None:
        self.forward = forward
        self.kept = tuple(given.clone() for given in inputs)
        self.results = tuple(torch.empty_like(result) for result in self._made())
        self.replays = 0

    def _made(self):
        made = self.forward(*self.kept)
        return made if isinstance(made, tuple) else (made,)

    def replay(self, inputs):
        self.replays += 1
        for kept, given in zip(self.kept, inputs, strict=True):
            assert kept.shape == given.shape
            assert kept.dtype == given.dtype
            kept.copy_(given)
        for buffer, result in zip(self.results, self._made(), strict=True):
            buffer.copy_(result)
        return self.results


class Captures:
    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.made = error, []

    def __call__(self, forward, inputs):
        if self.error is not None:
            raise self.error
        self.made.append(PretendedGraph(forward, inputs))
        return self.made[-1]

    @property
    def shapes(self):
        return [tuple(graph.kept[0].shape) for graph in self.made]


def double(x):
    return 2 * x


def test_a_shape_is_captured_at_its_fourth_run_and_replayed_from_there():
    captures = Captures()
    graphs = Graphs(double, captures)
    for run in range(8):
        x = torch.full((2, 3), float(run))
        (result,) = graphs(x)
        assert torch.equal(result, 2 * x)
        assert len(captures.made) == (run >= 3)
    assert captures.made[0].replays == 5


def test_results_are_the_callers_to_keep():
    graphs = Graphs(double, Captures(), eager_runs=0)
    first = graphs(torch.ones(2))[0]
    second = graphs(torch.zeros(2))[0]
    assert first.tolist() == [2, 2]
    assert second.tolist() == [0, 0]


def test_several_inputs_and_results():
    graphs = Graphs(lambda a, b: (a + b, a - b), Captures(), eager_runs=1)
    for _ in range(3):
        total, difference = graphs(torch.ones(2), torch.full((2,), 3.0))
        assert (total.tolist(), difference.tolist()) == ([4, 4], [-2, -2])


def test_shapes_and_types_are_counted_apart():
    captures = Captures()
    graphs = Graphs(double, captures, eager_runs=2)
    for _ in range(2):
        graphs(torch.ones(1))
        graphs(torch.ones(2))
        graphs(torch.ones(2, dtype=torch.bfloat16))
    assert not captures.made
    graphs(torch.ones(2, dtype=torch.bfloat16))
    assert [graph.kept[0].dtype for graph in captures.made] == [torch.bfloat16]


def test_no_more_graphs_than_allowed_and_the_oldest_goes():
    captures = Captures()
    graphs = Graphs(double, captures, eager_runs=0, most=2)
    for size in (1, 2, 1, 3):  # 3 takes the place of 2, which was not used for longer than 1
        graphs(torch.ones(size))
    assert captures.shapes == [(1,), (2,), (3,)]
    graphs(torch.ones(1))
    assert captures.made[0].replays == 3
    graphs(torch.ones(2))
    assert captures.shapes[3:] == [(2,)]


def test_a_graph_that_went_is_earned_again():
    captures = Captures()
    graphs = Graphs(double, captures, eager_runs=1, most=1)
    for size in (1, 1, 2, 2, 1):
        graphs(torch.ones(size))
    assert captures.shapes == [(1,), (2,)]


@pytest.mark.parametrize(
    "error", [RuntimeError("not permitted\nat line 3"), torch.OutOfMemoryError("CUDA out of memory")]
)
def test_what_cannot_be_captured_is_run_as_it_is_for_good(error):
    captures = Captures(error)
    graphs = Graphs(double, captures, eager_runs=1)
    for _ in range(3):
        assert graphs(torch.ones(2))[0].tolist() == [2, 2]
    assert graphs.failure == str(error).partition("\n")[0]
    captures.error = None
    for _ in range(3):
        graphs(torch.ones(2))
    assert not captures.made


def test_an_error_of_the_forward_itself_is_not_swallowed():
    def fails(x):
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - it has no text
        Graphs(fails, Captures(), eager_runs=0)(torch.ones(1))


def test_released_graphs_are_gone_and_earned_again():
    captures = Captures()
    graphs = Graphs(double, captures, eager_runs=1)
    for _ in range(3):
        graphs(torch.ones(1))
    graphs.release()
    graphs(torch.ones(1))
    assert captures.made[0].replays == 2
    assert len(captures.made) == 1
    graphs(torch.ones(1))
    assert len(captures.made) == 2


def test_many_sizes_do_not_fill_the_memory():
    graphs = Graphs(double, Captures())
    for size in range(1, MOST_COUNTED + 50):
        graphs(torch.ones(size))
    assert len(graphs._runs) <= MOST_COUNTED
