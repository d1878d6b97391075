"""The ultrasound CycleGAN's networks against the authors' released ones, and the parts of its inference."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from medsr_cli.errors import WeightsError
from medsr_cli.networks import catalogue, checkpoint, load_network
from medsr_cli.networks.uscyclegan import (
    Discriminator,
    DiscriminatorConfig,
    Generator,
    GeneratorConfig,
    HrToLr,
    HrToLrConfig,
    config_from_state,
    example_inputs,
    made_ready,
)
from medsr_cli.volume.antialias import antialiased_resize
from tests.networks.golden import SPECS, assert_close, fixture

TINY = GeneratorConfig(width1=4, width2=5, width3=6)
ODD = GeneratorConfig(in_channels=1, width1=3, width2=7, width3=5, negative_slope=0.01, scale=3)


SHARE = 2e-5
"""A right implementation in float32 is about 3e-6 of the range away; the fixtures allow 1e-4."""


def tiny(config: GeneratorConfig = TINY) -> Generator:
    torch.manual_seed(2)
    return Generator(config).eval()


# --- against the released modules ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "train", "ready"])
def test_generator_equals_the_released_one(mode):
    facts, state, tensors = fixture("uscyclegan_generator")
    net = checkpoint.network_from_state(state, catalogue.USCYCLEGAN).train(mode == "train")
    net = made_ready(net) if mode == "ready" else net
    assert list(net.config.widths) == facts["config"]["channels"]
    for case in facts["cases"]:
        with torch.no_grad():
            assert_close(net(tensors[case["x"]]), tensors[case["y"]], SHARE)


def test_hr_to_lr_equals_the_released_one():
    facts, state, tensors = fixture("uscyclegan_hr2lr")
    w = facts["config"]["block_widths"]
    net = HrToLr(HrToLrConfig(width1=w[0], width2=w[2], width3=w[4], width4=w[6]))
    modes = set()
    for case in facts["cases"]:
        net.load_state_dict(state)  # training moves the running statistics
        net.train(case["mode"] == "train")
        modes.add(case["mode"])
        with torch.no_grad():
            assert_close(net(tensors[case["x"]], tensors[case["z"]]), tensors[case["y"]], SHARE)
    assert modes == {"train", "eval"}


def test_discriminator_equals_the_released_one():
    facts, state, tensors = fixture("uscyclegan_discriminator")
    c = facts["config"]
    net = Discriminator(DiscriminatorConfig(conv_dim=c["conv_dim"], repeat_num=c["repeat_num"]))
    for case in facts["cases"]:
        net.load_state_dict(state)
        net.train(case["mode"] == "train")
        with torch.no_grad():
            assert_close(net(tensors[case["x"]]), tensors[case["y"]], SHARE)


@pytest.mark.parametrize(
    ("part", "make", "count"),
    [
        ("generator", Generator, 260_729),
        ("hr2lr", HrToLr, 12_300_280),
        ("discriminator", Discriminator, 6_962_369),
    ],
)
def test_released_names_shapes_and_sizes(part, make, count):
    with torch.device("meta"):
        net = make()
    assert sum(value.numel() for value in net.parameters()) == count
    listed = SPECS / "uscyclegan_state_dict.json"
    if listed.exists():
        keys = json.loads(listed.read_text())["keys"]
        wanted = {key.split("/", 1)[1]: shape for key, shape in keys.items() if key.startswith(f"{part}/")}
        assert {key: list(value.shape) for key, value in net.state_dict().items()} == wanted


# --- inference from its parts ----------------------------------------------------------------------------------


def back_project(result: np.ndarray, low: np.ndarray, steps: int) -> np.ndarray:
    for _ in range(steps):
        error = low - antialiased_resize(result, low.shape[-2:])
        result = np.clip(result + antialiased_resize(error, result.shape[-2:]), 0, 1)
    return result


def one_member(net: Generator, low: np.ndarray, k: int) -> np.ndarray:
    """Quarter turns counter-clockwise, from the fifth on mirrored; enlarged, restored, turned back."""
    turned = np.rot90(low, k, axes=(1, 2))
    turned = turned[..., ::-1] if k >= 4 else turned
    enlarged = antialiased_resize(turned, (4 * turned.shape[1], 4 * turned.shape[2]))
    with torch.no_grad():
        result = net(torch.from_numpy(enlarged[None]))[0].numpy()
    result = result[..., ::-1] if k >= 4 else result
    return np.rot90(result, -k, axes=(1, 2))


def test_the_parts_make_the_whole_inference():
    facts, state, tensors = fixture("uscyclegan_inference")
    net = checkpoint.network_from_state(state, catalogue.USCYCLEGAN).double()
    for case in facts["cases"]:
        low = tensors[case["x"]].double().permute(2, 0, 1).numpy()  # (3, H, W)
        single = torch.from_numpy(one_member(net, low, 0).copy()).permute(1, 2, 0)
        assert_close(single.float(), tensors[case["single_sym"]], SHARE)
        members = [back_project(one_member(net, low, k), low, 10) for k in range(8)]
        result = back_project(np.median(members, axis=0), low, 10)
        assert_close(torch.from_numpy(result).permute(1, 2, 0).float(), tensors[case["y_sym"]], SHARE)


# --- what holds for any size -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, ODD])
@pytest.mark.parametrize("size", [(1, 1), (1, 30), (3, 5), (20, 33)])
def test_any_size_comes_out_as_it_went_in(config, size):
    net = tiny(config)
    image = torch.rand(2, config.in_channels, *size)
    with torch.inference_mode():
        result = net(image)
        alone = torch.cat([net(one[None]) for one in image])
    assert result.shape == image.shape
    assert 0 <= result.min() <= result.max() <= 1
    torch.testing.assert_close(result, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("config", [TINY, ODD])
def test_the_ready_generator_is_the_generator(config):
    net = tiny(config)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    ready = made_ready(net)
    assert not any(isinstance(layer, torch.nn.ConvTranspose2d) for layer in ready.modules())
    for size in ((1, 1), (3, 40), (20, 33)):
        image = torch.rand(2, config.in_channels, *size)
        with torch.inference_mode():
            torch.testing.assert_close(ready(image), net(image), atol=1e-6, rtol=0)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(value.requires_grad for value in net.parameters())


def test_double_precision_agrees():
    net, image = tiny(ODD), torch.rand(1, 1, 17, 23)
    with torch.no_grad():
        single, double = net(image), net.double()(image.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, atol=1e-6, rtol=0)


def test_reach_is_the_receptive_field():
    net = tiny().double()
    with torch.no_grad():  # keep the result off the limits of the clamp, where nothing depends on anything
        net.final_conv.bias.fill_(0.5)
    image = torch.rand(1, 3, 45, 45, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(image)[0, :, 22, 22].sum(), image)
    rows, columns = torch.nonzero(gradient.abs().sum(dim=(0, 1)), as_tuple=True)
    found = [int(x) for x in (rows.min(), rows.max(), columns.min(), columns.max())]
    assert found == [22 - net.reach, 22 + net.reach] * 2


def test_tiles_with_a_halo_are_exact():
    net = tiny()
    image = torch.rand(1, 3, 60, 37)
    halo = net.reach
    with torch.no_grad():
        whole = net(image)
        upper, lower = net(image[..., : 30 + halo, :])[..., :30, :], net(image[..., 30 - halo :, :])[..., halo:, :]
    torch.testing.assert_close(torch.cat((upper, lower), dim=-2), whole, atol=1e-6, rtol=0)


def test_released_slope_makes_it_affine_and_the_intended_one_does_not():
    def bend(slope: float) -> float:
        """How far the result of a mean is from the mean of the results, before tanh and clamp."""
        net = tiny(dataclasses.replace(TINY, negative_slope=slope)).double()
        results: list[torch.Tensor] = []
        net.final_conv.register_forward_hook(lambda _module, _inputs, out: results.append(out))
        one, other = torch.rand(2, 1, 3, 9, 9, dtype=torch.float64)
        with torch.no_grad():
            for image in (one, other, (one + other) / 2):
                net(image)
        return float((results[2] - (results[0] + results[1]) / 2).abs().max())

    assert bend(1.0) < 1e-12
    assert bend(0.01) > 1e-6


def test_inference_mode_leaves_the_network_trainable():
    net = tiny(ODD)
    image = torch.rand(1, 1, 9, 9)
    with torch.inference_mode():
        net(image)
    with torch.no_grad():
        net.final_conv.bias.fill_(0.5)
    net.train()(image).mean().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in net.parameters())


# --- F and D ---------------------------------------------------------------------------------------------------

SMALL = HrToLrConfig(width1=4, width2=4, width3=8, width4=16, hidden=4, noise_dim=5, side=32)


def test_hr_to_lr_is_a_blurred_image_that_the_noise_changes():
    torch.manual_seed(4)
    net = HrToLr(SMALL).eval()
    with torch.no_grad():
        net.out_layer[2].weight.mul_(20)
    image, noise = torch.rand(2, 3, 32, 32), torch.randn(2, 1, 5)
    with torch.no_grad():
        first, second = net(image, noise), net(image, noise + 1)
        alone = net(image[1:], noise[1:])
    assert first.shape == image.shape
    assert not torch.equal(first, second)
    torch.testing.assert_close(first[1:], alone, atol=1e-5, rtol=0)
    assert 0 <= first.min() <= first.max() <= 1


def test_hr_to_lr_takes_one_size_only():
    with pytest.raises(ValueError, match="32x32 pixels, not 32x48"):
        HrToLr(SMALL)(torch.rand(1, 3, 32, 48), torch.randn(1, 1, 5))


def test_sizes_that_cannot_be_are_refused():
    for wrong in (
        lambda: GeneratorConfig(width2=0),
        lambda: GeneratorConfig(negative_slope=1.5),
        lambda: HrToLrConfig(width4=40),
        lambda: HrToLrConfig(side=60),
        lambda: HrToLrConfig(noise_dim=0),
        lambda: DiscriminatorConfig(repeat_num=-1),
    ):
        with pytest.raises(ValueError, match=r"width|Width|slope|side|repetitions"):
            wrong()


@pytest.mark.parametrize(("repeat_num", "side"), [(1, 13), (2, 5), (3, 1)])
def test_discriminator_has_one_logit_for_each_patch(repeat_num, side):
    net = Discriminator(DiscriminatorConfig(in_channels=1, conv_dim=4, repeat_num=repeat_num)).eval()
    with torch.no_grad():
        assert net(torch.rand(2, 1, 64, 64)).shape == (2, 1, side, side)


# --- checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, ODD, GeneratorConfig(width1=9, width2=2, width3=3, scale=2)])
def test_every_size_is_recovered(tmp_path, config):
    net = tiny(config)
    shapes_only = dataclasses.replace(config, negative_slope=1.0, scale=4)
    assert config_from_state(net.state_dict()) == shapes_only
    path = tmp_path / "a.safetensors"
    path.write_bytes(checkpoint.save_network(net))
    found = load_network(path)
    assert found.config == config
    checkpoint.rehearse(found)
    with torch.no_grad():
        assert torch.equal(found(*example_inputs(config)), net(*example_inputs(config)))
    save_file(net.state_dict(), path)
    assert load_network(path).config == shapes_only


def spoil(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    match how:
        case "missing":
            del state["decoder2_1.conv.2.bias"]
        case "first-missing":
            del state["encoder2.conv.0.weight"]
        case "extra":
            state["decoder4.conv.0.weight"] = torch.ones(1)
        case "shape":
            state["conv.bias"] = torch.ones(4)
        case "rank":
            state["encoder1.conv.0.weight"] = torch.ones(4)
        case "nan":
            state["final_conv.bias"][1] = float("nan")
        case "empty":
            state["encoder3.conv.0.weight"] = torch.ones(0, 5, 3, 3)
        case "wide":
            state["encoder3.conv.0.weight"] = torch.ones(3_000_000, 1, 1, 1)
        case "other":
            return {"head.weight": torch.ones(2, 1, 3, 3)}
    return state


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("missing", "lacks the tensor decoder2_1.conv.2.bias"),
        ("first-missing", "encoder2.conv.0.weight is missing"),
        ("extra", "decoder4"),
        ("shape", r"conv.bias in shape \(4,\), where uscyclegan needs \(3,\)"),
        ("rank", "not of its shapes"),
        ("nan", "NaN or infinity in the tensor final_conv.bias"),
        ("empty", "not of its shapes"),
        ("wide", "shape"),
        ("other", "encoder1.conv.0.weight is missing"),
    ],
)
def test_what_is_no_generator_is_refused(how, sentence):
    state = spoil({key: value.clone() for key, value in tiny().state_dict().items()}, how)
    with pytest.raises(WeightsError, match=sentence):
        checkpoint.network_from_state(state, catalogue.USCYCLEGAN, name="bad.pt")


def test_a_generator_is_told_from_other_networks():
    assert catalogue.detect(tiny().state_dict()) == [catalogue.USCYCLEGAN]
