"""Every method that medsr has, in one list; standard library only, so that reading it costs nothing.

An entry names its module, classes and functions as strings. `checkpoint` imports them on use. A network
module offers what its entry says: the network class, its configuration dataclass, `config_from_state`
(shapes of tensors to configuration), `example_inputs` (the smallest inputs that a configuration runs on) and
`RECOMPUTED_BUFFERS` (endings of keys that are not loaded).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

from medsr_cli.errors import ArgumentsError

Kind = Literal["network", "baseline", "detector", "perceptual", "segmentation"]
"""`detector`: a network that finds a region and enlarges nothing; `perceptual`: one whose activations a loss
compares; `segmentation`: one that labels pixels."""
Tiling = Literal["exact", "blended", "inexact", "fixed"]
"""What tiles do to the result: nothing; little, blended on the window grid; much, since the network takes
statistics of the whole image; or the network runs at one size only and always goes by tiles."""
Need = Literal["guide", "training on the image"]
Field = int | float | bool | str


@dataclass(frozen=True)
class Arch:
    """One method: where it comes from, what it takes, and how its checkpoints are told from others."""

    id: str
    kind: Kind
    title: str
    paper: str
    licence: str
    """Licence of the code in this package; that of a checkpoint is in the manifest."""
    scales: tuple[int, ...]
    """In-plane enlargements that the method can be built for, at least 2; its network has one of them."""
    channels: tuple[int, ...]
    """Image channels that the paper's networks take; empty for any number."""
    scale_range: tuple[float, float] | None = None
    """One network takes every enlargement above the first and up to the second, also different per axis."""
    family: str = ""
    """The id under which the method is asked for too, where several networks go by one name."""
    module: str = ""
    network: str = ""
    """Name of the network class in `module`; it is built from one configuration and keeps it as `.config`."""
    config: str = ""
    """Name of the frozen configuration dataclass in `module`."""
    variants: Mapping[str, Mapping[str, Field]] = field(default_factory=dict)
    """Variant name to the fields of the configuration that make it that variant."""
    size_multiple: int = 1
    """The network pads to this multiple of pixels by itself; batches of such sizes are not padded."""
    smallest: int = 1
    """Shortest side that the network runs on; shorter ones are padded by repetition and cropped after."""
    tiling: Tiling = "blended"
    overlap: int = 32
    """Pixels of the input that neighbouring tiles share, where tiles are not exact; entries say how it was found."""
    bytes_per_pixel: int = 0
    """Working memory for one pixel of what the network is given, at the scale and for the variant that take most."""
    working_bytes: Mapping[str, int] = field(default_factory=dict)
    """The same for variants by name, at the scale in it, such as `m2trans x2`; without one, at every other.

    Measured with `tests/benchmarks/tiles.py --memory`, float32 on the CPU, rounded up."""
    enlarged_first: bool = False
    """The network works on an image that bicubic has enlarged already."""
    first_stage: int = 0
    """Enlargement of a result that the network makes on the way; 0 where it makes none."""
    degradation: str = "cubic"
    """What the paper's low-resolution images went through, where a checkpoint does not say."""
    full_scale: bool = False
    """8-bit images are divided by 255 as the paper does, not scaled by their own range."""
    warning: str = ""
    """What every user of its checkpoints has to know, a sentence."""
    precision: tuple[str, ...] = ("float32",)
    needs: tuple[Need, ...] = ()
    """What it needs beside the image."""
    trainable: bool = False
    """Whether `medsr finetune` takes it."""
    keys: tuple[str, ...] = ()
    """Tensor names that all stand in a checkpoint of this method and tell it from the others."""
    repeats: tuple[str, ...] = ()
    """Configuration fields whose product is a number of layers: never more than a file has tensors."""
    loose_fields: tuple[str, ...] = ()
    """Configuration fields that shapes do not give, or only up to rounding; the shapes themselves are compared."""
    rounded_fields: tuple[str, ...] = ()
    """Those of the loose ones that shapes do give up to rounding."""
    summary: str = ""
    """What it computes, in a few lines a reader of the paper recognises."""
    parameters: Mapping[str, int] = field(default_factory=dict)
    """Counted numbers of the variants, at the paper's x4 and one channel unless the name says otherwise."""
    authors: str = ""
    """What the authors published, and under which licence."""
    claims: tuple[str, ...] = ()
    """Which of the paper's claims this installation can show, and which it cannot."""

    def fits(self, names: Collection[str]) -> bool:
        """Whether tensors of these names look like a checkpoint of this method."""
        return bool(self.keys) and all(key in names for key in self.keys)

    @property
    def untold_fields(self) -> tuple[str, ...]:
        """Configuration fields that no tensor tells: an import has to assume them, or be told."""
        return tuple(name for name in self.loose_fields if name not in self.rounded_fields)

    def variant_of(self, config: Mapping[str, object]) -> str | None:
        """The variant that a configuration is, or None for a size that has no name."""
        for name, fields in self.variants.items():
            if all(config.get(key) == value for key, value in fields.items()):
                return name
        return None


