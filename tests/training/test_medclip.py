"""MedCLIP's encoders against transformers, its files, its tokeniser, and M2Trans' semantic loss on them."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name

from medsr_cli.errors import ArgumentsError, WeightsError
from medsr_cli.networks import catalogue, checkpoint
from medsr_cli.networks.archive import read_published_checkpoint
from medsr_cli.networks.medclip import MedClip, MedClipConfig, config_from_state
from medsr_cli.networks.wordpiece import WordPiece, read_vocabulary, words
from medsr_cli.training.batch import Batch, Outputs
from medsr_cli.training.losses import build_terms
from medsr_cli.training.recipe import Recipe
from medsr_cli.training.semantic import ImageText, SemanticLoss, load_image_text, patches

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WHOLE = ["a", "picture", "of", "nice", "sharp", "fine", "clear", "image", "an", "ultra", "gr", "cafe", "heart", "4"]
PIECES = [*SPECIAL, *WHOLE, "##sound", "##s", "##eat", "##e", ",", ".", "'", "-", "##2", "##c", "##le", "##an"]
TINY = MedClipConfig(
    width=4,
    depths="2,2,1",
    heads="1,2,4",
    window=2,
    vocabulary=len(PIECES),
    positions=20,
    text_width=8,
    text_layers=3,
    text_heads=2,
    text_hidden=12,
    out=6,
)
CAPTIONS = ("a picture of a nice ultrasound image", "a fine image of an ultrasound")


def tokeniser() -> WordPiece:
    return WordPiece({piece: i for i, piece in enumerate(PIECES)})


def tiny(config: MedClipConfig = TINY) -> MedClip:
    torch.manual_seed(4)
    net = MedClip(config)
    with torch.no_grad():  # the defaults are too even for a wrong window or position to show
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.4)
    return net.eval()


def one_head() -> MedClip:
    """Of a size that a file tells in full: heads of 64 channels are assumed."""
    return tiny(MedClipConfig(**{**vars(TINY), "text_heads": 1}))


def published(net: MedClip) -> dict[str, torch.Tensor]:
    """What the authors' file holds: also counted buffers, BERT's pooling, and the temperature."""
    state = dict(net.state_dict())
    for key in [key for key in state if key.endswith("relative_position_bias_table")]:
        state[key.replace("bias_table", "index")] = torch.arange(16).view(4, 4)
    state["text_model.model.embeddings.position_ids"] = torch.arange(20)[None]
    state["text_model.model.pooler.dense.weight"] = torch.ones(8, 8)
    return {**state, "logit_scale": torch.tensor(2.6)}


# --- the encoders ----------------------------------------------------------------------------------------------


def swin_names(key: str) -> str:
    """Names of transformers 5 back to those that the published file has; older ones stay as they are."""
    table = (
        (r"\.attention\.relative_position_bias\.", ".attention.self."),
        (r"\.attention\.q_proj\.", ".attention.self.query."),
        (r"\.attention\.k_proj\.", ".attention.self.key."),
        (r"\.attention\.v_proj\.", ".attention.self.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    )
    for found, wanted in table:
        key = re.sub(found, wanted, key)
    return key


@pytest.mark.parametrize("changes", [{}, {"window": 3, "depths": "2,1", "heads": "2,4"}])
def test_the_image_encoder_is_the_swin_of_transformers(changes):
    transformers = pytest.importorskip("transformers")
    config = MedClipConfig(**{**vars(TINY), **changes})
    net = tiny(config)
    swin = transformers.SwinModel(
        transformers.SwinConfig(
            image_size=config.side,
            patch_size=config.patch,
            embed_dim=config.width,
            depths=list(config.level_depths),
            num_heads=list(config.level_heads),
            window_size=config.window,
        )
    ).eval()
    ours = {key.removeprefix("vision_model.model."): v for key, v in net.state_dict().items() if "vision" in key}
    theirs = {key: ours[swin_names(key)] for key in swin.state_dict() if not key.endswith("_index")}
    assert set(map(swin_names, theirs)) == set(ours) - {"vision_model.projection_head.weight"}
    swin.load_state_dict(theirs, strict=False)
    image = torch.rand(2, 3, config.side, config.side)
    with torch.no_grad():
        pooled = swin(image).pooler_output
        torch.testing.assert_close(net.vision_model.model(image), pooled, rtol=1e-4, atol=1e-5)
        wanted = F.normalize(pooled @ net.vision_model.projection_head.weight.T, dim=1)
        torch.testing.assert_close(net.encode_image(image), wanted, rtol=1e-4, atol=1e-5)


def test_the_text_encoder_is_the_bert_of_transformers():
    transformers = pytest.importorskip("transformers")
    net = tiny()
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=TINY.vocabulary,
            hidden_size=TINY.text_width,
            num_hidden_layers=TINY.text_layers,
            num_attention_heads=TINY.text_heads,
            intermediate_size=TINY.text_hidden,
            max_position_embeddings=TINY.positions,
        )
    ).eval()
    ours = {key.removeprefix("text_model.model."): v for key, v in net.state_dict().items() if "text_model.m" in key}
    absent, unknown = bert.load_state_dict(ours, strict=False)
    assert not unknown
    assert all(key.startswith(("pooler.", "embeddings.position_ids", "embeddings.token_type_ids")) for key in absent)
    tokens = torch.tensor([tokeniser().ids(CAPTIONS[0])])
    with torch.no_grad():
        states = bert(tokens, output_hidden_states=True).hidden_states
        mean = (states[1] + states[2] + states[-1]).mean(1) / 3
        wanted = F.normalize(mean @ net.text_model.projection_head.weight.T, dim=1)
        torch.testing.assert_close(net.encode_text(tokens), wanted, rtol=1e-4, atol=1e-5)


def test_the_real_sizes_are_those_of_the_catalogue_and_are_recovered():
    with torch.device("meta"):
        net = MedClip()
    state = net.state_dict()
    assert sum(p.numel() for p in net.parameters()) == catalogue.MEDCLIP.parameters["medclip-vit"]
    assert config_from_state(state) == net.config
    assert net.config.side == 224
    assert state["vision_model.projection_head.weight"].shape == (512, 768)
    assert state["text_model.projection_head.weight"].shape == (512, 768)
    assert catalogue.detect(state) == [catalogue.MEDCLIP]


def test_other_sizes_are_refused():
    net = tiny()
    with pytest.raises(ValueError, match="images of 3 x 32 x 32"):
        net.encode_image(torch.zeros(1, 3, 32, 40))
    with pytest.raises(ValueError, match="21 tokens is too long; this MedCLIP takes 20"):
        net.encode_text(torch.zeros(1, 21, dtype=torch.long))


@pytest.mark.parametrize(
    "wrong", [{"text_heads": 5}, {"heads": "3,6"}, {"window": 1}, {"out": 0}, {"heads": "5,6,12,24"}]
)
def test_configurations_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=r"heads|at least"):
        MedClipConfig(**wrong)


# --- its files -------------------------------------------------------------------------------------------------


def vocabulary_file(folder: Path, name: str = "vocab.txt") -> Path:
    path = folder / name
    path.write_text("\n".join(PIECES) + "\n")
    return path


def as_zip(folder: Path, member: Path, name: str = "medclip.zip", more: tuple[str, ...] = ("config.json",)) -> Path:
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(member, f"medclip-vit-pretrained/{member.name}")
        for other in more:
            archive.writestr(other, "{}")
    return folder / name


def test_the_published_file_loads_bare_and_from_its_zip_and_from_the_store(tmp_path):
    net, image = one_head(), torch.rand(1, 1, 32, 32)
    torch.save(published(net), tmp_path / "pytorch_model.bin")
    vocabulary_file(tmp_path)
    packed = as_zip(tmp_path, tmp_path / "pytorch_model.bin", more=("config.json", "__MACOSX/._pytorch_model.bin"))
    (tmp_path / "store").mkdir()
    stored = tmp_path / "store" / "medclip-vit.safetensors"
    stored.write_bytes(checkpoint.save_network(net))
    vocabulary_file(tmp_path / "store", "medclip-vit.vocab.txt")
    for path in (tmp_path / "pytorch_model.bin", packed, stored):
        found = load_image_text(path)
        assert found.net.config == net.config
        tokens = torch.tensor([tokeniser().ids(CAPTIONS[1])])
        with torch.no_grad():
            torch.testing.assert_close(found.encode_image(image), net.encode_image(image.expand(-1, 3, -1, -1)))
            torch.testing.assert_close(found.encode_captions(CAPTIONS[1:]), net.encode_text(tokens))
    checkpoint.rehearse(found.net)


def test_heads_that_no_tensor_tells_are_kept_in_a_file_of_ours(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(checkpoint.save_network(tiny()))
    assert checkpoint.load_network(path).config == TINY


class Harmful:
    def __reduce__(self):
        return (print, ("was run",))


def test_hostile_files_are_refused(tmp_path, capsys):
    state = published(one_head())
    bad = tmp_path / "pytorch_model.bin"
    torch.save({**state, "logit_scale": Harmful()}, bad)
    with pytest.raises(WeightsError, match="Python objects or code"):
        read_published_checkpoint(as_zip(tmp_path, bad))
    assert "was run" not in capsys.readouterr().out
    torch.save(state, bad)
    whole = as_zip(tmp_path, bad).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError):
        read_published_checkpoint(tmp_path / "cut.zip")
    damaged = bytearray(whole)
    damaged[200] ^= 0xFF
    (tmp_path / "damaged.zip").write_bytes(damaged)
    with pytest.raises(WeightsError, match="not a readable"):
        read_published_checkpoint(tmp_path / "damaged.zip")
    with pytest.raises(WeightsError):
        read_published_checkpoint(tmp_path / "absent.zip")


@pytest.mark.parametrize("members", [(), ("a.bin", "b.pt")])
def test_an_archive_has_one_checkpoint(tmp_path, members):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in (*members, "read.me"):
            archive.writestr(name, "x")
    with pytest.raises(WeightsError, match=f"{len(members)} checkpoints in it"):
        read_published_checkpoint(tmp_path / "a.zip")


def test_an_archive_cannot_unpack_to_any_size_or_anywhere(tmp_path, monkeypatch):
    torch.save(published(one_head()), tmp_path / "pytorch_model.bin")
    packed = as_zip(tmp_path, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(checkpoint, "MAX_FILE_BYTES", packed.stat().st_size + 1)
    with pytest.raises(WeightsError, match="unpacks to"):
        read_published_checkpoint(packed)
    monkeypatch.undo()
    with zipfile.ZipFile(tmp_path / "up.zip", "w") as archive:
        archive.write(tmp_path / "pytorch_model.bin", "../../../escaped.bin")
    assert read_published_checkpoint(tmp_path / "up.zip")
    assert not list(tmp_path.parent.rglob("escaped.bin"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"text_model.projection_head.weight": None}, r"lacks the tensor text_model\.projection_head\.weight"),
        ({"vision_model.projection_head.weight": None}, r"vision_model\.projection_head\.weight is missing"),
        ({"text_model.model.encoder.layer.1.output.dense.bias": torch.ones(3)}, "in shape"),
        ({"vision_model.model.layernorm.bias": torch.full((16,), torch.inf)}, "NaN or infinity"),
        ({"text_model.model.embeddings.word_embeddings.weight": torch.ones(3)}, "not of its shapes"),
        ({"third_model.weight": torch.ones(1)}, "does not have"),
    ],
)
def test_what_is_no_medclip_is_refused(change, sentence):
    state = {key: value for key, value in {**published(one_head()), **change}.items() if value is not None}
    with pytest.raises(WeightsError, match=sentence):
        checkpoint.network_from_state(state, catalogue.MEDCLIP)


def test_a_vocabulary_that_is_missing_or_another_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(checkpoint.save_network(one_head()))
    with pytest.raises(WeightsError, match=r"m\.vocab\.txt, is missing\. Copy https://huggingface\.co/"):
        load_image_text(path)
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES[:-1]))
    with pytest.raises(WeightsError, match=f"has {len(PIECES) - 1} pieces, where this MedCLIP knows {len(PIECES)}"):
        load_image_text(path)
    with pytest.raises(WeightsError, match="is missing"):
        load_image_text(path, tmp_path / "other.txt")


# --- the tokeniser ---------------------------------------------------------------------------------------------

TEXTS = (
    *CAPTIONS,
    "",
    "A Sharp,CLEAR  image of an UltraSounds.",
    "Café's heart-image\n42",
    "unknown great greate cleansound [CLS]",
    "fine\x00 \u200bfine 中文 £4.2",
    "a" * 150,
)


@pytest.mark.parametrize("text", TEXTS)
def test_words_and_pieces_are_those_of_transformers(text):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizer(vocab=dict(tokeniser().pieces))
    if "[CLS]" in text:  # theirs takes marks in a text for marks; ours for letters
        text = text.replace("[CLS]", "[ CLS ]")
    assert tokeniser().ids(text) == theirs(text)["input_ids"]


def test_captions_differ_by_their_words():
    """The released script feeds zeros for all words."""
    first, second = tokeniser().ids("a nice image"), tokeniser().ids("a sharp image")
    assert first != second
    assert [PIECES[i] for i in tokeniser().ids("An ultrasound.")] == ["[CLS]", "an", "ultra", "##sound", ".", "[SEP]"]
    assert words("Nice, fine") == ["nice", ",", "fine"]


def test_a_vocabulary_file_is_read_line_by_line(tmp_path):
    assert read_vocabulary(vocabulary_file(tmp_path)).pieces == tokeniser().pieces
    (tmp_path / "crlf.txt").write_bytes("\r\n".join(PIECES).encode())
    assert read_vocabulary(tmp_path / "crlf.txt").pieces == tokeniser().pieces


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"[CLS]\n[SEP]\n[UNK]\na\na\n", "twice"),
        (b"[CLS]\n[SEP]\na\n", r"no \[UNK\]"),
        (b"\xff\xfe\x00", "cannot be read as text"),
        (b"", r"no \[CLS\]"),
        (b"x" * 10_000_001, "too large"),
    ],
)
def test_what_is_no_vocabulary_is_refused(tmp_path, content, sentence):
    (tmp_path / "v.txt").write_bytes(content)
    with pytest.raises(WeightsError, match=sentence):
        read_vocabulary(tmp_path / "v.txt")


# --- the loss --------------------------------------------------------------------------------------------------


def encoders() -> ImageText:
    return ImageText(tiny(), tokeniser())


def directly(both: ImageText, result, target, captions, count: int, seed: int) -> float:
    """Σ_images Σ_k |cos(E_i(SR_k), v) - cos(E_i(HR_k), v)| / K, one image after the other."""
    cuts = [patches(image, 32, count, seed) for image in (result, target)]
    total = 0.0
    for i, caption in enumerate(captions):
        text = both.net.encode_text(torch.tensor([both.tokeniser.ids(caption)]))[0]
        for k in range(count):
            a, b = (both.net.encode_image(cut[k, i : i + 1].expand(-1, 3, -1, -1))[0] for cut in cuts)
            cosines = [F.cosine_similarity(x, text, dim=0).item() for x in (a, b)]
            total += abs(cosines[0] - cosines[1]) / count
    return total


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 3])
def test_the_value_is_that_of_the_formula(channels, count):
    torch.manual_seed(1)
    both, (result, target) = encoders(), torch.rand(2, 2, channels, 48, 40)
    with torch.no_grad():
        found = SemanticLoss(both, count)(result, target, CAPTIONS, 11).item()
        assert found == pytest.approx(directly(both, result, target, CAPTIONS, count, 11), rel=1e-4)
        assert found > 1e-3
        assert SemanticLoss(both, count)(target, target, CAPTIONS, 11) == 0
        swapped = SemanticLoss(both, count)(result, target, CAPTIONS[::-1], 11).item()
    assert swapped != pytest.approx(found, rel=1e-3), "each image has its own caption"


def test_patches_are_the_whole_and_crops_at_one_place_of_result_and_target():
    image = torch.arange(50 * 41.0).view(1, 1, 50, 41).repeat(2, 1, 1, 1)
    cut = patches(image, 32, 4, seed=7)
    assert cut.shape == (4, 2, 1, 32, 32)
    torch.testing.assert_close(cut[0], F.interpolate(image, (32, 32), mode="bicubic", align_corners=True))
    assert torch.equal(cut[0, 0, 0, [0, 0, -1, -1], [0, -1, 0, -1]], image[0, 0, [0, 0, -1, -1], [0, -1, 0, -1]])
    starts = set()
    for crop in cut[1:].flatten(0, 1):
        row, column = divmod(int(crop[0, 0, 0]), 41)
        assert torch.equal(crop[0], image[0, 0, row : row + 32, column : column + 32])
        starts.add((row, column))
    assert len(starts) > 3, "places differ between crops and images"
    assert torch.equal(cut, patches(image, 32, 4, seed=7))
    assert not torch.equal(cut, patches(image, 32, 4, seed=8))


@pytest.mark.parametrize(("size", "enlarged"), [((20, 26), (32, 42)), ((40, 16), (80, 32)), ((32, 32), (32, 32))])
def test_small_images_are_enlarged_for_their_crops(size, enlarged):
    image = torch.rand(1, 1, *size)
    large = F.interpolate(image, enlarged, mode="bicubic", align_corners=True)
    cut = patches(image, 32, 2, seed=3)[1, 0, 0]
    places = [(r, c) for r in range(enlarged[0] - 31) for c in range(enlarged[1] - 31)]
    assert any(torch.allclose(cut, large[0, 0, r : r + 32, c : c + 32], atol=1e-6) for r, c in places)


def test_the_gradient_reaches_the_result_and_not_the_encoders():
    both = encoders().train()
    assert not both.net.training
    result, target = torch.rand(2, 2, 1, 40, 40)
    (term,) = build_terms(Recipe(losses={"semantic": 0.01}, semantic_patches=2), {"medclip": both}, torch.device("cpu"))
    batch = Batch(low=target, high=target, captions=CAPTIONS, seed=5)
    found = term(Outputs(result.requires_grad_()), batch)
    assert torch.equal(found, SemanticLoss(both, 2)(result, target, CAPTIONS, 5))
    found.backward()
    assert result.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in both.parameters())


def test_a_step_against_the_gradient_fits_better():
    torch.manual_seed(2)
    loss, (result, target) = SemanticLoss(encoders(), 1), torch.rand(2, 2, 3, 32, 32)
    before = loss(result.requires_grad_(), target, CAPTIONS, 0)
    (slope,) = torch.autograd.grad(before, result)
    with torch.no_grad():
        after = loss(result - 0.05 * slope / slope.norm(), target, CAPTIONS, 0)
    assert after < before


def test_every_image_needs_its_caption():
    image = torch.rand(2, 1, 32, 32)
    (term,) = build_terms(Recipe(losses={"semantic": 0.01}), {"medclip": encoders()}, torch.device("cpu"))
    with pytest.raises(ArgumentsError, match="needs a caption for each image"):
        term(Outputs(image), Batch(low=image, high=image, captions=CAPTIONS[:1]))
    with pytest.raises(ValueError, match="under 1 captions"):
        SemanticLoss(encoders())(image, image, CAPTIONS[:1], 0)


def test_the_manifest_lists_it_unpinned_with_its_zip():
    from medsr_cli.weights.manifest import load_manifest

    entry = load_manifest().entry("medclip-vit")
    assert (entry.method, entry.variant, entry.pinned) == ("medclip", "medclip-vit", False)
    assert entry.sources[0].url.endswith("/medclip-vit-pretrained.zip")
    assert "--allow-unpinned" in entry.how_to_get
    assert catalogue.MEDCLIP.variant_of(vars(MedClipConfig())) == entry.variant
