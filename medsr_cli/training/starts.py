"""Where an untrained network starts: as plain linear interpolation, so that training begins near bicubic.

A network whose result does not contain its input has to learn first to pass an image through, which takes most
of a short training. Here the first convolution copies each pixel's 3x3 neighbourhood into features, everything
in between is left out or kept linear, and the layers that enlarge hold the weights of bilinear interpolation
(edges aligned, arXiv 2302.11184 section 4.2 has no such start: ours). What the network adds starts at zero and
is learnt. None of the papers does this; a recipe says `start: interpolation`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medsr_cli.networks.cohft import RESIDUAL, Cohft
from medsr_cli.networks.m2trans import M2Trans
from medsr_cli.networks.miassr import Miassr
from medsr_cli.networks.msgan import MsGan

LIFT = 6.0
"""Added before a GELU and taken off behind it: gelu(v + 6) is v + 6 up to 1e-7 for v of an image."""
QUIET = 0.1
"""Share of its usual start that a layer keeps whose output must hardly count at first, but must learn."""


def begin_as_interpolation(net: nn.Module) -> None:
    """Set the weights of a new network so that it enlarges as interpolation does.

    MIASSR starts as the nearest pixel, the others as bilinear interpolation, up to their borders.

    Raises:
        ValueError: the method has no such start, or this network is too narrow for it.
    """
    with torch.no_grad():
        if isinstance(net, Miassr):
            _miassr(net)
        elif isinstance(net, MsGan):
            _msgan(net)
        elif isinstance(net, M2Trans):
            _m2trans(net)
        elif isinstance(net, Cohft):
            _cohft(net)
        else:
            msg = f"A {type(net).__name__} cannot start as interpolation."
            raise ValueError(msg)


def _convolution(module: nn.Module | Tensor) -> nn.Conv2d:
    """The module, of which the networks' own types say less."""
    if not isinstance(module, nn.Conv2d):
        msg = f"A {type(module).__name__} stands where a convolution was expected."
        raise TypeError(msg)
    return module


def _inside(module: nn.Module | Tensor) -> list[nn.Module]:
    return list(module.children()) if isinstance(module, nn.Module) else []


def _quieten(layer: nn.Conv2d | nn.Linear, share: float = QUIET) -> None:
    layer.weight.mul_(share)
    if layer.bias is not None:
        layer.bias.zero_()