_RDST_WIDTHS: dict[str, int | float | bool] = {
    "embed_dim": 60,
    "growth_rate": 30,
    "num_heads": 6,
    "window_size": 8,
    "dstb_per_rdstb": 3,
    "stl_per_dstb": 2,
}

RDST = Arch(
    id="rdst",
    kind="network",
    title="RDST (residual dense Swin transformer)",
    paper="J. Zhu, G. Yang, P. Liò, arXiv 2302.11184 (2023)",
    licence="as medsr; written from the paper, no code of the authors",
    scales=(2, 3, 4),
    channels=(1, 4),
    module="medsr_cli.networks.rdst",
    network="Rdst",
    config="RdstConfig",
    variants={"rdst-e": {"n_rdstb": 4, **_RDST_WIDTHS}, "rdst": {"n_rdstb": 8, **_RDST_WIDTHS}},
    size_multiple=8,
    tiling="blended",
    # Half of it is thrown away at every rim. Measured with the checkpoints of this project on slices of ../shared
    # (tests/benchmarks/tiles.py): what a rim changes falls tenfold in every 6 pixels, and is at most 9e-5 of the
    # image's range 16 pixels from it, 2e-5 at 20 and 2e-6 at 24. So 40 keeps below one unit of any 15-bit image.
    overlap=40,
    bytes_per_pixel=4_800,
    trainable=True,
    precision=("float32", "bfloat16"),
    keys=("body.0.body.0.body.blocks.0.attn.relative_position_bias_table", "tail.0.0.weight"),
    parameters={"rdst": 4_464_965, "rdst-e": 2_379_245},
    summary="""
        3x3 convolution to 60 channels; eight (RDST) or four (RDST-E) residual dense Swin blocks; sub-pixel tail.
        Dense Swin block: two window-attention layers x + Attn(LN(x)), x + MLP(LN(x)) on 8x8 windows, the second
        shifted by 4, then a bottleneck to 30 channels that is kept beside the input (60, 90, 120 channels).
        Residual dense block: three of these, a 3x3 convolution back to 60 channels, plus its input.
    """,
    authors="Code and three checkpoints for OASIS x4 (RDST E1, RDST HRL, RDST-E E1), published as links to "
    "pickles; a licence for the weights is not stated.",
    claims=(
        "That the network is the published one: yes, by golden fixtures, for every variant and scale.",
        "The PSNR of the paper on OASIS (33.42 dB at x4): not here, since OASIS and the authors' files are not "
        "part of medsr; pull the authors' checkpoints and measure on OASIS.",
        "That a segmentation-based loss helps the Dice score: the second stage of training is here (presets paper-e1, "
        "paper-hrl); whether it helps on your images, train both and compare.",
    ),
    repeats=("n_rdstb", "dstb_per_rdstb", "stl_per_dstb"),
    loose_fields=("mlp_ratio",),
    rounded_fields=("mlp_ratio",),
)

