"""VGG-19 features and the losses on them: torchvision's names, MIASSR's number, and each paper's preparation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name
from safetensors.torch import save_file

from medsr_cli.errors import WeightsError
from medsr_cli.networks import catalogue, checkpoint, load_network
from medsr_cli.networks.perceptual import (
    PERCEPTION_CONSISTENCY,
    VGG22,
    VGG54,
    VGG54_ACTIVATED,
    PerceptualLoss,
    PerceptualSpec,
    cyclegan_loss,
    load_perceptual,
    shortened,
)
from medsr_cli.networks.vgg import LAYERS, Vgg19Features, VggConfig, config_from_state, convolution_of
from tests.networks.golden import assert_close, fixture, procedural_state

NUMBERS = (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34)
"""The convolutions among torchvision's `features`."""


def narrow(last: str = "conv5_4", width: int = 2) -> Vgg19Features:
    torch.manual_seed(5)
    return Vgg19Features(VggConfig(width, last)).eval()


def golden_vgg22() -> tuple[PerceptualLoss, dict, dict]:
    facts, _, tensors = fixture("vgg22_loss")
    vgg = Vgg19Features(VggConfig(last="conv2_2"))
    state = procedural_state(vgg, facts["procedural_seed"], name=lambda key: key.removeprefix("features."))
    vgg.load_state_dict(state)
    return PerceptualLoss(VGG22, vgg), facts, tensors


def test_vgg22_equals_that_of_miassr():
    loss, facts, tensors = golden_vgg22()
    features = loss.features(tensors["sr"])[:, :8]
    wanted = tensors["feat_sr_first8"]
    assert_close(features, wanted, 2e-5)
    assert float(loss(tensors["sr"], tensors["hr"])) == pytest.approx(facts["scalars"]["mse_loss"], rel=1e-5)


# --- the network -----------------------------------------------------------------------------------------------


def test_names_shapes_and_size_are_those_of_torchvision():
    with torch.device("meta"):
        state = Vgg19Features().state_dict()
    assert list(state) == [f"features.{i}.{part}" for i in NUMBERS for part in ("weight", "bias")]
    widths = [64, 64, 128, 128, *[256] * 4, *[512] * 8]
    assert [tuple(state[f"features.{i}.weight"].shape) for i in NUMBERS] == [
        (wide, before, 3, 3) for before, wide in zip([3, *widths], widths, strict=False)
    ]
    assert sum(value.numel() for value in state.values()) == catalogue.VGG19.parameters["vgg19"] == 20_024_384
    assert len(LAYERS) == 37


