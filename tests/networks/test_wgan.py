"""The critic and its losses against the authors' numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from medsr_cli.networks.wgan import (
    Discriminator,
    DiscriminatorConfig,
    discriminator_loss,
    draw_share,
    generator_loss,
    gradient_penalty,
)
from tests.networks.golden import procedural

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
GOLDEN = SHARED / "specs" / "golden" / "wgan_gp_discriminator"
SMALL = DiscriminatorConfig(in_channels=2, width=2, dense=5, side=33)


def small() -> Discriminator:
    torch.manual_seed(0)
    critic = Discriminator(SMALL).double()
    with torch.no_grad():  # PyTorch's default makes a critic of this size nearly constant
        for parameter in critic.parameters():
            parameter.mul_(3)
    return critic


def pair(n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(7)
    return torch.rand(n, 2, 33, 40).double(), torch.rand(n, 2, 33, 40).double()


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_equals_the_released_critic_and_its_losses():
    facts, tensors = json.loads(GOLDEN.with_suffix(".json").read_text()), load_file(GOLDEN.with_suffix(".safetensors"))
    critic = Discriminator()
    shapes = {key: list(value.shape) for key, value in critic.state_dict().items()}
    assert shapes == facts["keys"]
    assert sum(p.numel() for p in critic.parameters()) == facts["parameters"]
    critic.load_state_dict(
        {key: procedural(key, tuple(shape), facts["procedural_seed"]) for key, shape in shapes.items()}
    )
    sr, hr, share, scalars = tensors["fake"], tensors["real"], tensors["alpha"], facts["scalars"]
    with torch.no_grad():
        torch.testing.assert_close(critic(sr), tensors["d_fake"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(critic(hr), tensors["d_real"], rtol=1e-4, atol=1e-5)
        assert generator_loss(critic, sr).item() == pytest.approx(scalars["loss_g_wgan"], rel=1e-4)
    mixed = ((1 - share) * sr + share * hr).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed)
    torch.testing.assert_close(gradient.flatten(1).norm(dim=1), tensors["grad_norm"], rtol=1e-4, atol=1e-5)
    penalty = gradient_penalty(critic, sr, hr, share).item()
    assert 10 * penalty == pytest.approx(scalars["gradient_penalty_x10"], rel=1e-4)
    loss = discriminator_loss(critic, sr, hr, share).item()
    assert loss == pytest.approx(scalars["loss_d_wgan_gp"], rel=1e-4)


def test_penalty_of_a_linear_critic_is_known():
    """D(x) = <w, x> has the gradient w everywhere, so the penalty is (‖w‖ − 1)² whatever is mixed."""
    weight = torch.randn(2 * 33 * 40).double()
    critic = nn.Sequential(nn.Flatten(), nn.Linear(2 * 33 * 40, 1, bias=False).double())
    with torch.no_grad():
        critic[1].weight.copy_(weight)
    sr, hr = pair()
    found = discriminator_loss(critic, sr, hr, draw_share(sr), penalty=3.0)
    expected = critic(sr).mean() - critic(hr).mean() + 3 * (weight.norm() - 1) ** 2
    torch.testing.assert_close(found, expected)


def test_share_mixes_from_enlarged_to_real():
    """D(x) = ‖x‖²/2 has the gradient x: the penalty is (‖x̂‖ − 1)², one norm for each sample."""
    sr, hr = pair()
    share = torch.tensor((0.0, 0.3, 1.0)).double()
    mixed = torch.stack((sr[0], 0.7 * sr[1] + 0.3 * hr[1], hr[2]))
    expected = torch.stack([(image.norm() - 1) ** 2 for image in mixed]).mean()
    for shape in ((3,), (3, 1, 1, 1)):
        found = gradient_penalty(lambda x: x.square().flatten(1).sum(1) / 2, sr, hr, share.view(shape))
        torch.testing.assert_close(found, expected)


def test_each_loss_trains_its_own_network():
    critic, (low, hr) = small(), pair()
    gain = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    discriminator_loss(critic, gain * low, hr, draw_share(low)).backward()
    assert gain.grad is None
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for p in critic.parameters()
        if p is not critic.classifier[2].bias
    )
    generator_loss(critic, gain * low).backward()
    assert gain.grad is not None
    assert gain.grad != 0


def test_penalty_gradient_is_right():
    """Against a difference quotient: the penalty is differentiated through a gradient."""
    critic, (sr, hr) = small(), pair()
    share, weight = draw_share(sr), critic.features[3][0].weight
    (slope,) = torch.autograd.grad(gradient_penalty(critic, sr, hr, share), weight)
    assert slope.norm() > 0.01
    direction, step = torch.randn_like(weight), 1e-6
    with torch.no_grad():
        weight.add_(direction, alpha=step)
        above = gradient_penalty(critic, sr, hr, share)
        weight.sub_(direction, alpha=2 * step)
        below = gradient_penalty(critic, sr, hr, share)
    torch.testing.assert_close((above - below) / (2 * step), (slope * direction).sum(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("side", [81, 92, 96])
def test_training_targets_of_all_scales_fit(side):
    config = DiscriminatorConfig(width=1, dense=3)
    assert config.end == 6
    assert Discriminator(config)(torch.rand(2, 1, side, side)).shape == (2, 1)


@pytest.mark.parametrize("side", [80, 97])
def test_other_sizes_are_refused(side):
    with pytest.raises(ValueError, match="81 to 96"):
        Discriminator(DiscriminatorConfig(width=1, dense=3))(torch.rand(1, 1, side, 96))


def test_a_size_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        DiscriminatorConfig(width=0)


def test_shares_repeat_with_the_seed():
    images = torch.rand(4, 1, 8, 8)
    first, again = (draw_share(images, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (4, 1, 1, 1)
    assert len(first.unique()) == 4
