"""Every term against golden values or its formula, and where its gradient goes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name
from safetensors.torch import load_file

from medsr_cli.errors import ArgumentsError, WeightsError
from medsr_cli.networks.vgg import Vgg19Features, VggConfig
from medsr_cli.networks.wgan import Discriminator, DiscriminatorConfig
from medsr_cli.training.batch import Batch, Outputs
from medsr_cli.training.losses import TERMS, build_terms, dice_loss, needed_networks, ssim
from medsr_cli.training.recipe import Recipe
from tests.networks.test_seg_unet import SHARED, golden, needs_shared, tiny
from tests.networks.test_vgg import golden_vgg22

CPU = torch.device("cpu")


def batch_of(high: torch.Tensor, **more) -> Batch:
    return Batch(low=torch.zeros(len(high), 1, 2, 2), high=high, **more)


def value(name: str, result: torch.Tensor, batch: Batch, networks=None, extras=None, **recipe) -> torch.Tensor:
    (term,) = build_terms(Recipe(losses={name: 1.0}, **recipe), networks or {}, CPU)
    assert (term.name, term.weight) == (name, 1.0)
    return term(Outputs(result, extras or {}), batch)


def pair(*shape: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.rand(2, *shape).to(dtype).unbind(0)


# --- golden ----------------------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_every_loss_of_rdst_is_the_authors(mode):
    net, facts, tensors = golden()
    before = {key: v.clone() for key, v in net.state_dict().items() if "running" in key}
    names = {f"encoder{i}": f"E{i}_l1" for i in range(1, 6)} | {f"encoder{i}_mse": f"E{i}_mse" for i in range(1, 6)}
    names |= {"decoder": "D_l1", "hrl": "HRL_dice_123", "hrl_background": "HRL_dice_0123"}
    recipe = Recipe(losses=dict.fromkeys((*names, "encoders"), 1.0), encoder_batch_statistics=mode == "train")
    with torch.no_grad():
        terms = build_terms(recipe, {"segmentation": net}, CPU)
        found = {term.name: term(Outputs(tensors["sr"]), batch_of(tensors["hr"])).item() for term in terms}
    for name, key in names.items():
        assert found[name] == pytest.approx(facts["scalars"][f"{mode}/{key}"], rel=1e-4), name
    assert found["encoders"] == pytest.approx(sum(found[f"encoder{i}"] for i in range(1, 6)), rel=1e-5)
    after = net.state_dict()
    assert all(torch.equal(v, after[key]) for key, v in before.items()), "the running statistics moved"


def test_vgg22_is_that_of_miassr():
    loss, facts, tensors = golden_vgg22()
    found = value("vgg22", tensors["sr"], batch_of(tensors["hr"]), {"vgg": loss.vgg})
    assert found.item() == pytest.approx(facts["scalars"]["mse_loss"], rel=1e-4)


@needs_shared
@pytest.mark.parametrize(("case", "wanted"), [(0, 0.0030360160977579652), (1, 0.02483012289740145)])
def test_cohft_is_the_authors(case, wanted):
    tensors = load_file(SHARED / "golden" / "m2trans_cohft_metrics.safetensors")
    result, target = tensors[f"cohft.sr{case}"], tensors[f"cohft.hr{case}"]
    assert value("cohft", result, batch_of(target)).item() == pytest.approx(wanted, abs=1e-6)


# --- formulas --------------------------------------------------------------------------------------------------


def test_ssim_by_scipy():
    ndimage = pytest.importorskip("scipy.ndimage")
    x, y = (image.double() for image in pair(2, 1, 20, 17))
    position = np.arange(11) - 5
    weights = np.exp(-(position**2) / (2 * 1.5**2))
    window = np.outer(weights, weights) / weights.sum() ** 2

    def mean(image):
        return ndimage.correlate(image, window, mode="constant")

    maps = []
    for a, b in zip(x[:, 0].numpy(), y[:, 0].numpy(), strict=True):
        var_a, var_b, both = mean(a * a) - mean(a) ** 2, mean(b * b) - mean(b) ** 2, mean(a * b) - mean(a) * mean(b)
        top = (2 * mean(a) * mean(b) + 1e-4) * (2 * both + 9e-4)
        maps.append(top / ((mean(a) ** 2 + mean(b) ** 2 + 1e-4) * (var_a + var_b + 9e-4)))
    assert ssim(x, y).item() == pytest.approx(np.mean(maps), abs=1e-12)
    assert ssim(x, x).item() == pytest.approx(1)
    channels = torch.cat((x, y), 1), torch.cat((y, x), 1)
    assert ssim(*channels).item() == pytest.approx(np.mean(maps), abs=1e-12)


def test_plain_terms_by_definition():
    result, target = pair(2, 1, 8, 6)
    middle, made = pair(2, 1, 4, 3)
    batch = batch_of(target, middle=middle)
    assert value("l1", result, batch).item() == pytest.approx((result - target).abs().mean().item())
    assert value("mse", result, batch).item() == pytest.approx((result - target).square().mean().item())
    found = value("mse_x2", result, batch, extras={"x2": made})
    assert found.item() == pytest.approx((made - middle).square().mean().item())


def test_the_gradient_term_compares_gradient_maps_of_the_target():
    result, target = pair(1, 1, 14, 15)
    padded = np.pad(target[0, 0].double().numpy(), 1)
    v, h = padded[2:, 1:-1] - padded[:-2, 1:-1], padded[1:-1, 2:] - padded[1:-1, :-2]
    wanted = torch.tensor(np.sqrt(v**2 + h**2 + 1e-6))[None, None].float()
    found = value("cohft_gradient", target, batch_of(target), extras={"gradient": result})
    torch.testing.assert_close(found, value("cohft", result, batch_of(wanted)))


@pytest.mark.parametrize("first", [0, 1])
def test_soft_dice_by_loops(first):
    torch.manual_seed(1)
    logits, labels = torch.randn(2, 4, 5, 6).double(), torch.randint(0, 3, (2, 5, 6))  # class 3 is absent
    shares = (logits.exp() / logits.exp().sum(1, keepdim=True)).numpy()
    lost = []
    for c in range(first, 4):
        both, either, present = 0.0, 0.0, False
        for n, row, column in np.ndindex(2, 5, 6):
            here = int(labels[n, row, column]) == c
            both += shares[n, c, row, column] * here
            either += shares[n, c, row, column] + here
            present |= here
        lost.append(1 - 2 * both / either if present else 0.0)
    assert dice_loss(logits, labels, first).item() == pytest.approx(np.mean(lost), abs=1e-12)
    if first == 0:
        assert value("dice", logits, batch_of(logits, labels=labels)).item() == pytest.approx(np.mean(lost))


def test_dice_of_a_sure_and_right_network_is_nothing():
    labels = torch.randint(0, 3, (2, 8, 8))
    logits = 100.0 * F.one_hot(labels, 3).movedim(-1, 1)
    assert dice_loss(logits, labels).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(logits, (labels + 1) % 3).item() == pytest.approx(1, abs=1e-6)


def test_labels_beyond_the_classes_are_refused():
    with pytest.raises(ArgumentsError, match="from 0 to 255; the network tells 2 apart"):
        value("dice", torch.zeros(1, 2, 2, 2), batch_of(torch.zeros(1, 1, 2, 2), labels=torch.tensor([[[0, 255]] * 2])))


def test_centre_is_the_squared_distance():
    found, wanted = torch.tensor([[0.2, 0.5], [0.0, 1.0]]), torch.tensor([[0.5, 0.1], [0.0, 1.0]])
    batch = batch_of(torch.zeros(2, 1, 4, 4), centres=wanted)
    assert value("centre", found, batch).item() == pytest.approx((0.3**2 + 0.4**2) / 2)


def test_wgan_is_minus_the_mean_score_of_the_critic_as_it_is_now():
    torch.manual_seed(0)
    critic = Discriminator(DiscriminatorConfig(width=2, dense=4, side=32))
    result, target = pair(3, 1, 32, 32)
    (term,) = build_terms(Recipe(losses={"wgan": 1.0}), {"critic": critic}, CPU)
    for _ in range(2):
        found = term(Outputs(result.requires_grad_()), batch_of(target))
        torch.testing.assert_close(found, -critic(result).mean())
        found.backward()
        assert all(p.grad is None and p.requires_grad for p in critic.parameters())
        with torch.no_grad():  # as its optimiser does
            for parameter in critic.parameters():
                parameter.mul_(1.5)


def test_sides_that_are_no_multiple_of_32_are_padded_alike():
    net, (result, target) = tiny(), pair(1, 1, 40, 33)
    padded = [F.pad(image, (0, 31, 0, 24), mode="replicate") for image in (result, target)]
    for name in ("encoder1", "encoder2_mse", "encoders", "decoder"):
        cut = value(name, result, batch_of(target), {"segmentation": net})
        assert torch.equal(cut, value(name, padded[0], batch_of(padded[1]), {"segmentation": net})), name
    assert value("hrl", result, batch_of(target), {"segmentation": net}) > 0


# --- gradients -------------------------------------------------------------------------------------------------

NEEDS = {"segmentation": tiny, "vgg": lambda: Vgg19Features(VggConfig(2)).eval()}
SEGMENTING = [name for name, spec in TERMS.items() if spec.role == "segmentation"]
SEEING = [name for name, spec in TERMS.items() if spec.role == "vgg"]


@pytest.mark.parametrize("name", [*SEGMENTING, *SEEING])
@pytest.mark.parametrize("batchwise", [False, True])
def test_gradients_reach_the_result_and_nothing_else(name, batchwise):
    net = NEEDS[TERMS[name].role]().train()
    before = {key: v.clone() for key, v in net.state_dict().items()}
    result, target = pair(2, 1, 32, 32)
    result.requires_grad_()
    target.requires_grad_()
    value(name, result, batch_of(target), {TERMS[name].role: net}, encoder_batch_statistics=batchwise).backward()
    assert result.grad is not None
    assert result.grad.abs().sum() > 0
    if TERMS[name].role == "segmentation":
        assert target.grad is None
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[key]) for key, v in net.state_dict().items())


@pytest.mark.parametrize("name", ["mse", "cohft", "encoder1_mse", "decoder", "hrl"])
def test_gradients_are_right(name):
    """Against a difference quotient along one direction, in double precision."""
    net = tiny().double()
    networks = {"segmentation": net} if TERMS[name].role else {}
    result, target = pair(1, 1, 32, 32, dtype=torch.float64)
    (term,) = build_terms(Recipe(losses={name: 1.0}), networks, CPU)

    def at(image):
        found = term(Outputs(image), batch_of(target))
        assert found.dtype == torch.float64
        return found

    direction, step = torch.randn_like(result), 1e-6
    (slope,) = torch.autograd.grad(at(result.requires_grad_()), result)
    with torch.no_grad():
        quotient = (at(result + step * direction) - at(result - step * direction)) / (2 * step)
    assert (slope * direction).sum().item() == pytest.approx(quotient.item(), rel=1e-4, abs=1e-10)
    assert abs(quotient.item()) > 1e-8


@pytest.mark.parametrize("name", ["l1", "cohft", "encoder2", "hrl", "vgg22"])
def test_terms_are_single_precision_under_autocast(name):
    networks = {role: make() for role, make in NEEDS.items()}
    result, target = pair(1, 1, 32, 32)
    result = result.bfloat16()
    wanted = value(name, result.float(), batch_of(target), networks)
    with torch.autocast("cpu", torch.bfloat16):
        found = value(name, result, batch_of(target), networks)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


# --- recipes ---------------------------------------------------------------------------------------------------


def test_what_a_recipe_needs_over_all_stages():
    recipe = Recipe(
        losses={"l1": 1.0, "wgan": 0.1, "semantic": 0.0},
        then=({"losses": {"l1": 1.0, "encoder1": 10.0}}, {"learning_rate": 1e-5}, {"losses": {"vgg22": 1.0}}),
    )
    needed = needed_networks(recipe)
    assert set(needed) == {"segmentation", "vgg"}
    assert "U-Net" in needed["segmentation"]
    assert "encoder1" in needed["segmentation"]
    assert set(needed_networks(replace(recipe, losses={"semantic": 0.01}))) == {"medclip", "segmentation", "vgg"}


def test_terms_of_weight_zero_are_left_out():
    terms = build_terms(Recipe(losses={"l1": 2.0, "semantic": 0.0, "vgg22": 0}), {}, CPU)
    assert [(term.name, term.weight) for term in terms] == [("l1", 2.0)]


@pytest.mark.parametrize(
    ("name", "pull"),
    [
        ("vgg22", "medsr weights pull vgg19-imagenet"),
        ("semantic", "medsr weights pull medclip-vit --allow-unpinned"),
        ("hrl", "medsr finetune DIR --task segmentation and give it with --segmentation FILE"),
    ],
)
def test_a_missing_network_is_named_with_the_way_to_it(name, pull):
    with pytest.raises(WeightsError, match=f"The loss {name} needs .*{pull}"):
        build_terms(Recipe(losses={"l1": 1.0, name: 1.0}), {}, CPU)


@pytest.mark.parametrize("name", ["hrl", "vgg54", "semantic"])
def test_another_network_is_refused(name):
    wrong = Discriminator(DiscriminatorConfig(width=1, dense=1, side=16))
    with pytest.raises(WeightsError, match="is not"):
        build_terms(Recipe(losses={name: 1.0}), {TERMS[name].role: wrong}, CPU)


def test_a_vgg_that_is_too_short_is_refused():
    with pytest.raises(WeightsError, match=r"ends with pool2; the loss compares conv5_4"):
        build_terms(Recipe(losses={"vgg54": 1.0}), {"vgg": Vgg19Features(VggConfig(2, "conv2_2"))}, CPU)


def test_unknown_terms_are_refused_with_the_list():
    for ask in (needed_networks, lambda recipe: build_terms(recipe, {}, CPU)):
        with pytest.raises(ArgumentsError, match=r"no loss called 'l2'.*There are: l1, mse,"):
            ask(Recipe(losses={"l2": 1.0}))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("mse_x2", "does not make"),
        ("cohft_gradient", "does not make"),
        ("dice", "needs labels"),
        ("centre", "needs centres"),
    ],
)
def test_what_is_not_there_cannot_be_compared(name, sentence):
    image = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ArgumentsError, match=f"The loss {name} .*{sentence}"):
        value(name, image, batch_of(image))


@pytest.mark.parametrize("name", ["encoder1", "decoder", "hrl"])
def test_images_of_other_channels_are_refused(name):
    image = torch.zeros(1, 3, 32, 32)
    with pytest.raises(WeightsError, match="takes 1 channels; the images have 3"):
        value(name, image, batch_of(image), {"segmentation": tiny()})
