"""The segmentation U-Net against the authors', its sizes, its files, and what its frozen copies leave alone."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from medsr_cli.errors import WeightsError
from medsr_cli.networks import catalogue, checkpoint, load_network
from medsr_cli.networks.seg_unet import (
    SegUnet,
    SegUnetConfig,
    config_from_state,
    frozen,
    pad_by_repetition,
    with_batch_statistics,
)
from tests.networks.golden import SPECS, fixture, needs_shared, procedural_state, specification

SHARED = SPECS
TINY = SegUnetConfig(1, 3, 4, "1,2,1,1", "8,6,5,4,3")


def tiny(config: SegUnetConfig = TINY, seed: int = 0) -> SegUnet:
    """With weights and statistics that differ from layer to layer."""
    torch.manual_seed(seed)
    net = SegUnet(config)
    for name, value in net.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_(0, 0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    return net.eval()


@lru_cache(maxsize=1)
def golden() -> tuple[SegUnet, dict, dict]:
    facts, _, tensors = fixture("seg_unet_losses")
    net = SegUnet()
    state = procedural_state(net, facts["procedural_seed"])
    for key in state:
        if key.endswith("running_var"):  # procedural gives 1 + 0.1 r to what is no bias
            state[key] = 1 + 2.5 * (state[key].double() - 1).float()
        elif key.endswith("running_mean"):
            state[key] = (state[key].double() - 1).float()
    net.load_state_dict(state)
    return net.eval(), facts, tensors


def test_names_and_shapes_are_the_authors():
    listed = specification("seg_unet_state_dict")
    wanted = {key: tuple(shape) for key, shape in listed["keys"].items() if not key.endswith("num_batches_tracked")}
    with torch.device("meta"):
        net = SegUnet()
    assert {key: tuple(value.shape) for key, value in net.state_dict().items()} == wanted
    count = sum(p.numel() for p in net.parameters())
    assert count == listed["parameters"] == catalogue.SEGMENTATION.parameters["segmentation"]


@needs_shared
def test_features_logits_and_labels_are_the_authors():
    net, facts, tensors = golden()
    with torch.no_grad():
        features = net.encode(tensors["sr"])
        shapes = [list(x.shape) for x in (*features, net.decode(features), net(tensors["sr"]))]
        assert shapes == facts["feature_shapes_E0_to_E5_then_decoder_then_logits"][1:]
        wanted = tensors["eval/E1_sr"]
        assert (features[0][:, :8] - wanted).abs().max() <= 1e-5 * wanted.max()
        assert (net(tensors["sr"]) - tensors["eval/logits_sr"]).abs().max() <= 1e-4 * facts["logits_absmax"]
        assert torch.equal(net(tensors["hr"]).argmax(1), tensors["eval/labels_hr"])


def test_the_narrow_one_has_the_count_of_the_catalogue():
    config = SegUnetConfig.narrow(16)
    assert catalogue.SEGMENTATION.variant_of({**vars(config)}) == "segmentation-16"
    with torch.device("meta"):
        count = sum(p.numel() for p in SegUnet(config).parameters())
    assert count == catalogue.SEGMENTATION.parameters["segmentation-16"]
    assert SegUnetConfig.narrow(64) == SegUnetConfig()


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70))
def test_any_size_is_that_of_the_image_padded_by_repetition(rows, columns):
    net, image = tiny(), torch.rand(1, 1, rows, columns)
    i = torch.arange(-(-rows // 32) * 32).clamp(max=rows - 1)
    j = torch.arange(-(-columns // 32) * 32).clamp(max=columns - 1)
    by_hand = image[:, :, i][:, :, :, j]
    assert torch.equal(pad_by_repetition(image), by_hand)
    with torch.no_grad():
        assert torch.equal(net(image), net(by_hand)[..., :rows, :columns])


@pytest.mark.parametrize("size", [(32, 40), (31, 32), (0, 32)])
def test_the_encoder_wants_multiples_of_32(size):
    with pytest.raises(ValueError, match="multiples of 32"):
        tiny().encode(torch.zeros(1, 1, *size))
    with pytest.raises(ValueError, match="takes 1 channels, not 3"):
        tiny().encode(torch.zeros(1, 3, 32, 32))


def test_features_of_a_depth_are_those_of_the_whole_and_nothing_deeper_runs():
    net, image = tiny(), torch.rand(1, 1, 64, 32)
    with torch.no_grad():
        every = net.encode(image)
        net.encoder.layer3 = None  # would fail if it ran
        for depth in (1, 2, 3):
            found = net.encode(image, depth)
            assert len(found) == depth
            assert all(torch.equal(a, b) for a, b in zip(found, every, strict=False))


@pytest.mark.parametrize("config", [TINY, SegUnetConfig(2, 2, 3, "1,1,1,1", "4,4,4,4,4"), SegUnetConfig.narrow(4)])
@pytest.mark.parametrize("with_metadata", [True, False])
def test_every_size_is_recovered(tmp_path, config, with_metadata):
    net, path = tiny(config), tmp_path / "a.safetensors"
    if with_metadata:
        path.write_bytes(checkpoint.save_network(net))
    else:
        save_file(net.state_dict(), path)
    found = load_network(path)
    assert found.config == config == config_from_state(net.state_dict())
    checkpoint.rehearse(found)
    image = torch.rand(1, config.in_channels, 32, 64)
    with torch.no_grad():
        assert torch.equal(found(image), net(image))


def test_a_file_of_the_authors_form_loads(tmp_path):
    """A bare state_dict with the counters that PyTorch's own batch norm has."""
    net = tiny()
    counters = {
        key.replace("running_mean", "num_batches_tracked"): torch.tensor(7)
        for key in net.state_dict()
        if key.endswith("running_mean")
    }
    torch.save({**net.state_dict(), **counters}, tmp_path / "unet.pt")
    state = checkpoint.read_author_checkpoint(tmp_path / "unet.pt")
    assert checkpoint.detect_method(state) is catalogue.SEGMENTATION
    assert checkpoint.network_from_state(state, catalogue.SEGMENTATION).config == TINY


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"encoder.layer2.1.conv1.weight": None}, "does not have|lacks"),
        ({"segmentation_head.0.weight": None}, r"segmentation_head\.0\.weight is missing"),
        ({"encoder.bn1.running_var": -torch.ones(4)}, "variances below zero"),
        ({"encoder.layer1.0.conv2.weight": torch.ones(4, 3, 3, 3)}, "in shape"),
        ({"encoder.conv1.weight": torch.full((4, 1, 7, 7), torch.nan)}, "NaN"),
        ({"extra.weight": torch.ones(1)}, "does not have"),
    ],
)
def test_what_is_no_such_network_is_refused(change, sentence):
    state = {**tiny().state_dict(), **change}
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(WeightsError, match=sentence):
        checkpoint.network_from_state(state, catalogue.SEGMENTATION)


