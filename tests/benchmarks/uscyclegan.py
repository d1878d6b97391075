"""The ultrasound CycleGAN's generator on an image that has been enlarged: both engines against the plain network."""

from __future__ import annotations

import torch
from timing import figures, onnx_session

from medsr_cli.networks.uscyclegan import Generator, graph_form, made_ready

SIDE = 256
TARGET = 1.3


def main() -> None:
    """Print the figures."""
    torch.manual_seed(0)
    net = Generator().eval()
    ready, session = made_ready(net), onnx_session(graph_form(net))
    image = torch.rand(1, 3, SIDE, SIDE)
    engines = {"torch": lambda: ready(image), "onnx": lambda: session.run(None, {"image": image.numpy()})[0]}
    with torch.inference_mode():
        wanted = net(image)
        apart = max(float((torch.as_tensor(run()) - wanted).abs().max()) for run in engines.values())
        line = figures(f"CycleGAN {SIDE}x{SIDE}", lambda: net(image), engines, TARGET)
    print(f"{torch.get_num_threads()} threads, {line}, largest difference {apart:.0e}")


if __name__ == "__main__":
    main()