def by_definition(vgg: Vgg19Features, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every activation, straight from configuration E."""
    state, found, x, number = vgg.state_dict(), {}, image, 0
    for block, count in enumerate((2, 2, 4, 4, 4), start=1):
        for i in range(1, count + 1):
            key = f"features.{NUMBERS[number]}."
            x = found[f"conv{block}_{i}"] = F.conv2d(x, state[key + "weight"], state[key + "bias"], padding=1)
            x = found[f"relu{block}_{i}"] = x.clamp(min=0)
            number += 1
        x = found[f"pool{block}"] = F.max_pool2d(x, 2)
    return found


@pytest.mark.parametrize("size", [(32, 32), (45, 37)])
def test_every_layer_is_that_of_the_definition(size):
    vgg, image = narrow(width=3), torch.rand(2, 3, *size)
    with torch.no_grad():
        expected = by_definition(vgg, image)
        taken = vgg(image, LAYERS)
        assert torch.equal(vgg(image), expected["pool5"])
    for name, value in zip(LAYERS, taken, strict=True):
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_taps_come_in_the_order_asked_for_and_nothing_deeper_runs():
    vgg, image = narrow(), torch.rand(1, 3, 32, 32)
    ran: list[int] = []
    for i, layer in enumerate(vgg.features):
        layer.register_forward_hook(lambda *_args, i=i: ran.append(i))
    deep, shallow, again = vgg(image, ("pool2", "conv1_2", "pool2"))
    assert deep.shape == (1, 4, 8, 8)
    assert shallow.shape == (1, 2, 32, 32)
    assert deep is again
    assert ran == list(range(LAYERS.index("pool2") + 1))
    assert shallow.min() < 0, "before the ReLU, and not changed by it"


@pytest.mark.parametrize("taps", [(), ("conv6_1",), ("conv1_1", "relu3_4")])
def test_layers_that_are_not_there_are_refused(taps):
    with pytest.raises(ValueError, match="has the layers conv1_1 to"):
        narrow("conv3_1")(torch.rand(1, 3, 32, 32), taps)


def test_configurations_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="conv6_1"):
        VggConfig(last="conv6_1")
    with pytest.raises(ValueError, match="relu1_1"):
        VggConfig(last="relu1_1")
    with pytest.raises(ValueError, match="width"):
        VggConfig(width=0)
    with pytest.raises(ValueError, match="pool6"):
        convolution_of("pool6")


# --- checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", ["conv1_2", "conv2_2", "conv4_4", "conv5_4"])
@pytest.mark.parametrize("with_metadata", [True, False])
def test_every_size_is_recovered(tmp_path, last, with_metadata):
    vgg, path = narrow(last, width=3), tmp_path / "a.safetensors"
    if with_metadata:
        path.write_bytes(checkpoint.save_network(vgg))
    else:
        save_file(vgg.state_dict(), path)
    found = load_network(path)
    assert found.config == vgg.config
    checkpoint.rehearse(found)
    with torch.no_grad():
        image = torch.rand(1, 3, 32, 32)
        assert torch.equal(found(image), vgg(image))


def as_torchvision(vgg: Vgg19Features) -> dict[str, torch.Tensor]:
    """With the classifier that torchvision's checkpoints have."""
    classifier = {f"classifier.{i}.{part}": torch.ones(2) for i in (0, 3, 6) for part in ("weight", "bias")}
    return {**vgg.state_dict(), **classifier}


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_checkpoint_of_torchvision_loads_as_it_is(tmp_path, ending):
    vgg, path = narrow(), tmp_path / f"vgg19.{ending}"
    (torch.save if ending == "pth" else save_file)(as_torchvision(vgg), path)
    loss = load_perceptual(path, VGG54)
    image, other = torch.rand(2, 1, 3, 32, 32)
    assert torch.equal(loss(image, other), PerceptualLoss(VGG54, vgg)(image, other))
    assert loss(image, other) > 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"features.12.weight": None}, "lacks the tensor features.12.weight"),
        ({"features.0.weight": None}, "no network that medsr knows|features.0.weight is missing"),
        ({"features.35.weight": torch.ones(2)}, "features.35.weight"),
        ({"features.7.bias": torch.ones(3)}, r"features.7.bias in shape \(3,\), where vgg19 needs \(4,\)"),
        ({"features.34.bias": torch.full((16,), torch.nan)}, "NaN or infinity in the tensor features.34.bias"),
        ({"features.0.weight": torch.ones(())}, "not of its shapes"),
        ({"features.0.weight": torch.ones(70_000, 3, 1, 1)}, "shape"),
    ],
)
def test_what_is_no_vgg19_is_refused(tmp_path, change, sentence):
    state = {**as_torchvision(narrow()), **change}
    state = {key: value for key, value in state.items() if value is not None}
    save_file(state, tmp_path / "bad.safetensors")
    torch.save(state, tmp_path / "bad.pth")
    for name in ("bad.safetensors", "bad.pth"):
        with pytest.raises(WeightsError, match=sentence):
            load_perceptual(tmp_path / name, VGG22)


def test_too_short_a_network_and_another_one_are_refused(tmp_path):
    short = tmp_path / "short.safetensors"
    short.write_bytes(checkpoint.save_network(narrow("conv2_2")))
    with pytest.raises(WeightsError, match=r"short\.safetensors ends with pool2; the loss compares conv5_4"):
        load_perceptual(short, VGG54)
    with pytest.raises(ValueError, match="ends with pool2, before pool4"):
        shortened(narrow("conv2_2"), "pool4")
    from medsr_cli.networks.uscyclegan import Generator, GeneratorConfig

    other = tmp_path / "other.safetensors"
    other.write_bytes(checkpoint.save_network(Generator(GeneratorConfig(width1=2, width2=2, width3=2))))
    with pytest.raises(WeightsError, match="is not a VGG-19"):
        load_perceptual(other, VGG22)


def test_classifiers_are_dropped_by_their_prefix_only():
    state = {**narrow("conv1_2").state_dict(), "my.classifier.weight": torch.ones(1)}
    with pytest.raises(WeightsError, match=r"my\.classifier\.weight"):
        checkpoint.network_from_state(state, catalogue.VGG19)
    assert config_from_state(state) == VggConfig(2, "conv1_2")


