"""Only a complete export of fimaq is opened; anything else gives one line that says what to do."""

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from small_onnx import small_onnx, written

from fimaq_core.errors import ModelError
from fimaq_core.export.opening import open_onnx

EXPORT = "export the checkpoint with `python -m tasks.TASK export`."


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as error:
        open_onnx(path)
    said = str(error.value)
    assert said.isprintable()
    assert len(said) < 600
    assert str(path) in said
    return said


def test_an_export_is_opened(tmp_path: Path) -> None:
    path = written(small_onnx(), tmp_path / "model.onnx")
    file = open_onnx(path)
    content = path.read_bytes()
    assert (file.path, file.bytes) == (path, len(content))
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    assert file.facts.class_names == ["one", "two", "three"]
    assert [layer.name for layer in file.facts.layers] == ["patch", "fc", "head"]
    assert file.model == small_onnx()


def test_unknown_fields_do_not_reach_the_runtime(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(small_onnx().SerializeToString() + b"\xca\x3e\x03abc")  # field 1001
    assert open_onnx(path).model.SerializeToString() == small_onnx().SerializeToString()


# Metadata


def no_metadata(model: ModelProto) -> None:
    del model.metadata_props[:]


def metadata_twice(model: ModelProto) -> None:
    model.metadata_props.append(model.metadata_props[0])


def not_json(model: ModelProto) -> None:
    model.metadata_props[0].value = "{"


def unknown_key(model: ModelProto) -> None:
    model.metadata_props[0].value = model.metadata_props[0].value.replace('"part"', '"parts"')


def other_format(model: ModelProto) -> None:
    model.metadata_props[0].value = model.metadata_props[0].value.replace(
        '"format":1', '"format":2'
    )


def other_recipe(model: ModelProto) -> None:
    model.metadata_props[0].value = model.metadata_props[0].value.replace(
        '"w_bits":4', '"w_bits":3'
    )


# Tensors


def external(place: str) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=place)

    return change


def external_constant(model: ModelProto) -> None:
    tensor = TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[1])
    tensor.external_data.add(key="location", value="weights")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=tensor))


def dims(*sizes: int) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        model.graph.initializer[0].dims[:] = sizes

    return change


def kind(number: int) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        model.graph.initializer[0].data_type = number

    return change


def sparse(model: ModelProto) -> None:
    one = numpy_helper.from_array(np.ones(1, np.float32), "s")
    where = numpy_helper.from_array(np.zeros(1, np.int64), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(one, where, [10**15]))


# Operators


def operator(domain: str, name: str) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        model.graph.node.append(helper.make_node(name, ["logits"], ["x"], domain=domain))

    return change


def other_domain(model: ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def branch(model: ModelProto) -> None:
    inner = helper.make_graph([helper.make_node("Identity", ["logits"], ["y"])], "inner", [], [])
    model.graph.node.append(helper.make_node("If", ["first"], ["x"], then_branch=inner))


def function(model: ModelProto) -> None:
    node = helper.make_node("Identity", ["a"], ["b"])
    model.functions.append(
        helper.make_function("", "Relu", ["a"], ["b"], [node], list(model.opset_import))
    )


def training(model: ModelProto) -> None:
    model.training_info.add()


def versions(operators: int, file: int) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        model.opset_import[0].version, model.ir_version = operators, file

    return change


def unconnected(model: ModelProto) -> None:
    model.graph.node[3].input[0] = "nothing"


# Input and outputs


def port(which: str, **changes: Any) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        (old,) = getattr(model.graph, which)
        kind = changes.get("kind", TensorProto.FLOAT)
        sizes = changes.get("sizes", ("batch", 3, 4, 4))
        old.CopyFrom(helper.make_tensor_value_info(old.name, kind, sizes))

    return change


def sequence(model: ModelProto) -> None:
    value = helper.make_tensor_sequence_value_info("logits", TensorProto.FLOAT, None)
    model.graph.output[0].CopyFrom(value)


def second_input(model: ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["batch"]))