MIASSR = Arch(
    id="miassr",
    kind="network",
    title="MIASSR (any scale, meta-upscale)",
    paper="J. Zhu, C. Tan, J. Yang, G. Yang, P. Liò, Int. J. Neural Systems 31(10), 2021, arXiv 2105.10738",
    licence="as medsr; written from the paper, no code of the authors",
    scales=(2, 3, 4),
    scale_range=(1.0, 4.0),
    channels=(1, 4),
    module="medsr_cli.networks.miassr",
    network="Miassr",
    config="MiassrConfig",
    variants={"miassr": {"n_blocks": 16, "n_feats": 64, "hidden": 256, "kernel": 3}},
    degradation="cubic-blur",
    tiling="exact",
    bytes_per_pixel=1_700,
    trainable=True,
    keys=("feature_extractor.head.0.weight", "meta_upsampler.P2W.meta_block.0.weight"),
    repeats=("n_blocks",),
    loose_fields=("rounding",),
    parameters={"miassr": 1_368_324, "miassr (4 channels)": 1_814_184},
    summary="""
        EDSR-lite extractor: 3x3 convolution to 64 features, 16 blocks x + conv(LeakyReLU(conv(x))), 3x3 convolution,
        plus the first one's output. Meta-upscale: output pixel (i, j) looks at pixel (floor(i/s), floor(j/s)); a
        network P2W (3, 256, 9*64) turns (1/s, i/s - floor(i/s), j/s - floor(j/s)) into a 3x3 kernel over all 64
        features there. No convolution after it. Any scale, also one for each axis, where P2W is told the inverse of
        their geometric mean (ours). Positions are exact fractions, or rounded as by the authors' program for weights
        of theirs.
    """,
    authors="Code (github.com/GinZhu/MIASSR), licence not stated; the link to its weights is empty, so that there "
    "are none.",
    claims=(
        "That the network is the authors': yes, by golden fixtures, for 1 and 4 channels and ten scales; also where "
        "their program fails (short sides, scales without a short period).",
        "That one network of 1.5 M parameters takes any scale in (1, 4]: yes; 1.37 M of them are used, the others are "
        "a tail that is never run.",
        "The PSNR and FID of the paper (36.46 dB, 39.85 on OASIS): not here, since no weights are published and OASIS, "
        "BraTS, ACDC and COVID-CT are not part of medsr.",
    ),
)

MSGAN = Arch(
    id="msgan",
    kind="network",
    title="MS-GAN (lesion-focused, two-stage generator)",
    paper="J. Zhu, G. Yang, P. Liò, arXiv 1901.03419 (ISBI 2019) and 1810.06693; J. Zhu's dissertation, chapter 3",
    licence="as medsr; written from the papers, which have no code",
    scales=(4,),
    channels=(1,),
    module="medsr_cli.networks.msgan",
    network="MsGan",
    config="MsGanConfig",
    variants={
        "msgan": {"extractors": 2, "n_blocks": 16, "n_feats": 64},
        "ms-srresnet": {"extractors": 1, "n_blocks": 16, "n_feats": 64},
    },
    precision=("float32", "bfloat16"),
    first_stage=2,
    tiling="exact",
    bytes_per_pixel=12_000,
    trainable=True,
    keys=("f1.blocks.0.conv1.weight", "m1.conv.weight", "c1.weight", "m2.conv.weight"),
    repeats=("n_blocks",),
    loose_fields=("second_relu",),
    summary=(
        "Two x2 SRResNets in sequence, features passed on: F_a = M1(F1(L)), SRx2 = C1(F_a), SRx4 = C2(M2(F2(F_a))).\n"
        "F: 3x3 convolution and ReLU, 16 residual blocks x + ReLU(BN(conv(ReLU(BN(conv(x)))))) of 64 kernels, a\n"
        "convolution, and a skip over all of them. M: sub-pixel x2 (64 to 256 kernels, shuffle, ReLU). C: 3x3 to one.\n"
        "Trained with the squared errors of both sizes, a WGAN-GP critic and a VGG-19 loss on x4, on lesions only.\n"
        "ms-srresnet is the alternative that the dissertation compares: one extractor, F2 left out."
    ),
    parameters={"msgan": 2_779_586, "ms-srresnet": 1_519_938},
    authors="A README and a poster (github.com/GinZhu/MSGAN): no code, no weights, licence not stated.",
    claims=(
        "The two-stage generator, MS-SRResNet and their training are here as the texts describe them.",
        "The figures of the papers cannot be reproduced: no weights were published, the weights of the loss are not "
        "given, BraTS is not here, and the two cardiac data sets are private.",
        "What the texts leave open (skips, ReLU after each shuffle, biases) was decided here and is marked [ours].",
    ),
)