def _copy_neighbours(conv: nn.Conv2d, channels: int) -> int:
    """Features 9·c + 3·i + j get pixel (i - 1, j - 1) of channel c; returns how many they are."""
    count = 9 * channels
    if conv.out_channels <= count:
        msg = f"{conv.out_channels} features cannot hold the {count} neighbours of a pixel and something to learn."
        raise ValueError(msg)
    conv.weight[:count] = 0
    for feature in range(count):
        channel, place = divmod(feature, 9)
        conv.weight[feature, channel, place // 3, place % 3] = 1
    if conv.bias is not None:
        conv.bias.zero_()
    return count


def _taps(scale: int) -> Tensor:
    """Bilinear weights of the three neighbours for each of the sub-pixels of one axis, (scale, 3)."""
    taps = torch.zeros(scale, 3)
    for phase in range(scale):
        offset = (phase + 0.5) / scale - 0.5
        taps[phase, 1] = 1 - abs(offset)
        taps[phase, 2 if offset > 0 else 0] += abs(offset)
    return taps


def _interpolation(scale: int) -> Tensor:
    """Bilinear weights of the 3x3 neighbours for each sub-pixel, (scale², 9), both row-major."""
    taps = _taps(scale)
    return torch.einsum("pi,qj->pqij", taps, taps).reshape(scale * scale, 9)


def _to_subpixels(conv: nn.Conv2d, channels: int, scale: int, lift: float = 0.0) -> None:
    """A convolution before a pixel shuffle: feature c of the shuffled map becomes channel c, interpolated.

    Its inputs are the neighbours of `_copy_neighbours`.
    """
    _quieten(conv)
    square = scale * scale
    for channel in range(channels):
        rows = slice(channel * square, (channel + 1) * square)
        conv.weight[rows] = 0
        _middle(conv)[rows, 9 * channel : 9 * (channel + 1)] = _interpolation(scale).to(conv.weight)
    _set_bias(conv, slice(0, channels * square), lift)


def _middle(conv: nn.Conv2d) -> Tensor:
    """The middle of every kernel, (out, in), as a view."""
    return conv.weight[:, :, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2]


def _set_bias(conv: nn.Conv2d, features: slice, value: float) -> None:
    if conv.bias is not None:
        conv.bias[features] = value


def _miassr(net: Miassr) -> None:
    """Feature 0 is the image, and the predicted kernel takes its middle, whatever the offset."""
    extractor = net.feature_extractor
    head = _convolution(extractor.head[0])
    middle, channels = head.kernel_size[0] // 2, net.config.in_channels
    last = net.meta_upsampler.P2W.meta_block[2]
    assert isinstance(last, nn.Linear)  # noqa: S101  # for the type checker
    if head.out_channels <= channels:
        msg = f"{head.out_channels} features cannot hold {channels} channels and something to learn."
        raise ValueError(msg)
    head.weight[:channels] = 0
    for channel in range(channels):
        head.weight[channel, channel, middle, middle] = 1
    _set_bias(head, slice(None), 0)
    for block in list(extractor.body)[:-1]:
        _quieten(_convolution(_inside(block.body)[2]), 0.3)
    after = _convolution(extractor.body[-1])
    _quieten(after, 0.3)
    after.weight[:channels] = 0
    last.weight.mul_(0.2 * QUIET)
    last.bias.mul_(0.2 * QUIET)
    kernels = last.bias.view(net.meta_upsampler.P2W.shape)  # (F, k, k, C)
    centre = kernels.shape[1] // 2
    kernels[:channels] = 0
    for channel in range(channels):
        kernels[channel, centre, centre, channel] = 1


def _msgan(net: MsGan) -> None:
    """Images are not negative, so that ReLU passes them; what blocks add to the skip is left out."""
    channels = net.config.in_channels
    extractors = [net.f1] if isinstance(net.f2, nn.Identity) else [net.f1, net.f2]
    for extractor in extractors:
        for block in extractor.blocks:
            _quieten(_convolution(block.conv2))
        _quieten(extractor.tail)
        _copy_neighbours(extractor.head, channels)
        extractor.tail.weight[: 9 * channels] = 0
    _to_subpixels(net.m1.conv, channels, 2)
    if isinstance(net.f2, nn.Identity):
        # The second enlargement has features 0 to C - 1 of the first, not neighbours: its own 3x3 kernel has them.
        _spread_over_kernel(net.m2.conv, channels)
    else:
        _to_subpixels(net.m2.conv, channels, 2)
    for head in (net.c1, net.c2):
        _read_channels(head, channels)


def _spread_over_kernel(conv: nn.Conv2d, channels: int) -> None:
    _quieten(conv)
    for channel in range(channels):
        rows = slice(4 * channel, 4 * (channel + 1))
        conv.weight[rows] = 0
        conv.weight[rows, channel] = _interpolation(2).view(4, 3, 3).to(conv.weight)


def _read_channels(conv: nn.Conv2d, channels: int, constant: int | None = None) -> None:
    """Channel c is feature c, less the feature `constant` where the others were lifted by it."""
    _quieten(conv)
    conv.weight[:channels, : channels + (constant is not None)] = 0
    for channel in range(channels):
        _middle(conv)[channel, channel] = 1
        if constant is not None:
            _middle(conv)[channel, constant] = -1


def _m2trans(net: M2Trans) -> None:
    """The last convolution has no bias: a constant feature takes the lift off again."""
    channels = net.config.in_channels
    count = _copy_neighbours(net.head, channels)
    for block in net.body:
        conv = _convolution(_inside(block.feed_forward)[0])
        _quieten(conv)
        conv.weight[:count] = 0
    *enlarging, last = (layer for layer in net.tail if isinstance(layer, nn.Conv2d))
    # Every block passes its input on, and the first features are added once more behind them.
    _enlarge(enlarging, channels, net.config.scale, gain=2.0, constant=True)
    _read_channels(last, channels, constant=channels)


def _enlarge(convs: list[nn.Conv2d], channels: int, scale: int, gain: float = 1.0, *, constant: bool = False) -> None:
    """The convolutions before each pixel shuffle and GELU: feature c becomes channel c, interpolated and lifted.

    Their inputs are `gain` times the neighbours of `_copy_neighbours`; only the middle of a kernel is used, since
    what lies beyond the border is not lifted. With `constant`, the feature after the channels is the lift itself.
    """
    if len(convs) == 1:
        _to_subpixels(convs[0], channels, scale, LIFT)
        convs[0].weight[: channels * scale**2] /= gain
    else:
        _in_two_steps(convs, channels, scale, gain)
    if constant:
        square = (scale if len(convs) == 1 else 2) ** 2
        after = slice(channels * square, (channels + 1) * square)
        convs[-1].weight[after] = 0
        _set_bias(convs[-1], after, LIFT)


def _in_two_steps(convs: list[nn.Conv2d], channels: int, scale: int, gain: float) -> None:
    """x4 by 2 and 2: the first step makes, for each pixel of x2, the four of x4 in it, as features; the second
    puts them into their places."""
    if scale != 4 or len(convs) != 2 or convs[0].out_channels // 4 <= 4 * channels:
        msg = f"A network with so few features cannot start as interpolation by {scale} in {len(convs)} steps."
        raise ValueError(msg)
    first, second = convs
    _quieten(first)
    _quieten(second)
    # Row and column of a x2 pixel, row and column of x4 in it, neighbours: the inner ones come first.
    weights = _interpolation(4).view(2, 2, 2, 2, 9).permute(1, 3, 0, 2, 4).reshape(4, 4, 9) / gain
    for channel in range(channels):
        neighbours = slice(9 * channel, 9 * (channel + 1))
        for inner in range(4):
            feature = 4 * channel + inner
            rows = slice(4 * feature, 4 * (feature + 1))
            first.weight[rows] = 0
            _middle(first)[rows, neighbours] = weights[inner].to(first.weight)
            second.weight[feature] = 0
            _middle(second)[feature, feature] = 1
    _set_bias(first, slice(0, 16 * channels), LIFT)


def _cohft(net: Cohft) -> None:
    """The main stream holds the image; a dense block of blocks multiplies what it passes on by 1.2."""
    passed = 1 + RESIDUAL
    output = net.output_gate
    for gate in (net.image_gate, net.gradient_gate, net.guide_gate):
        _quieten_rrdb(gate[1])
    _copy_neighbours(_convolution(net.image_gate[0]), 1)
    for stage in net.stages:
        for block in _inside(stage.rrdbs):
            _quieten_rrdb(block)
    output.stream_conv.weight[:9] = 0
    *enlarging, refined, last = (layer for layer in output.stream if isinstance(layer, nn.Conv2d))
    _enlarge(enlarging, 1, net.config.scale, passed)
    for conv in (refined, last):  # refined is followed by a GELU, so that the lift comes off behind the last
        _read_channels(conv, 1)
    _set_bias(last, slice(0, 1), -LIFT)
    fuse = _convolution(output.fusion[1])
    _quieten_rrdb(output.fusion[0])
    # Branch and stream keep their usual share of the other features: the guide has no other way to the image.
    fuse.weight[0] = 0
    _set_bias(fuse, slice(0, 1), 0)
    _middle(fuse)[0, net.config.feature_dim] = 1 / passed
    _quieten(_convolution(output.refine[0]))
    _read_channels(output.image, 1)


def _quieten_rrdb(block: nn.Module) -> None:
    """The last convolution of every dense block hardly counts at first."""
    for dense in block.children():
        *_, last = dense.children()
        _quieten(_convolution(_inside(last)[0]))
