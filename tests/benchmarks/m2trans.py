"""M2Trans x4: PyTorch and ONNX Runtime against the paper's program written plainly, in NCHW and layer by layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - its own name
from timing import figures, onnx_session
from torch import Tensor

from medsr_cli.networks.m2trans import BlockAttention, CoarseToFineBlock, M2Trans, graph_form, made_ready
from medsr_cli.networks.m2trans import pad_to_blocks as padded

SIDES = (64, 128)
TARGET = 1.3


def split(x: Tensor) -> Tensor:
    """One level of the Haar transform, (N, C, H, W) to (N, 4C, H/2, W/2)."""
    a, b, c, d = (x[:, :, i::2, j::2] / 2 for j in (0, 1) for i in (0, 1))
    return torch.cat((a + b + c + d, -a - b + c + d, -a + b - c + d, a - b - c + d), dim=1)


def join(bands: Tensor) -> Tensor:
    """Its inverse."""
    n, c, h, w = bands.shape
    ll, hl, lh, hh = (bands / 2).chunk(4, dim=1)
    out = bands.new_empty(n, c // 4, 2 * h, 2 * w)
    out[:, :, ::2, ::2], out[:, :, 1::2, ::2] = ll - hl - lh + hh, ll - hl + lh - hh
    out[:, :, ::2, 1::2], out[:, :, 1::2, 1::2] = ll + hl - lh - hh, ll + hl + lh + hh
    return out


def attention(layer: BlockAttention, x: Tensor) -> Tensor:
    """Blocks of queries, unfolded windows of keys, positions added to the halves of the keys."""
    n, c, h, w = x.shape
    b, side = layer.block, layer.window
    q, k, v = layer.qkv_conv(x).chunk(3, dim=1)
    q = q.view(n, c, h // b, b, w // b, b).permute(0, 2, 4, 3, 5, 1).reshape(-1, b * b, c) * c**-0.5
    k, v = (
        F.unfold(part, side, stride=b, padding=1).view(n, c, side**2, -1).permute(0, 3, 2, 1).reshape(-1, side**2, c)
        for part in (k, v)
    )
    rows, columns = k.view(-1, side, side, c).chunk(2, dim=-1)
    k = torch.cat((rows + layer.rel_h, columns + layer.rel_w), dim=-1).view(-1, side**2, c)
    out = (q @ k.transpose(1, 2)).softmax(dim=-1) @ v
    return out.view(n, h // b, w // b, b, b, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)


def block(layer: CoarseToFineBlock, x: Tensor) -> Tensor:
    """Four branches, each fed by the one before."""
    found: list[Tensor] = []
    attentions = (layer.attn1, layer.attn2, layer.attn3, layer.attn4)
    for branch, part, levels in zip(F.instance_norm(x).chunk(4, dim=1), attentions, (0, 1, 2, 2), strict=True):
        mixed = (branch + found[-1]) / 2 if found else branch
        bands = mixed
        for _ in range(levels):
            bands = split(bands)
        bands = attention(part, bands)
        for _ in range(levels):
            bands = join(bands)
        found.append(bands + mixed)
    out: Tensor = layer.feed_forward(torch.cat(found, dim=1))
    return out + x


def plain(net: M2Trans, image: Tensor) -> Tensor:
    """The whole network; the tail on the whole image."""
    h, w = (net.config.scale * side for side in image.shape[-2:])
    shallow = net.head(padded(image, net.config))
    x = shallow
    for layer in net.body:
        x = block(layer, x)
    out: Tensor = net.tail(shallow + x)
    return out[..., :h, :w].clamp(0, 1)


def main() -> None:
    """Print the figures of every size."""
    torch.manual_seed(0)
    net = M2Trans().eval()
    ready, session = made_ready(net), onnx_session(graph_form(net))
    for side in SIDES:
        image = torch.rand(1, 3, side, side)
        engines = {"torch": lambda: ready(image), "onnx": lambda: session.run(None, {"image": image.numpy()})[0]}  # noqa: B023
        with torch.inference_mode():
            wanted = plain(net, image)
            apart = max(float((torch.as_tensor(run()) - wanted).abs().max()) for run in engines.values())
            line = figures(f"M2Trans {side}x{side} x4", lambda: plain(net, image), engines, TARGET)  # noqa: B023
        print(f"{torch.get_num_threads()} threads, {line}, largest difference {apart:.0e}")


if __name__ == "__main__":
    main()