MSGAN_DETECTOR = Arch(
    id="msgan-detector",
    kind="detector",
    title="Lesion detector of MS-GAN",
    paper="J. Zhu's dissertation, chapter 3",
    licence="as medsr; written from the papers, which have no code",
    scales=(),
    channels=(1,),
    module="medsr_cli.networks.msgan_detector",
    network="LesionDetector",
    config="LesionDetectorConfig",
    variants={"msgan-detector": {"widths": "32,64,128,128,128", "hidden": "1024,128", "side": 128}},
    trainable=True,
    keys=("levels.0.0.conv1.weight", "levels.0.1.norm2.running_var", "fc.0.weight", "fc.1.weight"),
    summary=(
        "The image, resized to 128 x 128 (bilinear), goes through five levels of two residual blocks and 2x2 max\n"
        "pooling (32, 64, 128, 128 and 128 kernels, BatchNorm and ReLU after each convolution), then through fully\n"
        "connected layers of 1024, 128 and 2 outputs: the centre of the lesion (x, y), from 0 to 1 along each side.\n"
        "Trained on high-resolution images with the squared distance to the mean coordinate of the labelled pixels."
    ),
    parameters={"msgan-detector": 4_096_898},
    authors="Described in the dissertation only: no code, no weights, licence not stated.",
    claims=(
        "The detector and its training are built as the text describes them.",
        "That its region covers the whole tumour in 89.1 % of the x4 test slices cannot be checked: no weights were "
        "published and BraTS is not here.",
        "The size of its input is not given in the text; 128 was decided here.",
    ),
)

M2TRANS = Arch(
    id="m2trans",
    kind="network",
    title="M2Trans (coarse-to-fine transformer for ultrasound)",
    paper="Z. Ni et al., IEEE J. Biomed. Health Inform. 29(5), 2025, doi 10.1109/JBHI.2024.3454068",
    licence="as medsr; written from the paper and its published facts, no code of the authors",
    scales=(2, 3, 4),
    channels=(3,),
    module="medsr_cli.networks.m2trans",
    network="M2Trans",
    config="M2TransConfig",
    variants={"m2trans": {"n_feats": 64, "n_blocks": 8, "block_size": 8}},
    size_multiple=32,
    smallest=17,
    degradation="bicubic-antialiased",
    full_scale=True,
    bytes_per_pixel=4_200,
    working_bytes={"m2trans x2": 3_300, "m2trans x3": 3_300},
    tiling="inexact",
    trainable=True,
    keys=("body.0.attn1.rel_h", "body.0.feed_forward.0.weight"),
    repeats=("n_blocks",),
    summary=(
        "F0 = conv3x3(x), F = F0 + CFTM_8(...CFTM_1(F0)), y = clamp(conv3x3(U(F)), 0, 1); U is 1x1 convolution,\n"
        "sub-pixel shuffle and GELU (x4: twice by 2). CFTM: instance norm over the whole image, split into four;\n"
        "y_i = A_i(t_i) + t_i with t_i = (u_i + y_(i-1)) / 2, where A_1 attends on pixels, A_2 on one Haar level,\n"
        "A_3 and A_4 on two; conv3x3 of all four, and the block's input added. A: softmax(q (k + r)^T / sqrt(c)) v in\n"
        "blocks of 8x8 queries and 10x10 keys, r a learned position of row and column, zeros beyond the border."
    ),
    parameters={"m2trans x2": 3_613_144, "m2trans x3": 3_633_944, "m2trans": 3_629_784},
    authors=(
        "Code and weights for x2, x3 and x4 (github.com/eezkni/M2Trans), MIT by the read-me of that repository; "
        "nothing is stated for the weights apart."
    ),
    claims=(
        "Network and inference equal the released ones, and so do parameters (3.61, 3.63, 3.63 M) and the paper's "
        "FLOPs, which are multiply-adds of the layers for a result of 384x384 without attention products "
        "(true: 47.9, 22.2, 13.6 GFLOPs).",
        "PSNR, SSIM, FSIM and GMSD of tables I and II need the authors' weights (medsr weights pull m2trans-x4-us) and "
        "their test images (CCA-US, US-CASE, MMUS1K), none of which are here.",
        "The gain from the image-text loss cannot be shown: the released script evaluates that loss without "
        "gradients, so that it trains by L1 alone, and which of both made the weights is not known.",
    ),
)

