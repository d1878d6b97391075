"""The engine of networks: tiles and batches that change nothing, and memory that runs out."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsr_cli.engines.any_scale import AnyScaleEngine
from medsr_cli.engines.memory import is_out_of_memory
from medsr_cli.engines.network_engine import EnlargedFirst, NetworkEngine
from medsr_cli.engines.runner import Place
from medsr_cli.engines.torch_runner import TorchRunner, engine_for
from medsr_cli.engines.traits import Traits
from medsr_cli.errors import ArgumentsError, RunError
from medsr_cli.networks import load_network
from medsr_cli.networks.catalogue import MSGAN, RDST, USCYCLEGAN
from medsr_cli.volume.geometry import enlarged_length
from tests.engines.test_tiles import repeated, sums_within

CHECKPOINTS = Path(importlib.import_module("medsr_cli").__file__ or "").parent / "checkpoints"


class Local:
    """A runner that sums over squares and repeats: it sees `reach` pixels, and needs memory for every one of them."""

    name, device, precision = "fake", "cpu", "float32"
    out_of_memory: tuple[type[BaseException], ...] = (ZeroDivisionError,)

    def __init__(self, scale: int = 2, reach: int = 0, *, holds: int = 10**9, stages: int = 0, free: int = 2**40):
        self.scale, self.reach, self.holds, self.stages, self.free = scale, reach, holds, stages, free
        self.warnings: list[str] = []
        self.given: list[tuple[int, ...]] = []
        self.released = 0

    def run(self, planes: np.ndarray, guide: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        self.given.append(planes.shape)
        n, _, rows, columns = planes.shape
        if n * rows * columns > self.holds:
            raise ZeroDivisionError
        seen = sums_within(planes, self.reach)
        enlarged = repeated(seen, self.scale).astype(np.float32)
        if guide is not None:
            assert guide.shape[-2:] == enlarged.shape[-2:]
            enlarged += guide.astype(np.float32)
        return (repeated(seen, self.stages).astype(np.float32), enlarged) if self.stages else (enlarged,)

    def run_scaled(self, planes: np.ndarray, scale: Any, places: tuple[Place, Place]) -> np.ndarray:
        (seen,) = self.run(planes)
        rows, columns = (
            np.arange(p.start, p.start + p.count) * p.length // enlarged_length(p.length, s) - p.first
            for p, s in zip(places, scale, strict=True)
        )
        return seen[..., rows[:, None], columns]

    def usable_bytes(self) -> int:
        return self.free

    def release(self) -> None:
        self.released += 1


def traits_of(kind: str, scale: int, reach: int = 0) -> Traits:
    overlap = max(-(-2 * reach // 8) * 8, 8)
    return Traits(scale, tiling=kind, reach=reach, overlap=overlap, bytes_per_pixel=1_000, smallest=5)


def plane_of(rows: int, columns: int, n: int = 1) -> np.ndarray:
    return np.random.default_rng(rows * columns).random((n, 1, rows, columns))


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 170), st.integers(1, 170)), kind=st.sampled_from(["blended", "exact"]),
    reach=st.integers(0, 12), scale=st.integers(1, 3), tile=st.integers(64, 180), holds=st.integers(8_000, 40_000),
    extra=st.sampled_from(["", "guide", "stages"]),
)  # fmt: skip
def test_tiled_equals_whole_whatever_fits(size, kind, reach, scale, tile, holds, extra):
    """Operations that see no further than the network says: any tile, and any failure on the way, changes nothing."""
    rows, columns = size
    planes = plane_of(rows, columns, 3)
    stages = int(extra == "stages" and kind == "exact")
    runner = Local(scale, reach, holds=holds, stages=stages)
    facts = traits_of(kind, scale, reach)
    if stages:
        facts = Traits(**{**facts.__dict__, "first_stage": stages})
    guide = repeated(planes, scale) * 3 if extra == "guide" else None
    result = NetworkEngine(runner, facts, tile=tile).run(planes, guide)
    wanted = repeated(sums_within(planes, reach), scale) + (0 if guide is None else guide)
    if min(rows, columns) >= facts.smallest or reach == 0:
        np.testing.assert_allclose(result.planes, wanted, rtol=2e-5)
    assert result.planes.shape == wanted.shape
    if stages:
        assert result.extras["intermediate"].shape == (3, 1, rows * stages, columns * stages)


def test_batches_are_halved_first_then_tiles_and_what_worked_is_kept():
    runner = Local(holds=64 * 64 * 3)
    runner.device = "cuda:0"
    engine = NetworkEngine(runner, traits_of("exact", 2))
    assert engine.batch_of(64, 64) == 32
    planes = plane_of(64, 64, 32)
    np.testing.assert_allclose(engine.run(planes).planes, repeated(planes, 2), rtol=1e-6)
    assert [shape[0] for shape in runner.given] == [32, 16, 8, 4] + [2] * 16
    assert runner.released == 4
    assert engine.batch_of(64, 64) == 2
    runner.given.clear()
    engine.run(planes)
    assert [shape[0] for shape in runner.given] == [2] * 16
    runner.given.clear()
    engine.run(plane_of(150, 150))
    assert {shape[0] for shape in runner.given} == {1}
    assert max(shape[-1] for shape in runner.given) <= 88  # 3/2 of what holds two of 64 x 64
    assert runner.released == 4, "another size fits at once"


def test_a_failure_is_told_once_with_numbers():
    runner = Local(holds=100 * 100)
    engine = NetworkEngine(runner, traits_of("exact", 2))
    engine.run(plane_of(300, 200))
    (sentence,) = engine.warnings
    assert "cpu had too little memory for 1 x 60800 pixels at once" in sentence  # 304 x 200, padded
    assert f"1 x {engine.planned(300, 200).pixels}." in sentence
    again = list(engine.warnings)
    engine.run(plane_of(300, 200))
    assert engine.warnings == again


def test_a_batch_larger_than_planned_is_divided():
    runner = Local(free=20_000_000 + 5 * 1_000 * 40 * 40)
    engine = NetworkEngine(runner, traits_of("exact", 2))
    runner.device = engine.device = "cuda:0"
    planes = plane_of(40, 40, 12)
    np.testing.assert_allclose(engine.run(planes).planes, repeated(planes, 2), rtol=1e-6)
    assert [shape[0] for shape in runner.given] == [5, 5, 2]


def test_it_gives_up_below_the_smallest_tile():
    engine = NetworkEngine(Local(holds=1000), traits_of("blended", 2))
    with pytest.raises(RunError, match="too little memory"):
        engine.run(plane_of(200, 200))
    with pytest.raises(RunError):
        NetworkEngine(Local(holds=1000), Traits(2, tiling="fixed", side=40)).run(plane_of(40, 40))


def test_other_errors_are_not_taken_for_memory():
    runner = Local()
    runner.run = lambda planes, guide=None: (_ for _ in ()).throw(RuntimeError("shapes do not match"))  # type: ignore[assignment,misc]
    with pytest.raises(RuntimeError, match="shapes"):
        NetworkEngine(runner, traits_of("exact", 2)).run(plane_of(8, 8))


def test_what_libraries_say_of_memory():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(KeyError(), (KeyError,))
    assert not is_out_of_memory(KeyboardInterrupt("out of memory"))
    assert not is_out_of_memory(ValueError("memory format is not supported"))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 150), columns=st.integers(1, 150), down=st.floats(1.1, 4), across=st.floats(1.1, 4),
    reach=st.integers(0, 9), tile=st.integers(64, 160), holds=st.integers(8_000, 30_000),
)  # fmt: skip
def test_any_scale_in_tiles_and_parts_equals_the_whole(rows, columns, down, across, reach, tile, holds):
    planes = plane_of(rows, columns, 3)
    facts = Traits(1, tiling="exact", reach=reach, any_scale=True, size_multiple=1, bytes_per_pixel=1_000)
    tiled = AnyScaleEngine(Local(1, reach, holds=holds), facts, (down, across), tile=tile)
    whole = AnyScaleEngine(Local(1, reach), facts, (down, across))
    np.testing.assert_allclose(tiled.run(planes).planes, whole.run(planes).planes, rtol=1e-6)
    assert {shape[2:] for shape in whole.runner.given} == {(rows, columns)}


def test_a_limit_bounds_what_a_run_takes():
    runner = Local()
    engine = NetworkEngine(runner, traits_of("exact", 2), limit_bytes=20_000_000 + 1_000 * 90 * 90)
    engine.run(plane_of(200, 250))
    assert max(shape[-1] * shape[-2] for shape in runner.given) <= 90 * 90
    with pytest.raises(ArgumentsError, match="memory limit"):
        NetworkEngine(Local(), traits_of("exact", 2), limit_bytes=10**6).run(plane_of(200, 250))


def test_a_generator_on_enlarged_images_plans_with_their_size():
    runner = Local(1)
    engine = EnlargedFirst(runner, Traits(4, tiling="exact", bytes_per_pixel=1_000, enlarged_first=True), tile=64)
    assert engine.batch_of(16, 16) == 1
    assert engine.run(plane_of(70, 50)).planes.shape == (1, 1, 280, 200)
    assert max(shape[-1] for shape in runner.given) <= 256
    assert len(runner.given) == 2


def test_networks_that_tiles_change_say_so():
    engine = NetworkEngine(Local(), Traits(2, tiling="inexact", size_multiple=32, overlap=32), tile=64)
    engine.run(plane_of(60, 60))
    assert not engine.warnings
    engine.run(plane_of(100, 60))
    assert "statistics of the whole image" in engine.warnings[0]


def test_plans_stay_while_memory_comes_and_goes():
    """Every slice of a volume is cut alike, whatever other programs do meanwhile."""
    runner = Local()
    engine = NetworkEngine(runner, traits_of("blended", 2))
    first = engine.planned(300, 300)
    runner.free = 0
    assert engine.planned(300, 300) is first


def changed_area(net: torch.nn.Module, side: int, scale: int) -> int:
    """How many pixels of the input away a changed pixel in the middle still changes the result."""
    middle = side // 2
    one = torch.rand(1, net.config.in_channels, side, side, generator=torch.Generator().manual_seed(0)).double()
    other = one.clone()
    other[..., middle, middle] += 0.5
    with torch.inference_mode():
        where = (net(one) != net(other)).nonzero()[:, 2:]
    cells = torch.div(where, scale, rounding_mode="floor") - middle
    return int(cells.abs().max())


def test_the_stated_reach_is_what_a_changed_pixel_reaches():
    """With weights that let everything through, the reach is met exactly: no less is seen, and no more."""
    from medsr_cli.networks.msgan import MsGan, MsGanConfig
    from medsr_cli.networks.uscyclegan import Generator, GeneratorConfig

    msgan = MsGan(MsGanConfig(n_blocks=2, n_feats=8)).eval().double()
    generator = Generator(GeneratorConfig(width1=4, width2=4, width3=4)).eval().double()
    for net, scale in ((msgan, 4), (generator, 1)):
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                torch.nn.init.uniform_(module.weight, 0.01, 0.05)
        assert changed_area(net, 2 * net.reach + 21, scale) == net.reach
    assert (MSGAN.tiling, USCYCLEGAN.tiling, RDST.tiling) == ("exact", "exact", "blended")


def test_the_stated_reach_of_features_for_any_scale():
    from medsr_cli.networks.miassr import Miassr, MiassrConfig

    net = Miassr(MiassrConfig(n_blocks=3, n_feats=8, hidden=8)).eval()
    planes = plane_of(2 * net.reach + 80, 20)
    other = planes.copy()
    other[..., net.reach + 40, 10] += 5
    engine = AnyScaleEngine(TorchRunner(net, device="cpu"), Traits(1, tiling="exact", any_scale=True), (2.0, 2.0))
    change = np.abs(engine.run(other).planes - engine.run(planes).planes)[0, 0].max(axis=1)
    rows = np.nonzero(change)[0] // 2 - (net.reach + 40)
    assert -net.reach <= rows.min()
    assert rows.max() <= net.reach
    assert rows.max() > net.reach // 2


def test_rdst_in_tiles_equals_the_whole_within_one_stored_unit():
    """The shipped checkpoint for CT on 12-bit values, across one seam."""
    net = load_network(CHECKPOINTS / "rdst-e-x4-ct.safetensors")
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:112, :32]
    image = 0.5 + 0.3 * np.sin(rows / 5) * np.cos(columns / 7) + (rng.random((112, 32)) > 0.9) * 0.1
    planes = image[None, None]
    whole = engine_for(net, RDST, (4.0, 4.0), device="cpu").run(planes).planes
    tiled = engine_for(net, RDST, (4.0, 4.0), device="cpu", tile=80).run(planes).planes
    difference = np.abs(np.rint(whole * 4095) - np.rint(tiled * 4095))
    assert difference.max() <= 1
    assert np.abs(whole - tiled).max() > 0, "it was not cut"
