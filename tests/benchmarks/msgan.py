"""MS-GAN's generator, both stages: PyTorch and ONNX Runtime against the network as it is trained."""

from __future__ import annotations

import torch
from timing import figures, onnx_session

from medsr_cli.networks.msgan import MsGan, MsGanConfig, graph_form, made_ready

SIDES = (64, 128)
N_BLOCKS = 6
"""Of 16 in the paper; they are all alike."""
TARGET = 1.3


def main() -> None:
    """Print the figures of both kinds of networks and every size."""
    torch.manual_seed(0)
    for norm in ("batch", "none"):
        net = MsGan(MsGanConfig(n_blocks=N_BLOCKS, norm=norm)).eval()
        ready, session = made_ready(net), onnx_session(graph_form(net))
        for side in SIDES:
            image = torch.rand(1, 1, side, side)
            engines = {
                "torch": lambda: ready.stages(image)[1],  # noqa: B023
                "onnx": lambda: session.run(None, {"image": image.numpy()})[1],  # noqa: B023
            }
            with torch.inference_mode():
                wanted = net.stages(image)[1]
                apart = max(float((torch.as_tensor(run()) - wanted).abs().max()) for run in engines.values())
                line = figures(f"MS-GAN {side}x{side} x4, norm {norm}", lambda: net.stages(image), engines, TARGET)  # noqa: B023
            print(f"{torch.get_num_threads()} threads, {line}, largest difference {apart:.0e}")


if __name__ == "__main__":
    main()