@pytest.mark.parametrize(
    "wrong", [{"blocks": "1,1,1"}, {"decoder": "1"}, {"classes": 1}, {"width": 0}, {"blocks": "1,0,1,1"}]
)
def test_configurations_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=r"numbers|at least"):
        SegUnetConfig(**wrong)


def test_frozen_copies_share_tensors_and_leave_the_network_alone():
    net = tiny().train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    copy, batchwise = frozen(net), with_batch_statistics(net)
    assert not copy.training
    assert not [p for p in (*copy.parameters(), *batchwise.parameters()) if p.requires_grad]
    assert all(p.requires_grad for p in net.parameters())
    assert net.training
    assert copy.encoder.conv1.weight.data_ptr() == net.encoder.conv1.weight.data_ptr()
    batchwise.train()(torch.rand(2, 1, 32, 32))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_batch_statistics_are_those_of_training_mode():
    net, image = tiny(), torch.rand(3, 1, 64, 64)
    with torch.no_grad():
        found = with_batch_statistics(net)(image)
        assert not torch.allclose(found, net(image), atol=1e-3), "running statistics differ"
        torch.testing.assert_close(found, net.train()(image))


def test_it_enlarges_nothing():
    from medsr_cli.errors import ArgumentsError
    from medsr_cli.tasks.model import ModelRequest, load_model

    with pytest.raises(ArgumentsError, match="segmentation does not enlarge images"):
        load_model(ModelRequest(model="segmentation"), (4.0, 4.0), None, print)
