"""Inception-v3 of FID: names, sizes, pooling and preparation, and the files that it loads from."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name
from safetensors.torch import save_file

from medsr_cli.errors import WeightsError
from medsr_cli.networks import catalogue, checkpoint, load_network
from medsr_cli.networks.batch_norm import BatchNorm
from medsr_cli.networks.inception import Inception, InceptionConfig, InceptionE, config_from_state, mean_3x3

A = {"branch1x1": (64, 1, 1), "branch5x5_1": (48, 1, 1), "branch5x5_2": (64, 5, 5), "branch3x3dbl_1": (64, 1, 1),
     "branch3x3dbl_2": (96, 3, 3), "branch3x3dbl_3": (96, 3, 3)}  # fmt: skip
SHAPES = {
    "Conv2d_1a_3x3": (32, 3, 3, 3), "Conv2d_2a_3x3": (32, 32, 3, 3), "Conv2d_2b_3x3": (64, 32, 3, 3),
    "Conv2d_3b_1x1": (80, 64, 1, 1), "Conv2d_4a_3x3": (192, 80, 3, 3),
    "Mixed_5b.branch_pool": (32, 192, 1, 1), "Mixed_5c.branch_pool": (64, 256, 1, 1),
    "Mixed_5d.branch_pool": (64, 288, 1, 1), "Mixed_6a.branch3x3": (384, 288, 3, 3),
    "Mixed_6a.branch3x3dbl_3": (96, 96, 3, 3), "Mixed_6b.branch7x7_2": (128, 128, 1, 7),
    "Mixed_6b.branch7x7_3": (192, 128, 7, 1), "Mixed_6c.branch7x7dbl_2": (160, 160, 7, 1),
    "Mixed_6d.branch7x7dbl_5": (192, 160, 1, 7), "Mixed_6e.branch7x7dbl_4": (192, 192, 7, 1),
    "Mixed_6e.branch_pool": (192, 768, 1, 1), "Mixed_7a.branch3x3_2": (320, 192, 3, 3),
    "Mixed_7a.branch7x7x3_4": (192, 192, 3, 3), "Mixed_7b.branch1x1": (320, 1280, 1, 1),
    "Mixed_7b.branch3x3_2a": (384, 384, 1, 3), "Mixed_7c.branch3x3_2b": (384, 384, 3, 1),
    "Mixed_7c.branch3x3dbl_1": (448, 2048, 1, 1), "Mixed_7c.branch3x3dbl_3a": (384, 384, 1, 3),
    "Mixed_7c.branch3x3dbl_3b": (384, 384, 3, 1), "Mixed_7c.branch_pool": (192, 2048, 1, 1),
    **{f"Mixed_5b.{name}": (n, 192 if name[-1] == "1" else {"branch5x5_2": 48, "branch3x3dbl_2": 64}.get(name, 96), *k)
       for name, (n, *k) in A.items()},
}  # fmt: skip


def narrow(seed: int = 0) -> Inception:
    torch.manual_seed(seed)
    net = Inception(InceptionConfig(16)).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net


def test_names_shapes_and_size_are_those_of_the_published_file():
    with torch.device("meta"):
        state = Inception().state_dict()
    for unit, shape in SHAPES.items():
        assert tuple(state[f"{unit}.conv.weight"].shape) == shape, unit
    parts = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    units = {key.rsplit(".", 2)[0] for key in state}
    assert len(units) == 94
    # The file has 566 tensors: these, a counter for each batch norm, and the classifier's weight and bias.
    assert len(state) + len(units) + 2 == 566
    assert set(state) == {f"{unit}.{part}" for unit in units for part in parts}
    # torchvision's count for Inception-v3, less its auxiliary and its own classifier.
    trained = sum(value.numel() for key, value in state.items() if "running" not in key)
    assert trained == 27_161_264 - 3_326_696 - 2_049_000 == catalogue.INCEPTION.parameters["inception"]


def test_pooling_leaves_out_what_lies_beyond_the_border_but_in_the_last_block():
    x = torch.rand(1, 2, 4, 5)
    padded, inside = F.pad(x, (1, 1, 1, 1)), F.pad(torch.ones_like(x), (1, 1, 1, 1))
    expected = F.avg_pool2d(padded, 3, 1) / F.avg_pool2d(inside, 3, 1)
    torch.testing.assert_close(mean_3x3(x), expected)
    torch.manual_seed(0)
    mean, maximum = InceptionE(16, 16, maximum=False).eval(), InceptionE(16, 16, maximum=True).eval()
    maximum.load_state_dict(mean.state_dict())
    x = torch.rand(1, 16, 8, 8)
    a, b = mean(x), maximum(x)
    assert torch.equal(a[:, :-12], b[:, :-12]), "all branches but the pooling one"
    torch.testing.assert_close(a[:, -12:], mean.branch_pool(mean_3x3(x)))
    torch.testing.assert_close(b[:, -12:], mean.branch_pool(F.max_pool2d(x, 3, 1, 1)))
    net = narrow()
    assert (net.Mixed_7b.maximum, net.Mixed_7c.maximum) == (False, True)


def test_batch_norm_has_tensorflows_epsilon():
    unit = narrow().Conv2d_1a_3x3
    x = torch.rand(1, 3, 9, 9)
    y = F.conv2d(x, unit.conv.weight, stride=2)
    mean, var, weight, bias = (
        v[None, :, None, None] for v in (unit.bn.running_mean, unit.bn.running_var, unit.bn.weight, unit.bn.bias)
    )
    torch.testing.assert_close(unit(x), ((y - mean) / (var + 1e-3).sqrt() * weight + bias).clamp(min=0))


def test_images_are_resized_and_scaled():
    net, image = narrow(), torch.rand(2, 3, 40, 61)
    with torch.no_grad():
        found = net(image)
        large = F.interpolate(image, (299, 299), mode="bilinear", align_corners=False, antialias=False)
        torch.testing.assert_close(found, net.features(large * 2 - 1))
        assert found.shape == (2, 128)
        assert not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("size", [299, 75])
def test_sizes_on_the_way_are_those_of_the_paper(size):
    net, seen = narrow(), {}
    for name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"):
        getattr(net, name).register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out.shape[-1]}))
    with torch.no_grad():
        net.features(torch.zeros(1, 3, size, size))
    assert list(seen.values()) == ([147, 71, 35, 17, 8] if size == 299 else [35, 15, 7, 3, 1])


def published(net: Inception) -> dict[str, torch.Tensor]:
    """With what the published file has beside the features: counters and a classifier of 1008 classes."""
    counters = {
        key.replace("running_mean", "num_batches_tracked"): torch.tensor(0)
        for key in net.state_dict()
        if key.endswith("running_mean")
    }
    return {**net.state_dict(), **counters, "fc.weight": torch.ones(1008, 128), "fc.bias": torch.ones(1008)}


def test_the_published_file_loads_and_travels(tmp_path):
    net, path = narrow(), tmp_path / "inception.pth"
    torch.save(published(net), path)
    loaded = checkpoint.network_from_state(checkpoint.read_author_checkpoint(path), catalogue.INCEPTION)
    assert isinstance(loaded, Inception)
    assert loaded.config == InceptionConfig(16)
    assert catalogue.detect(published(net)) == [catalogue.INCEPTION]
    checkpoint.rehearse(loaded)
    saved = tmp_path / "inception.safetensors"
    saved.write_bytes(checkpoint.save_network(loaded))
    image = torch.rand(1, 3, 20, 20)
    with torch.no_grad():
        assert torch.equal(load_network(saved)(image), net(image))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"Conv2d_1a_3x3.conv.weight": None}, "Conv2d_1a_3x3.conv.weight is missing"),
        ({"Mixed_6b.branch1x1.bn.bias": None}, "lacks the tensor Mixed_6b.branch1x1.bn.bias"),
        ({"Mixed_6b.branch1x1.bn.running_var": -torch.ones(12)}, "below zero"),
        ({"Conv2d_1a_3x3.conv.weight": torch.ones(3, 3, 3, 3)}, "3 channels"),
        ({"Conv2d_1a_3x3.conv.weight": torch.ones(1, 3, 3, 3)}, "not of its shapes"),
        ({"Mixed_8a.conv.weight": torch.ones(1)}, "Mixed_8a.conv.weight"),
    ],
)
def test_what_is_no_inception_is_refused(tmp_path, change, sentence):
    state = {key: value for key, value in {**narrow().state_dict(), **change}.items() if value is not None}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=sentence):
        checkpoint.network_from_state(
            checkpoint.read_author_checkpoint(tmp_path / "a.safetensors"), catalogue.INCEPTION
        )


def test_divisors():
    for divisor in (1, 2, 4, 8, 16):
        key = "Conv2d_1a_3x3.conv.weight"
        assert config_from_state({key: torch.ones(32 // divisor, 3, 3, 3)}) == InceptionConfig(divisor)
        assert InceptionConfig(divisor).features == 2048 // divisor
    with pytest.raises(ValueError, match="cannot be divided by 3"):
        InceptionConfig(3)