UNLIKE = "has an input that its metadata do not describe"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (no_metadata, "is not an export of fimaq: " + EXPORT),
        (metadata_twice, "is not an export of fimaq: " + EXPORT),
        (not_json, "is not valid JSON"),
        (unknown_key, "Unknown key 'parts'. Did you mean 'part'?"),
        (other_format, "format: Input should be 1"),
        (other_recipe, "another recipe_digest than its recipe has"),
        (external("/etc/passwd"), "keeps the values of 'patch.weight' in another file"),
        (external("../../weights"), "keeps the values of 'patch.weight' in another file"),
        (external("weights"), "keeps the values of 'patch.weight' in another file"),
        (external_constant, "keeps the values of 'c' in another file"),
        (dims(2**62), "'patch.weight' with another number of values than it states"),
        (dims(2**40, 2**40), "'patch.weight' with another number of values than it states"),
        (dims(2, 3, 2, 1), "'patch.weight' with another number of values than it states"),
        (dims(2, -3, -2, 2), "'patch.weight' with dimensions that cannot be"),
        (dims(*[1] * 17), "'patch.weight' with dimensions that cannot be"),
        (kind(TensorProto.STRING), "'patch.weight' of a type that an export does not have"),
        (kind(10**6), "'patch.weight' of a type that an export does not have"),
        (sparse, "has sparse tensors"),
        (operator("com.evil", "Run"), "has the custom operator 'com.evil.Run'"),
        (operator("com.microsoft", "Gelu"), "has the custom operator 'com.microsoft.Gelu'"),
        (operator("", "Run\x1b[31m"), r"has the operator 'Run\x1b[31m', which is not standard"),
        (other_domain, "needs operators of 'com.microsoft', which are not standard"),
        (branch, "has an inner graph (If, Loop, Scan)"),
        (function, "has functions of its own"),
        (training, "has training steps"),
        (versions(20, 10), "does not state one version of operators from 21 on"),
        (versions(99, 10), "update it with pip install -U onnx onnxruntime."),
        (versions(21, 99), "update it with pip install -U onnx onnxruntime."),
        (unconnected, "is not valid ONNX ("),
        (port("input", kind=TensorProto.UINT8), UNLIKE),
        (port("input", sizes=("batch", 16)), UNLIKE),
        (port("input", sizes=(2, 3, 4, 4)), UNLIKE),
        (port("input", sizes=("batch", 3, 0, 4)), "'images' with dimensions that cannot be"),
        (port("input", sizes=("batch", 3, 10**9, 10**9)), "takes more than 67,108,864 numbers"),
        (second_input, "does not have one input and at least one output"),
        (port("output", kind=TensorProto.INT64), "has outputs that are not float32"),
        (port("output"), "has no outputs per image, but its metadata name 3 classes"),
        (sequence, "has 'logits', which is no tensor"),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, change: Callable[[ModelProto], None], said: str
) -> None:
    model = small_onnx()
    change(model)
    assert said in refused(written(model, tmp_path / "model.onnx"))


def test_another_number_of_classes(tmp_path: Path) -> None:
    path = written(small_onnx(class_names=["one", "two"]), tmp_path / "model.onnx")
    wanted = "has 3 outputs per image, but its metadata name 2 classes: " + EXPORT
    assert wanted in refused(path)


@pytest.mark.parametrize(
    ("part", "normalised", "port", "fits"),
    [
        ("text", True, "int64[batch, 7]", True),
        ("text", True, "float[batch, 3, 4, 4]", False),
        ("vision", True, "float[batch, 3, 4, 4]", True),
        ("vision", False, "uint8[batch, 4, 4, 3]", True),
        ("vision", False, "float[batch, 3, 4, 4]", False),
        ("detector", True, "float[batch, 3, h, w]", True),
        ("", True, "int64[batch, 7]", False),
    ],
)
def test_inputs_of_parts(
    tmp_path: Path, part: str, normalised: bool, port: str, fits: bool
) -> None:
    graph = f"""<ir_version: 10, opset_import: ["" : 21]>
        model ({port} x) => (float[batch, n] y) {{ flat = Flatten (x) y = Cast <to = 1> (flat) }}"""
    model = small_onnx(graph, part=part, normalised=normalised, class_names=None)
    path = written(model, tmp_path / "model.onnx")
    if fits:
        assert open_onnx(path).facts.part == part
    else:
        assert UNLIKE in refused(path)


# Bytes


@pytest.mark.parametrize("kept", [0, 1, 2, 100, 1000, -1])
def test_parts_of_a_file(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(small_onnx().SerializeToString()[:kept])
    said = refused(path)
    assert "is damaged" in said or "is not an export of fimaq" in said


def test_other_content(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("<html>Not found</html>", encoding="utf-8")
    assert "is damaged or no ONNX file: copy or export it again." in refused(path)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(small_onnx().SerializeToString().replace(b"tokens", b"\xff\xfeken\xc0"))
    assert "is damaged (a text is not UTF-8)" in refused(path)


def test_more_than_weights(tmp_path: Path) -> None:
    model = small_onnx()
    model.graph.doc_string = "x" * 2**24
    path = written(model, tmp_path / "model.onnx")
    assert "has more than 16,777,216 bytes beside its weights" in refused(path)


def test_values_of_weights_do_not_count(tmp_path: Path) -> None:
    model = small_onnx()
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(2**25, np.int8), "large"))
    assert open_onnx(written(model, tmp_path / "model.onnx")).bytes > 2**25


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "There is no file"),
        (lambda path: path.mkdir(), "it is a folder"),
        (os.mkfifo, "it is a pipe or a device"),
        (lambda path: path.symlink_to(path), "it is a link that leads to itself"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a pipe or a device"),
    ],
)
def test_no_regular_file(tmp_path: Path, make: Callable[[Path], None], said: str) -> None:
    path = tmp_path / "model.onnx"
    make(path)
    assert said in refused(path)


def test_a_file_beyond_protobuf(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.touch()
    os.truncate(path, 2**31)
    assert "it has 2,147,483,648 bytes; at most 2,147,483,647 are read" in refused(path)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(small_onnx(), tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelError, match=r"packages onnxruntime: .* pip install '.\[export\]'"):
        open_onnx(path)