USCYCLEGAN = Arch(
    id="uscyclegan",
    kind="network",
    title="Self-supervised CycleGAN for ultrasound",
    paper="H. Liu et al., Neural Computing and Applications 35, 2021, doi 10.1007/s00521-020-05687-9",
    licence="as medsr; written from the paper and its published facts, no code of the authors",
    scales=(2, 3, 4),
    channels=(3,),
    module="medsr_cli.networks.uscyclegan",
    network="Generator",
    config="GeneratorConfig",
    smallest=16,
    degradation="bicubic-antialiased",
    full_scale=True,
    enlarged_first=True,
    tiling="exact",
    bytes_per_pixel=1_600,
    needs=("training on the image",),
    variants={"uscyclegan": {"in_channels": 3, "width1": 32, "width2": 32, "width3": 64}},
    keys=("encoder1.conv.0.weight", "decoder3_3.conv.0.weight", "final_conv.weight"),
    loose_fields=("negative_slope", "scale"),
    summary=(
        "Works at the size of the result, on x, the image enlarged by bicubic. Encoders (two 3x3 convolutions) in a\n"
        "row, a1 = E(x), a2 = E(a1), a3 = E(a2) of 32, 32 and 64 channels; decoders (a transposed and an ordinary 3x3\n"
        "convolution), d1 = D(a1), d2 = D(D(a2)), d3 = D(D(D(a3))). r_k = P(d_k) + x with one shared convolution P;\n"
        "y = clamp(tanh(conv([r1, r2, r3])), 0, 1). Leaky ReLU after every layer of slope 1 as released (so that G is\n"
        "affine up to the tanh) or 0.01 (preset paper). Trained on the image itself, with a counterpart F the\n"
        "other way round, two discriminators, cycle, pixel and VGG-19 losses; the result is the median of 8\n"
        "orientations, back-projected onto the input."
    ),
    parameters={"uscyclegan": 260_729, "F (in training only)": 12_300_280, "each discriminator": 6_962_369},
    authors="Code (github.com/hengliusky/UltraSound_SSSR), licence not stated. No weights: training is per image.",
    claims=(
        "The networks, the resizing and the inference equal the released ones; 260,729 parameters (1.04 MB) agree with "
        "the 1.1 MB of the paper.",
        "The tables (CCA-US and US-CASE, x4) cannot be checked: the images are not here, no weights exist, each image "
        "is trained anew from random weights, and the release has no program that computes the figures.",
        "Paper and release differ in loss weights, adversarial loss and learning rate: preset released follows the "
        "code, preset paper the text.",
        "Scales 2 and 3 are trained in the same way; the authors report none.",
    ),
)

VGG19 = Arch(
    id="vgg19",
    kind="perceptual",
    title="VGG-19 (activations for perceptual losses)",
    paper="K. Simonyan, A. Zisserman, ICLR 2015, arXiv 1409.1556",
    licence="as medsr; written from the paper",
    scales=(),
    channels=(3,),
    module="medsr_cli.networks.vgg",
    network="Vgg19Features",
    config="VggConfig",
    variants={"vgg19": {"width": 64, "last": "conv5_4"}},
    keys=("features.0.weight", "features.2.weight"),
    summary=(
        "The 16 convolutions of configuration E: 3x3, zero padding, ReLU after each, 2x2 maximum pooling after the\n"
        "2nd, 4th, 8th, 12th and 16th; 64, 128, 256, 512 and 512 channels. Losses compare conv2_2 (MIASSR, VGG22),\n"
        "conv5_4 (VGG54), relu5_4 (MS-GAN) or pool4 (ultrasound CycleGAN) of a result and its target."
    ),
    parameters={"vgg19": 20_024_384},
    authors=(
        "torchvision publishes weights trained on ImageNet (vgg19-dcbb9e9d.pth); its code is BSD-3-Clause, a licence "
        "of the weights is not stated."
    ),
    claims=("It enlarges nothing. Losses that compare its activations need a copy of these weights on this machine.",),
)

_COHFT_SIZES: dict[str, int] = {"rrdb_per_stage": 5, "heads": 4, "window": 6, "patch": 5}

