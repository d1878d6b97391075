"""The engine that a training on the image ends in, against the authors' released inference."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.torch import load_file

from medsr_cli.engines.torch_runner import engine_for
from medsr_cli.engines.wrapped import Colours, median_of_orientations
from medsr_cli.networks import catalogue, checkpoint


@pytest.mark.parametrize("tile", [None, 64])
def test_the_engine_is_the_released_inference(shared, tile):
    path = shared / "specs" / "golden" / "uscyclegan_inference"
    tensors = load_file(path.with_suffix(".safetensors"))
    state = {key[2:]: value for key, value in tensors.items() if key.startswith("w/")}
    net = checkpoint.network_from_state(state, catalogue.USCYCLEGAN)
    for case in json.loads(path.with_suffix(".json").read_text())["cases"]:
        low = tensors[case["x"]].permute(2, 0, 1).numpy()[None].astype(np.float64)
        inner = engine_for(net, catalogue.USCYCLEGAN, (2, 2), device="cpu", tile=tile)
        result = median_of_orientations(Colours(inner)).run(low)
        expected = tensors[case["y_sym"]].permute(2, 0, 1).numpy()
        np.testing.assert_allclose(result.planes[0], expected, atol=1e-4 * np.ptp(expected))
        assert result.extras["spread"].shape == result.planes.shape
