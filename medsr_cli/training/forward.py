"""A batch through a network of the catalogue: which inputs each takes, and what it makes beside the image."""

from __future__ import annotations

from fractions import Fraction

from torch import Tensor, nn

from medsr_cli.networks.cohft import Cohft
from medsr_cli.networks.cohft_released import ReleasedCohft
from medsr_cli.networks.miassr import Miassr
from medsr_cli.networks.msgan import MsGan
from medsr_cli.networks.msgan_detector import LesionDetector
from medsr_cli.training.batch import Batch, Outputs


def forward(net: nn.Module, batch: Batch) -> Outputs:
    """What the network makes of a batch, with gradients where they are on.

    MIASSR is told the enlargement, MS-GAN also gives its x2 image and Cohf-T, which takes the guide, its gradient
    map. The detector's (x, y) become the row and column of `Batch.centres`. All others take `low` alone.

    Raises:
        ValueError: Cohf-T was given no guide.
    """
    if isinstance(net, Miassr):
        return Outputs(net(batch.low, batch.ratio or _ratio(batch)))
    if isinstance(net, MsGan):
        middle, image = net.stages(batch.low)
        return Outputs(image, {"x2": middle})
    if isinstance(net, (Cohft, ReleasedCohft)):
        image, gradient = net.with_gradient(batch.low, _guide(batch))
        return Outputs(image, {"gradient": gradient})
    out: Tensor = net(batch.low)
    return Outputs(out.flip(-1) if isinstance(net, LesionDetector) else out)


def _ratio(batch: Batch) -> tuple[Fraction, Fraction]:
    rows, columns = (Fraction(batch.high.shape[i], batch.low.shape[i]) for i in (-2, -1))
    return rows, columns


def _guide(batch: Batch) -> Tensor:
    if batch.guide is None:
        msg = "Cohf-T is trained with a guide, and the batch has none."
        raise ValueError(msg)
    return batch.guide
