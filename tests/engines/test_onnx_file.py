"""ONNX files from anywhere: what is refused, in words, and that nothing a file holds makes a traceback."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from google.protobuf.message import Message
from onnx import AttributeProto, ModelProto, TensorProto, helper, numpy_helper

from medsr_cli.engines import onnx_file
from medsr_cli.engines.onnx_file import checked_onnx, read_onnx
from medsr_cli.engines.onnx_runner import OnnxRunner
from medsr_cli.engines.traits import Traits, least_reach
from medsr_cli.errors import RunError, WeightsError
from medsr_cli.networks.checkpoint import config_of, entry_of
from medsr_cli.networks.miassr import Miassr, MiassrConfig
from medsr_cli.networks.msgan import MsGan, MsGanConfig
from medsr_cli.networks.uscyclegan import Generator, GeneratorConfig
from tests.engines.onnx_models import any_scale_model, metadata_of, nearest, traits_of, two_stage_model

MUTANTS = 2000


def checked(model: ModelProto) -> onnx_file.OnnxFile:
    return checked_onnx(model.SerializeToString(), "a.onnx")


def test_a_whole_file_tells_what_it_is(tmp_path):
    path = tmp_path / "nearest.onnx"
    path.write_bytes(nearest().SerializeToString())
    file = read_onnx(path)
    assert (file.arch.id, file.traits.scale, file.opset, file.precision) == ("rdst", 2, 20, "float32")
    assert (file.inputs, file.outputs, file.name) == (("image",), ("enlarged",), "nearest.onnx")
    assert file.own_scale((4.0, 4.0)) == (2.0, 2.0)
    assert file.metadata["modality"] == "mr"


def test_inputs_with_a_value_in_the_file_need_not_be_given():
    file = checked(any_scale_model())
    assert (file.inputs, file.optional_inputs) == (("image", "scale"), ("place",))
    assert file.own_scale((1.5, 2.5)) == (1.5, 2.5)
    assert checked(two_stage_model()).outputs == ("intermediate", "enlarged")


def outside(tensor: TensorProto) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def with_external_weight(model: ModelProto) -> None:
    outside(model.graph.initializer[0])


def with_external_path_alone(model: ModelProto) -> None:
    model.graph.initializer[0].external_data.add(key="location", value="x")


def constant(tensor: TensorProto) -> AttributeProto:
    attribute = helper.make_attribute("value", tensor)
    outside(attribute.t)
    return attribute


def with_external_attribute(model: ModelProto) -> None:
    node = model.graph.node.add(op_type="Constant", output=["unused"])
    node.attribute.append(constant(numpy_helper.from_array(np.ones(3, np.float32), "c")))


def with_external_in_subgraph(model: ModelProto) -> None:
    inner = helper.make_graph([], "inner", [], [])
    node = inner.node.add(op_type="Constant", output=["unused"])
    node.attribute.append(constant(numpy_helper.from_array(np.ones(3, np.float32), "c")))
    branch = model.graph.node.add(op_type="If", input=["image"], output=["u"])
    branch.attribute.append(helper.make_attribute("then_branch", inner))


def with_sparse(model: ModelProto) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "s")
    outside(values)
    model.graph.sparse_initializer.add(values=values, indices=numpy_helper.from_array(np.zeros(1, np.int64)), dims=[9])


def with_sparse_attribute(model: ModelProto) -> None:
    attribute = model.graph.node[0].attribute.add(name="x", type=AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.dims.append(9)


def with_domain(model: ModelProto) -> None:
    model.opset_import.add(domain="com.microsoft", version=1)


def with_domain_of_node(model: ModelProto) -> None:
    model.graph.node[0].domain = "evil.custom"


def with_function(model: ModelProto) -> None:
    model.functions.add(name="Conv", domain="", input=["x"], output=["y"])


def with_loop(model: ModelProto) -> None:
    model.graph.node.add(op_type="Loop", output=["u"])


def with_random(model: ModelProto) -> None:
    model.graph.node.add(op_type="RandomNormal", output=["u"])


def with_nan(model: ModelProto) -> None:
    weight = np.ones((4, 1, 1, 1), np.float32)
    weight[2] = np.nan
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "weight"))


def with_short_tensor(model: ModelProto) -> None:
    model.graph.initializer[0].dims[0] = 2**40


def with_negative_side(model: ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -4


def with_strings(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(["a"], object), "text"))


def with_other_input(model: ModelProto) -> None:
    model.graph.input[0].name = "picture"


def with_more_input(model: ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("patient", TensorProto.FLOAT, [1]))


def with_other_rank(model: ModelProto) -> None:
    del model.graph.input[0].type.tensor_type.shape.dim[0]


def with_other_type(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE


def with_fixed_rows(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 64


def with_colours(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3


def with_other_output(model: ModelProto) -> None:
    model.graph.output[0].name = "wide"


def with_old_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 9
    set_metadata(model, "medsr.opset", "9")


def with_new_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 99


def with_two_opsets(model: ModelProto) -> None:
    model.opset_import.add(domain="ai.onnx", version=18)


def with_unknown_operator(model: ModelProto) -> None:
    model.graph.node[0].op_type = "Convolve"


def with_cycle(model: ModelProto) -> None:
    model.graph.node[0].input[0] = "enlarged"


def with_key_twice(model: ModelProto) -> None:
    model.metadata_props.add(key="modality", value="ct")


def set_metadata(model: ModelProto, key: str, value: str) -> None:
    next(entry for entry in model.metadata_props if entry.key == key).value = value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_external_weight, "outside the file"),
        (with_external_path_alone, "outside the file"),
        (with_external_attribute, "outside the file"),
        (with_external_in_subgraph, "outside the file"),
        (with_sparse, "sparse"),
        (with_sparse_attribute, "sparse"),
        (with_domain, "'com.microsoft'"),
        (with_domain_of_node, "'evil.custom'"),
        (with_function, "functions"),
        (with_loop, "Loop"),
        (with_random, "RandomNormal"),
        (with_nan, "NaN"),
        (with_short_tensor, "values of its shape"),
        (with_negative_side, "negative"),
        (with_strings, "type"),
        (with_other_input, "'picture'"),
        (with_more_input, "'patient'"),
        (with_other_rank, "3 axes instead of 4"),
        (with_other_type, "not of the type"),
        (with_fixed_rows, "any x 1 x 64 x any"),
        (with_colours, "any x 3 x any x any"),
        (with_other_output, "outputs"),
        (with_old_opset, "opset 9"),
        (with_new_opset, "opset 99"),
        (with_two_opsets, "one version"),
        (with_unknown_operator, "not a valid ONNX model"),
        (with_cycle, "not a valid ONNX model"),
        (with_key_twice, "'modality' twice"),
    ],
)
def test_refused_with_the_reason(change, words):
    model = nearest()
    change(model)
    with pytest.raises(WeightsError, match=r"a\.onnx") as caught:
        checked(model)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("medsr.format", "2", "format '2'"),
        ("medsr.method", "srgan", "'srgan'"),
        ("medsr.method", "vgg19", "does not enlarge"),
        ("medsr.config", "[]", "configuration"),
        ("medsr.config", '{"scale": {}}', "configuration"),
        ("medsr.traits", "{", "traits"),
        ("medsr.traits", "[" * 100_000, "traits"),
        ("medsr.traits", "{}", "traits"),
        ("medsr.precision", "int4", "'int4'"),
        ("medsr.opset", "19", "'19'"),
        *(
            ("medsr.traits", json.dumps(traits_of("rdst", **{name: wrong})), name)
            for name, wrong in [
                ("scale", 0),
                ("scale", 10**9),
                ("scale", True),
                ("scale", "2"),
                ("channels", 17),
                ("reach", -1),
                ("tiling", "exact"),
                ("guided", True),
                ("any_scale", True),
                ("first_stage", 2),
                ("enlarged_first", True),
                ("more", 1),
            ]
        ),
        ("medsr.traits", json.dumps(traits_of("rdst", rounding="up")), "rounding"),
        ("medsr.traits", json.dumps(traits_of("rdst", side=64)), "contradict"),
    ],
)
def test_metadata_that_make_no_sense_are_refused(key, value, words):
    model = nearest()
    set_metadata(model, key, value)
    with pytest.raises(WeightsError) as caught:
        checked(model)
    assert words in str(caught.value)


@pytest.mark.parametrize("key", ["medsr.format", "medsr.method", "medsr.config", "medsr.traits", "medsr.opset"])
def test_a_file_of_somebody_else_is_told_to_be_exported(key):
    model = nearest()
    helper.set_model_props(model, {name: text for name, text in metadata_of().items() if name != key})
    with pytest.raises(WeightsError, match=f"lack {key}.*medsr export"):
        checked(model)


@pytest.mark.parametrize("data", [b"", b"\0" * 64, b"<html>not found</html>", b"\x80\x02", b"PK\x03\x04" + b"x" * 99])
def test_what_is_no_onnx_file_is_said_to_be_none(data):
    with pytest.raises(WeightsError, match="not an ONNX file"):
        checked_onnx(data, "a.onnx")


def test_a_huge_file_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "huge.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)  # without taking room on the disk
    monkeypatch.setattr(type(path), "read_bytes", lambda _: pytest.fail("it was read"))
    with pytest.raises(WeightsError, match="2147483648 bytes"):
        read_onnx(path)
    with pytest.raises(WeightsError, match="cannot be read"):
        read_onnx(tmp_path / "missing.onnx")


def test_graphs_in_graphs_end_somewhere():
    inner = helper.make_graph([helper.make_node("Identity", ["image"], ["x"])], "g", [], [])
    for _ in range(12):
        node = helper.make_node("If", ["image"], ["y"], then_branch=inner, else_branch=inner)
        inner = helper.make_graph([node], "g", [], [])
    model = nearest()
    model.graph.node.extend(inner.node)
    with pytest.raises(WeightsError, match="deep"):
        checked(model)


def mutants(whole: bytes) -> list[bytes]:
    """Bits turned, parts cut out, doubled, overwritten; half of them in the first third, where the structure is."""
    dice = random.Random(7)  # noqa: S311 - the same mutants each time
    found = []
    for number in range(MUTANTS):
        data = bytearray(whole)
        for _ in range(dice.choice((1, 1, 2, 5))):
            place = dice.randrange(max(len(data) // (3 if number % 2 else 1), 1))
            match dice.randrange(5):
                case 0:
                    data[place : place + 1] = bytes(byte ^ 1 << dice.randrange(8) for byte in data[place : place + 1])
                case 1:
                    data[place : place + 1] = bytes([dice.choice((0, 0x7F, 0x80, 0xFF, dice.randrange(256)))])
                case 2:
                    del data[place : place + dice.randrange(1, 9)]
                case 3:
                    data[place:place] = data[max(place - 8, 0) : place]
                case _:
                    del data[max(place, 2) :]
        found.append(bytes(data))
    return found


@pytest.mark.parametrize("maker", [nearest, any_scale_model])
def test_no_mutant_makes_a_traceback(maker):
    refused = 0
    for data in mutants(maker().SerializeToString()):
        try:
            file = checked_onnx(data, "mutant.onnx")
            runner = OnnxRunner(file, device="cpu", threads=1)
            if not file.traits.any_scale:
                runner.run(np.zeros((1, file.traits.channels, 6, 5), np.float32))
        except (WeightsError, RunError):
            refused += 1
    assert refused > MUTANTS // 4


def parts(message: Message) -> Iterator[Message]:
    """A message and all within it, but the metadata: without them nothing else would be looked at."""
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE and field.name != "metadata_props":
            for part in value if field.is_repeated else [value]:
                yield from parts(part)


def change_one_field(model: ModelProto, dice: random.Random) -> None:
    """Whatever protocol buffers allow: numbers, names and bytes of the wrong kind, parts doubled or left out."""
    message = dice.choice(list(parts(model)))
    field = dice.choice(message.DESCRIPTOR.fields)
    values = {
        field.CPPTYPE_STRING: [b"", b"\xff" * 16] if field.type == field.TYPE_BYTES else ["", "image", "wide", "Relu"],
        field.CPPTYPE_FLOAT: [float("nan")],
        field.CPPTYPE_ENUM: [0, 1],
    }.get(field.cpp_type, [-1, 0, 1, 3, 2**31 - 1])
    if field.is_repeated:
        listed = getattr(message, field.name)
        if len(listed) and dice.random() < 0.5:
            del listed[dice.randrange(len(listed))]
        elif field.type == field.TYPE_MESSAGE:
            listed.append(dice.choice(list(listed))) if len(listed) else listed.add()
        else:
            listed.append(dice.choice(values))
    elif field.type == field.TYPE_MESSAGE:
        getattr(message, field.name).SetInParent()
    else:
        setattr(message, field.name, dice.choice(values))


@pytest.mark.parametrize("maker", [nearest, two_stage_model])
def test_no_model_with_a_wrong_field_makes_a_traceback(maker):
    dice = random.Random(11)  # noqa: S311 - the same mutants each time
    ran = 0
    for _ in range(200):
        model = maker()
        for _ in range(dice.choice((1, 1, 2))):
            change_one_field(model, dice)
        try:
            OnnxRunner(checked(model), device="cpu", threads=1).run(np.zeros((1, 1, 6, 5), np.float32))
            ran += 1
        except (WeightsError, RunError):
            pass
    assert 20 < ran < 180


def test_reading_one_needs_no_pytorch():
    program = (
        "import sys\nfrom tests.engines.onnx_models import nearest\n"
        "from medsr_cli.engines.onnx_file import checked_onnx\n"
        "assert checked_onnx(nearest().SerializeToString(), 'a').traits.scale == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("net", [
    Miassr(MiassrConfig(n_blocks=3, n_feats=8, hidden=8, kernel=5)), MsGan(MsGanConfig(n_blocks=2, n_feats=8)),
    MsGan(MsGanConfig(n_blocks=3, n_feats=8, extractors=1)), Generator(GeneratorConfig(width1=4, width2=4, width3=4)),
])  # fmt: skip
def test_the_reach_of_a_configuration_is_that_of_its_network(net):
    arch = entry_of(net)
    assert least_reach(arch, config_of(net)) == net.reach == Traits.of(arch, net).reach


def test_traits_that_would_make_tiles_wrong_are_not_believed():
    """Overlap and bytes are those of the catalogue, the reach at least that of the configuration."""
    model = nearest()
    honest = checked(model).traits
    for lie in ({"overlap": 0}, {"size_multiple": 3}, {"bytes_per_pixel": 1}):
        set_metadata(model, "medsr.traits", json.dumps(traits_of("rdst", **lie)))
        assert checked(model).traits == honest
    assert honest.overlap > 0