# --- the losses ------------------------------------------------------------------------------------------------


def imagenet(image: torch.Tensor) -> torch.Tensor:
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (image - mean[:, None, None]) / deviation[:, None, None]


@pytest.mark.parametrize(
    ("spec", "prepared"),
    [
        (VGG22, imagenet),
        (VGG54, imagenet),
        (VGG54_ACTIVATED, imagenet),
        (
            PERCEPTION_CONSISTENCY,
            lambda image: (F.interpolate(image, (224, 224), mode="bicubic", align_corners=True) + 1) / 2,
        ),
        (
            PerceptualSpec("relu1_2", "none", side=40),
            lambda i: F.interpolate(i, 40, mode="bicubic", align_corners=True),
        ),
    ],
)
def test_each_papers_loss_by_definition(spec, prepared):
    vgg = narrow()
    result, target = torch.rand(2, 2, 3, 36, 33)
    with torch.no_grad():
        a, b = (by_definition(vgg, prepared(image))[spec.layer] for image in (result, target))
        found = PerceptualLoss(spec, vgg)(result, target)
    assert found > 0
    torch.testing.assert_close(found, ((a - b) ** 2).mean(), rtol=1e-5, atol=0)


def test_the_cyclegans_loss_needs_no_more_than_twelve_convolutions():
    vgg, (result, target) = narrow("conv4_4"), torch.rand(2, 1, 3, 16, 20)
    assert torch.equal(cyclegan_loss(vgg)(result, target), PerceptualLoss(PERCEPTION_CONSISTENCY, vgg)(result, target))
    with pytest.raises(WeightsError, match="ends with relu4_3; the loss compares pool4"):
        cyclegan_loss(narrow("conv4_3"))


def test_grey_is_three_equal_channels_and_other_numbers_are_added_up():
    loss = PerceptualLoss(VGG22, narrow())
    result, target = torch.rand(2, 3, 4, 16, 18)
    grey = [loss(result[:, i : i + 1], target[:, i : i + 1]) for i in range(4)]
    torch.testing.assert_close(grey[0], loss(result[:, :1].repeat(1, 3, 1, 1), target[:, :1].repeat(1, 3, 1, 1)))
    torch.testing.assert_close(loss(result, target), sum(grey))
    torch.testing.assert_close(loss(result[:, :2], target[:, :2]), grey[0] + grey[1])
    rgb = loss(result[:, :3], target[:, :3])
    assert not torch.isclose(rgb, sum(grey[:3])), "RGB is one image"


@pytest.mark.parametrize("spec", [VGG22, PERCEPTION_CONSISTENCY])
def test_the_network_is_frozen_and_the_image_is_not(spec):
    vgg = narrow()
    loss = PerceptualLoss(spec, vgg).train()
    result = torch.rand(1, 1, 20, 20, requires_grad=True)
    loss(result, torch.rand(1, 1, 20, 20)).backward()
    assert result.grad is not None
    assert result.grad.abs().sum() > 0
    assert not [p for p in loss.parameters() if p.requires_grad]
    assert all(p.requires_grad for p in vgg.parameters()), "the one it was made from is left alone"
    assert not loss.state_dict().keys() & {"mean", "deviation"}


def test_only_the_layers_it_needs_are_kept_and_shared():
    vgg = narrow()
    loss = PerceptualLoss(VGG22, vgg)
    assert loss.vgg.config.last == "conv2_2"
    pointers = {value.data_ptr() for value in vgg.state_dict().values()}
    assert {value.data_ptr() for value in loss.vgg.state_dict().values()} < pointers


def test_double_precision_agrees():
    loss, (result, target) = PerceptualLoss(VGG54, narrow()), torch.rand(2, 1, 3, 32, 32)
    single = loss(result, target).double()
    torch.testing.assert_close(loss.double()(result.double(), target.double()), single, rtol=1e-4, atol=1e-12)


def test_images_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="cannot be compared"):
        PerceptualLoss(VGG22, narrow())(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 18))


def test_preparations_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="normalisation"):
        PerceptualSpec("conv1_1", "caffe")
    with pytest.raises(ValueError, match="conv9_1"):
        PerceptualSpec("conv9_1")