COHFT = Arch(
    id="cohft",
    kind="network",
    title="Cohf-T (T2 guided by T1), as the paper has it",
    paper="C. Fang et al., ACM Multimedia 2022, doi 10.1145/3503161.3547804, arXiv 2203.15314",
    licence="as medsr; written from the paper, no code of the authors",
    scales=(2, 3, 4),
    channels=(1,),
    family="cohft",
    module="medsr_cli.networks.cohft",
    network="Cohft",
    config="CohftConfig",
    variants={
        "cohft-s": {"stages": 2, "rdbs": 2, "convs": 3, "feature_dim": 16, "growth": 16, **_COHFT_SIZES},
        "cohft-m": {"stages": 3, "rdbs": 3, "convs": 3, "feature_dim": 16, "growth": 16, **_COHFT_SIZES},
        "cohft-l": {"stages": 4, "rdbs": 3, "convs": 5, "feature_dim": 32, "growth": 32, **_COHFT_SIZES},
    },
    size_multiple=30,
    degradation="fourier",
    bytes_per_pixel=48_000,
    working_bytes={
        **{"cohft-s x2": 5_600, "cohft-s x3": 13_500, "cohft-s": 24_000},
        **{"cohft-m x2": 6_000, "cohft-m x3": 13_500, "cohft-m": 24_000},
        **{"cohft-l x2": 12_500, "cohft-l x3": 27_500, "cohft-l": 48_000},
    },
    tiling="inexact",
    needs=("guide",),
    trainable=True,
    keys=("stages.0.inter_modality.attention.to_q.weight", "guide_gate.0.weight"),
    repeats=("stages", "rrdb_per_stage", "rdbs", "convs"),
    loose_fields=("window",),
    summary=(
        "A stream F of RRDBs works on the T2 image, a branch P of transformers on its gradient map\n"
        "sqrt(v² + h² + 1e-6) (central differences), guided by features F_c of the gradient map of T1. Each stage:\n"
        "E = RRDBs(F), e = conv(E), F_s = conv([P, e]) through attention in compact and in strided windows of 6 x 6\n"
        "pixels, P = attention of 5 x 5 patches of F_s to AdaIN(F_s, F_c), F = E + sigmoid(conv(e)) * P. Every\n"
        "attention adds correlations between its heads at each token. Both are enlarged by sub-pixel convolution: the\n"
        "branch gives the gradient map of the result, an RRDB over both the image. Loss: MSE and SSIM of both."
    ),
    parameters={"cohft-s": 1_569_672, "cohft-m": 2_533_275, "cohft-l": 19_212_782},
    authors=(
        "Code of another structure (github.com/langlang3/sr_mri, L only; see cohft-released), licence not stated. "
        "No weights of the network of the text."
    ),
    claims=(
        "The network of the text, its degradation and its training are here in the sizes S, M and L, for any image "
        "size.",
        "Table 1 (BraTS2018 and IXI) cannot be reproduced: no weights of this structure were published and the data "
        "are not here; a network trained on other data shows what the method does, not those figures.",
        "The 152.106 M parameters of the paper's L are reached by no reading of its text: windows whose pixels are "
        "tokens give 19.2 M, whole windows as tokens 98 M (released, windows of 5) or 164 M (windows of 6).",
        "What the text leaves open (norms, MLPs, AdaIN, position encoding, sizes of the output gate) was decided here.",
    ),
)

_COHFT_RELEASED_SIZES: dict[str, int] = {
    "stages": 4,
    "feature_dim": 32,
    "growth": 32,
    "rrdbs": 23,
    "rdbs": 3,
    "convs": 5,
    "heads": 4,
    "window": 5,
    "patch": 5,
}

COHFT_RELEASED = Arch(
    id="cohft-released",
    kind="network",
    title="Cohf-T as the authors' weights have it (one fixed size)",
    paper="C. Fang et al., ACM Multimedia 2022, doi 10.1145/3503161.3547804, arXiv 2203.15314",
    licence="as medsr; written from the paper and its published facts, no code of the authors",
    scales=(2, 3, 4),
    channels=(1,),
    family="cohft",
    module="medsr_cli.networks.cohft_released",
    network="ReleasedCohft",
    config="ReleasedCohftConfig",
    degradation="fourier",
    variants={"cohft-released": _COHFT_RELEASED_SIZES},
    warning="The authors' Cohf-T weights for BraTS take channels 0 and 2 of the Decathlon's Task01 for T1 and T2, "
    "which that set's own documentation calls FLAIR and contrast-enhanced T1: they may not be for T2 guided by T1.",
    tiling="fixed",
    bytes_per_pixel=67_000,
    needs=("guide",),
    trainable=True,
    keys=("sam1.x_pos_embedding", "t1_fea_conv.0.weight"),
    repeats=("rrdbs", "rdbs", "convs"),
    loose_fields=("heads",),
    summary=(
        "Cohf-T as the released code computes it, for T2 of 120, 80 or 60 pixels a side (x2, x3, x4), T1 of 240.\n"
        "Unlike the text: T1 enters with its intensities; whole windows of 5 x 5 pixels are tokens (800 values) with\n"
        "learned positions, and are laid back in another order than they were cut; A + γ softmax(A Aᵀ) A correlates\n"
        "the dimensions of all heads; layer norms are over rows and columns; 23 RRDBs; the first stage drops its\n"
        "result of the inter-modality attention and has the gate of the second; the third takes the second's gated\n"
        "output as its prior."
    ),
    parameters={
        "cohft-released": 97_920_164,
        "cohft-released x3": 100_047_844,
        "cohft-released x2": 106_597_924,
    },
    authors=(
        "Code (github.com/langlang3/sr_mri), licence not stated. Weights on Baidu only (pan.baidu.com/s/"
        "146XZ9rldjY2GjJ3lMZ69ZQ, extraction code IQ1W), licence not stated; fetch them by hand and use medsr weights "
        "import. Mind the contrasts: the loader takes channels 0 and 2 of the Decathlon's Task01 for T1 and T2, which "
        "by that set's own documentation are FLAIR and contrast-enhanced T1."
    ),
    claims=(
        "Loads the authors' state_dicts and equals their network within 2e-5 on networks of reduced width.",
        "Table 1 cannot be checked here: the weights are on Baidu only and were not seen by us, the data are not here.",
        "The paper gives 152.106 M parameters for L at x4; the released code has 97.920 M.",
    ),
)

