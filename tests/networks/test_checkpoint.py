"""Weights in, network out: exact sizes, published layouts, and a sentence for everything that does not fit."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from medsr_cli.errors import ArgumentsError, WeightsError
from medsr_cli.networks import catalogue, checkpoint, load_network
from medsr_cli.networks.rdst import Rdst, RdstConfig

TINY = RdstConfig(n_rdstb=1, embed_dim=12, growth_rate=6, num_heads=6, dstb_per_rdstb=1, stl_per_dstb=2, scale=2)
ODD = RdstConfig(
    n_rdstb=3, embed_dim=24, growth_rate=12, num_heads=4, window_size=4, dstb_per_rdstb=2, stl_per_dstb=4,
    mlp_ratio=1.5, qkv_bias=False, in_channels=4, scale=2,
)  # fmt: skip
GOLDEN = Path(__file__).parents[2].parent / "shared" / "specs" / "golden"


def tiny_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return dict(Rdst(TINY).state_dict())


def written(path: Path, network: torch.nn.Module, **options: bool) -> Path:
    path.write_bytes(checkpoint.save_network(network, {"id": "test"}, **options))
    return path


def test_importing_networks_does_not_import_torch() -> None:
    code = "import sys, medsr_cli.networks, medsr_cli.networks.catalogue; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize("with_metadata", [True, False])
def test_every_size_is_recovered(tmp_path: Path, scale: int, with_metadata: bool) -> None:
    config = dataclasses.replace(ODD, scale=scale)
    network = Rdst(config).eval()
    path = tmp_path / "odd.safetensors"
    if with_metadata:
        written(path, network)
    else:
        save_file(network.state_dict(), path)
    found = load_network(path)
    for field in dataclasses.fields(RdstConfig):
        assert getattr(found.config, field.name) == getattr(config, field.name), field.name
    image = torch.rand(1, 4, 8, 12)
    with torch.inference_mode():
        assert torch.equal(found(image), network(image))
    assert not found.training
    frozen = [name for name, value in found.named_parameters() if not value.requires_grad]
    assert frozen == ["sub_mean.weight", "sub_mean.bias", "add_mean.weight", "add_mean.bias"]


def test_mlp_ratio_that_rounds_is_taken_from_metadata(tmp_path: Path) -> None:
    # Hidden sizes round(24·2.3) = 55 and round(36·2.3) = 83: 55/24 would give round(82.5) = 82 for the second.
    config = dataclasses.replace(ODD, mlp_ratio=2.3)
    assert load_network(written(tmp_path / "a.safetensors", Rdst(config))).config == config


@pytest.mark.parametrize("half", [True, False])
def test_equal_networks_give_equal_bytes(half: bool) -> None:
    torch.manual_seed(3)
    network = Rdst(TINY)
    first = checkpoint.save_network(network, {"b": "2", "a": "1", "c": "3"}, half=half)
    assert all(checkpoint.save_network(network, {"c": "3", "b": "2", "a": "1"}, half=half) == first for _ in range(5))


def test_half_precision_is_upcast_and_frozen_stays_exact(tmp_path: Path) -> None:
    network = Rdst(TINY)
    with torch.no_grad():
        network.state_dict()["add_mean.bias"].fill_(0.1)
    found = load_network(written(tmp_path / "half.safetensors", network, half=True))
    assert {value.dtype for value in found.state_dict().values()} == {torch.float32}
    stored, original = found.state_dict(), network.state_dict()
    assert torch.equal(stored["add_mean.bias"], original["add_mean.bias"])
    assert torch.equal(stored["head.weight"], original["head.weight"].half().float())
    assert torch.equal(stored["head.bias"], original["head.bias"])


def test_half_precision_refuses_what_overflows() -> None:
    network = Rdst(TINY)
    with torch.no_grad():
        network.state_dict()["head.weight"].fill_(1e6)
    with pytest.raises(WeightsError, match=r"head\.weight .*half precision"):
        checkpoint.save_network(network, half=True)


def test_metadata_is_kept_and_reserved(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", Rdst(TINY))
    found = checkpoint.read_metadata(path)
    assert (found["id"], found["medsr.format"], found["medsr.method"]) == ("test", "1", "rdst")
    assert json.loads(found["medsr.config"]) == dataclasses.asdict(TINY)
    with pytest.raises(WeightsError, match=r"medsr\.method"):
        checkpoint.save_network(Rdst(TINY), {"medsr.method": "x"})


def with_config(state: dict[str, torch.Tensor], path: Path, **metadata: str) -> Path:
    own = {"medsr.format": "1", "medsr.method": "rdst", "medsr.config": json.dumps(dataclasses.asdict(TINY))}
    save_file(state, path, {**own, **{key.replace("_", "."): value for key, value in metadata.items()}})
    return path


@pytest.mark.parametrize(
    "field", [field.name for field in dataclasses.fields(RdstConfig)]
)  # every single field of the declared configuration is checked
def test_metadata_that_disagrees_is_refused(tmp_path: Path, field: str) -> None:
    declared = dataclasses.asdict(TINY)
    declared[field] = (not declared[field]) if field == "qkv_bias" else declared[field] * 2
    path = with_config(tiny_state(), tmp_path / "a.safetensors", medsr_config=json.dumps(declared))
    with pytest.raises(WeightsError, match="mlp" if field == "mlp_ratio" else field):
        load_network(path)


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"medsr_format": "2"}, "format '2'"),
        ({"medsr_method": "miracle"}, "'miracle'"),
        ({"medsr_method": "bicubic"}, "'bicubic'"),
        ({"medsr_config": "{"}, "not JSON"),
        ({"medsr_config": "[]"}, "fields"),
        ({"medsr_config": '{"n_rdstb": 1}'}, "fields"),
        ({"medsr_config": json.dumps({**dataclasses.asdict(TINY), "scale": "2"})}, "scale"),
        ({"medsr_config": json.dumps({**dataclasses.asdict(TINY), "n_rdstb": True})}, "n_rdstb"),
        ({"medsr_config": json.dumps({**dataclasses.asdict(TINY), "mlp_ratio": float("nan")})}, "cannot be"),
    ],
)
def test_bad_metadata_is_refused(tmp_path: Path, metadata: dict[str, str], sentence: str) -> None:
    with pytest.raises(WeightsError, match=sentence):
        load_network(with_config(tiny_state(), tmp_path / "a.safetensors", **metadata))


def spoil(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    match how:
        case "missing":
            del state["norm.weight"]
        case "missing-block-start":
            del state["head.weight"]
        case "extra":
            state["norm.extra"] = torch.ones(1)
        case "shape":
            state["norm.bias"] = torch.ones(13)
        case "nan":
            state["conv_after_body.bias"][3] = float("nan")
        case "inf":
            state["conv_after_body.bias"][3] = float("inf")
        case "integer":
            state["norm.bias"] = torch.ones(12, dtype=torch.int32)
        case "rank":
            state["head.weight"] = torch.ones(12)
        case "tail":
            state["tail.0.0.weight"] = torch.ones(12 * 25, 12, 3, 3)
        case "huge-index":
            state["body.999999999.conv.weight"] = torch.ones(1)
        case "many-blocks":
            state |= {f"body.0.body.{i}.x": torch.ones(1) for i in (900,)}
            state |= {f"body.{i}.x": torch.ones(1) for i in (900,)}
        case "wide":  # a small file that asks for a network of gigabytes
            state["head.weight"] = torch.ones(60_000, 1, 1, 1)
    return state


SPOILED = [
    ("missing", "lacks the tensor norm.weight"),
    ("missing-block-start", "head.weight is missing"),
    ("extra", "'norm.extra'"),
    ("shape", r"norm.bias in shape \(13,\), where rdst needs \(12,\)"),
    ("nan", "NaN or infinity in the tensor conv_after_body.bias"),
    ("inf", "NaN or infinity in the tensor conv_after_body.bias"),
    ("integer", "norm.bias as torch.int32"),
    ("rank", "not of its shapes"),
    ("tail", "scale 5"),
    ("huge-index", "body.999999999"),
    ("many-blocks", "too few for"),
    ("wide", "shape"),
]


@pytest.mark.parametrize(("how", "sentence"), SPOILED)
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_first_offender_is_named(tmp_path: Path, how: str, sentence: str, kind: str) -> None:
    state = spoil(tiny_state(), how)
    path = tmp_path / f"bad.{kind}"
    if kind == "pt":
        torch.save(state, path)
        read = checkpoint.read_author_checkpoint(path)
        with pytest.raises(WeightsError, match=sentence):
            checkpoint.network_from_state(read, catalogue.RDST, name=path.name)
    else:
        save_file(state, path)
        with pytest.raises(WeightsError, match=sentence):
            load_network(path)


@pytest.mark.parametrize("wrap", [None, *checkpoint.WRAPPERS])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("legacy", [True, False])
def test_author_layouts(tmp_path: Path, wrap: str | None, prefix: str, legacy: bool) -> None:
    state = tiny_state()
    named = OrderedDict((prefix + key, value) for key, value in state.items())
    named[prefix + "body.0.body.0.body.blocks.1.attn_mask"] = torch.zeros(9, 64, 64)
    named[prefix + "body.0.body.0.body.blocks.1.attn.relative_position_index"] = torch.zeros(64, 64).long()
    saved = named if wrap is None else {wrap: named, "epoch": 3, "loss": [1.0, 2.0], "optimizer_g": {"step": 1}}
    path = tmp_path / "author.pt"
    torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
    network = checkpoint.network_from_state(checkpoint.read_author_checkpoint(path), catalogue.RDST)
    assert network.config == TINY
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch bombed",)


@pytest.mark.parametrize("how", ["beside", "bare-pickle", "whole-module", "named-safetensors"])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ("bomb.safetensors" if how == "named-safetensors" else "bomb.pt")
    if how == "bare-pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif how == "whole-module":
        torch.save(Rdst(TINY), path)
    else:
        torch.save({"model_g": tiny_state(), "x": Bomb()}, path)
    sentence = "safetensors" if how == "named-safetensors" else "code beside tensors"
    with pytest.raises(WeightsError, match=sentence):
        checkpoint.read_author_checkpoint(path)
    with pytest.raises(WeightsError):
        load_network(path)
    assert not (tmp_path / "bombed").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (torch.ones(3), "holds a Tensor"),
        ({}, "no tensors"),
        ({"epoch": 3}, "no tensors under"),
        ({"model_g": {"a": torch.ones(1), "b": 3}}, "int under 'b'"),
        ({"a": torch.ones(1), 7: torch.ones(1)}, "under '7'"),
        ({"huge": torch.ones(1).expand(50_000, 50_000)}, "claims 10000000000 bytes"),
    ],
)
def test_odd_contents_are_refused(tmp_path: Path, content: object, sentence: str) -> None:
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(WeightsError, match=sentence):
        checkpoint.read_author_checkpoint(tmp_path / "odd.pt")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"<html>please log in</html>", b"PK\x03\x04broken"])
def test_other_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=name):
        checkpoint.read_author_checkpoint(tmp_path / name)


def test_missing_and_huge_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be read"):
        checkpoint.read_author_checkpoint(tmp_path / "none.pt")
    sparse = tmp_path / "sparse.pt"
    with sparse.open("wb") as file:
        file.truncate(checkpoint.MAX_FILE_BYTES + 1)
    with pytest.raises(WeightsError, match="4000000001 bytes"):
        checkpoint.read_author_checkpoint(sparse)


def test_a_compressed_archive_that_inflates_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_FILE_BYTES", 1_000_000)
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(2_000_000))
    assert path.stat().st_size < 100_000
    with pytest.raises(WeightsError, match="unpacks to 2000000 bytes"):
        checkpoint.read_author_checkpoint(path)


def test_truncated_at_any_place_is_refused(tmp_path: Path) -> None:
    torch.save(tiny_state(), tmp_path / "whole.pt")
    for source in ((tmp_path / "whole.pt").read_bytes(), checkpoint.save_network(Rdst(TINY))):
        for fraction in (0.01, 0.3, 0.6, 0.999):
            cut = tmp_path / ("cut.pt" if source[:2] == b"PK" else "cut.safetensors")
            cut.write_bytes(source[: int(len(source) * fraction)])
            with pytest.raises(WeightsError, match="cut"):
                checkpoint.read_author_checkpoint(cut)


def test_a_network_that_does_not_run_does_not_pass_the_rehearsal() -> None:
    network = Rdst(TINY).eval()
    network.head = torch.nn.Conv2d(7, TINY.embed_dim, 3)
    with pytest.raises(WeightsError, match="no working network"):
        checkpoint.rehearse(network)


def test_unknown_tensors_have_no_method(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="no network that medsr knows"):
        load_network(tmp_path / "a.safetensors")


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the fixtures are not on this machine")
@pytest.mark.parametrize("name", ["rdst_e_small_x4", "rdst_tiny_x2_4ch_meanstd", "rdst_tiny_x3"])
def test_imported_weights_give_the_authors_outputs(tmp_path: Path, name: str) -> None:
    tensors = load((GOLDEN / f"{name}.safetensors").read_bytes())
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    state = {key[2:]: value for key, value in tensors.items() if key.startswith("w/")}
    torch.save({"model_g": state}, tmp_path / "author.pt")
    pytest.importorskip("medsr_cli.formats.atomic")
    from medsr_cli.tasks.weights import ImportRequest, import_weights

    done = import_weights(ImportRequest(tmp_path / "author.pt", tmp_path / "out.safetensors", "rdst"))
    declared = {key: value for key, value in facts["config"].items() if key in done.config}
    assert done.config == declared
    network = load_network(tmp_path / "out.safetensors")
    for case in facts["cases"]:
        wanted = tensors[case["y"]]
        with torch.inference_mode():
            found = network(tensors[case["x"]])
        assert (found - wanted).abs().max() <= 1e-4 * (wanted.max() - wanted.min())


@pytest.mark.parametrize(
    ("name", "expected"), [("rdst", ("rdst", None)), ("RDST-E", ("rdst", "rdst-e")), ("bicubic", ("bicubic", None))]
)
def test_find(name: str, expected: tuple[str, str | None]) -> None:
    arch, variant = catalogue.find(name)
    assert (arch.id, variant) == expected


def test_find_lists_what_there_is() -> None:
    with pytest.raises(ArgumentsError, match=r"Did you mean rdst-e\?.*bicubic"):
        catalogue.find("rdste")


def test_catalogue_names_things_that_exist() -> None:
    import importlib

    for arch in catalogue.CATALOGUE:
        if arch.module:
            module = importlib.import_module(arch.module)
            config = getattr(module, arch.config)()
            fields = {field.name for field in dataclasses.fields(config)}
            assert {*arch.repeats, *arch.loose_fields} <= fields
            assert all(set(variant) <= fields for variant in arch.variants.values())
            assert callable(module.config_from_state)
            assert isinstance(module.RECOMPUTED_BUFFERS, tuple)
            network = getattr(module, arch.network)(config)
            assert arch.fits(network.state_dict())
            assert catalogue.detect(network.state_dict()) == [arch]
            assert arch.variant_of(dataclasses.asdict(config)) in arch.variants