BICUBIC = Arch(
    id="bicubic",
    kind="baseline",
    title="Bicubic interpolation (a = -0.75)",
    paper="R. Keys, IEEE Trans. ASSP 29(6), 1981",
    licence="as medsr",
    scales=tuple(range(2, 9)),
    channels=(),
)

LANCZOS = Arch(
    id="lanczos",
    kind="baseline",
    title="Lanczos interpolation (three lobes)",
    paper="C. Duchon, J. Applied Meteorology 18(8), 1979",
    licence="as medsr",
    scales=tuple(range(2, 9)),
    channels=(),
)

SEGMENTATION = Arch(
    id="segmentation",
    kind="segmentation",
    title="Segmentation U-Net (losses and Dice of RDST)",
    paper="J. Zhu, G. Yang, P. Liò, arXiv 2302.11184 (2023); U-Net with the encoder of ResNet-34",
    licence="as medsr; written from the papers, no code of the authors",
    scales=(),
    channels=(1, 4),
    module="medsr_cli.networks.seg_unet",
    network="SegUnet",
    config="SegUnetConfig",
    variants={
        "segmentation": {"width": 64, "blocks": "3,4,6,3", "decoder": "256,128,64,32,16"},
        "segmentation-16": {"width": 16, "blocks": "3,4,6,3", "decoder": "64,32,16,8,4"},
    },
    size_multiple=32,
    trainable=True,
    keys=("encoder.layer1.0.conv1.weight", "decoder.blocks.0.conv1.0.weight", "segmentation_head.0.weight"),
    summary=(
        "Encoder: E(1) 7x7 convolution, stride 2, BN, ReLU; E(2) 3x3 maximum pooling, 3 basic blocks of 64; E(3) to\n"
        "E(5) 4, 6 and 3 blocks of 128, 256 and 512, each halving the sides. Decoder: five times nearest-neighbour\n"
        "x2, the skip E(4), E(3), E(2), E(1) or none beside it, two 3x3 convolutions with BN and ReLU (256, 128, 64,\n"
        "32 and 16 channels: D); 3x3 convolution to the classes, 0 the background. RDST's second stage compares E(i),\n"
        "D or the soft Dice of labels of a result and its target. Trained with the Dice loss on images and labels.\n"
        "segmentation-16 is the same with a quarter of the channels [ours], for small machines."
    ),
    parameters={"segmentation": 24_430_532, "segmentation-16": 1_531_172},
    authors="One checkpoint for OASIS (loss/unet_oasis.pt in github.com/GinZhu/RDST), a licence is not stated.",
    claims=(
        "Features, logits and every loss on them equal the authors' by golden fixtures, with running and with batch "
        "statistics.",
        "The Dice scores of the paper are not here: they need its U-Nets and data (OASIS, BraTS, ACDC, COVID-19 CT).",
    ),
)

MEDCLIP = Arch(
    id="medclip",
    kind="perceptual",
    title="MedCLIP-ViT (image and text encoders for M2Trans' semantic loss)",
    paper="Z. Wang et al., EMNLP 2022, arXiv 2210.10163; Swin: arXiv 2103.14030; BERT: arXiv 1810.04805",
    licence="as medsr; written from the papers, no code of the authors",
    scales=(),
    channels=(3,),
    module="medsr_cli.networks.medclip",
    network="MedClip",
    config="MedClipConfig",
    variants={
        "medclip-vit": {"width": 96, "depths": "2,2,6,2", "heads": "3,6,12,24", "text_layers": 12, "text_width": 768}
    },
    keys=("vision_model.projection_head.weight", "text_model.projection_head.weight"),
    loose_fields=("text_heads",),
    summary=(
        "Image: Swin-tiny (patches of 4, windows of 7, 96 to 768 channels) on 224 x 224, mean of all tokens, linear\n"
        "to 512 without bias. Text: BERT of 12 layers on WordPiece tokens, mean of the hidden states 1, 2 and 12 over\n"
        "all tokens, linear to 512 without bias. Both are compared by their cosine."
    ),
    parameters={"medclip-vit": 136_025_466},
    authors="Weights (medclip-vit-pretrained.zip of github.com/RyanWangZf/MedCLIP), their licence not stated.",
    claims=("It enlarges nothing. The semantic loss needs these weights and BERT's vocabulary on this machine.",),
)

INCEPTION = Arch(
    id="inception",
    kind="perceptual",
    title="Inception-v3 (features for the Fréchet inception distance)",
    paper="C. Szegedy et al., CVPR 2016, arXiv 1512.00567; M. Heusel et al., NeurIPS 2017, arXiv 1706.08500",
    licence="as medsr; written from the papers",
    scales=(),
    channels=(3,),
    module="medsr_cli.networks.inception",
    network="Inception",
    config="InceptionConfig",
    variants={"inception": {"divisor": 1}},
    keys=("Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.conv.weight"),
    summary=(
        "Images resized to 299 x 299 (bilinear) and scaled to [-1, 1]; five convolutions, then blocks of parallel\n"
        "convolutions: three at 35 x 35, four at 17 x 17, two at 8 x 8 pixels; the mean of the last 2048 channels. As\n"
        "in TensorFlow's inception-2015-12-05: means of pooling leave out what lies beyond the border, and the last\n"
        "block pools by the maximum. The distance compares the Gaussians of two sets of features."
    ),
    parameters={"inception": 21_785_568},
    authors=(
        "TensorFlow's weights, converted by pytorch-fid (pt_inception-2015-12-05-6726825d.pth); its code is "
        "Apache-2.0, a licence of the weights is not stated."
    ),
    claims=("It enlarges nothing. FID is measured with a copy of these weights on this machine, or refused.",),
)

CATALOGUE: tuple[Arch, ...] = (
    RDST,
    MIASSR,
    MSGAN,
    MSGAN_DETECTOR,
    M2TRANS,
    USCYCLEGAN,
    VGG19,
    COHFT,
    COHFT_RELEASED,
    SEGMENTATION,
    MEDCLIP,
    INCEPTION,
    BICUBIC,
    LANCZOS,
)


def find(name: str) -> tuple[Arch, str | None]:
    """The method of a name, and the variant if the name is that of one alone (`rdst` is the method).

    Raises:
        ArgumentsError: there is no such method; the sentence lists those there are.
    """
    wanted = name.strip().lower()
    for arch in CATALOGUE:
        if arch.id == wanted:
            return arch, None
    for arch in CATALOGUE:
        if wanted in arch.variants:
            return arch, wanted
    known = names()
    near = get_close_matches(wanted, known, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    msg = f"There is no method called {name!r}."
    raise ArgumentsError(msg, f"{hint}There are: {', '.join(known)}.")


def names() -> list[str]:
    """Every name that `find` takes, methods before their variants."""
    listed: dict[str, None] = {}
    for arch in CATALOGUE:
        listed |= dict.fromkeys((arch.id, *arch.variants))
    return list(listed)


def named(name: str) -> list[Arch]:
    """The methods that a name stands for: one, or all of a family (`cohft`)."""
    arch, _ = find(name)
    return [other for other in CATALOGUE if other is arch or (arch.family and arch.family == other.family == arch.id)]


def detect(tensor_names: Collection[str]) -> list[Arch]:
    """The methods whose checkpoints have tensors of these names, in the catalogue's order."""
    return [arch for arch in CATALOGUE if arch.fits(tensor_names)]
