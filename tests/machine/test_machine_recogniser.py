"""The text recognisers against onnxruntime, what they read, and ONNX graphs in torch."""

from __future__ import annotations

import copy
import sys
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hpcm_scale.errors import UserError
from hpcm_scale.machine.extractor import packaged_file
from hpcm_scale.machine.onnx_graph import OnnxGraph
from hpcm_scale.machine.receivers import receiver
from hpcm_scale.machine.recogniser import NETWORKS

every_recogniser = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            "pp-ocrv4", marks=pytest.mark.skipif(sys.version_info >= (3, 13), reason="its package refuses it")
        ),
        "pp-ocrv6",
    ],
)

loaded = cache(receiver)


def line(text: str, height: int, size: int, width: int | None = None) -> Tensor:
    """Dark text on a light ground, (1, 3, height, W) in [0, 1]."""
    font = ImageFont.load_default(size=size)
    image = Image.new("RGB", (width or int(font.getlength(text)) + 16, height), (250, 245, 230))
    ImageDraw.Draw(image).text((8, height // 2), text, font=font, fill=(20, 20, 60), anchor="lm")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """onnxruntime's, of a graph."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.launch
@every_recogniser
def test_the_same_as_onnxruntime(name):
    """Both are compared with the network in float64: to 1e-5 of the largest value, or to four times the rounding error
    of the other one, which depends on the processor. Of the logits, since the softmax amplifies rounding errors."""
    extractor = loaded(name)
    exact_network = copy.deepcopy(extractor.network).double()
    model = onnx.load(packaged_file(name, *NETWORKS[name]))
    *_, softmax = extractor.network.find("Softmax")
    places = (extractor.values["backbone"], extractor.values["sequence"], softmax.inputs[0], softmax.output)
    for place in places[:-1]:
        model.graph.output.append(helper.make_tensor_value_info(place, TensorProto.FLOAT, None))
    theirs = session(model)
    text = line("Machine receivers read 24 pages, for 7.50 each", 48, 30)
    for width in (32, 100, 333, 640):
        x = torch.cat([text[..., :width], text[..., -width:]]) * 2 - 1
        *ours, classes = extractor.network(x, places)
        *expected, their_classes = map(torch.from_numpy, theirs.run(places, {"x": x.numpy()}))
        *exact, _ = exact_network(x.double(), places)
        for values in zip(ours, expected, exact, strict=True):
            errors = [(value - values[2]).abs().max() for value in values[:2]]
            assert max(errors) < max(1e-5 * values[2].abs().max(), 4 * min(errors))
        torch.testing.assert_close(classes, their_classes, atol=2e-4, rtol=0)


@every_recogniser
@pytest.mark.parametrize(
    ("text", "height", "size"),
    [
        ("Hello, machine receivers of 2026!", 48, 30),
        ("Total: 1,234.56 EUR", 72, 40),
        ("Total: 1,234.56 EUR", 32, 20),
        ("rate", 40, 26),
    ],
)
def test_reads_lines_of_several_heights(name, text, height, size):
    x = line(text, height, size)
    assert loaded(name).read(torch.cat([x, 1 - x])) == [text, text]


@every_recogniser
def test_a_higher_image_is_several_lines(name):
    lines = ["The first line", "and the second", "and the last"]
    x = torch.cat([line(text, 48, 30, width=400) for text in lines], dim=2)[:, :, :-6]
    assert loaded(name).read(x) == ["\n".join(lines)]
    alone = loaded(name)(line(lines[1], 48, 30, width=400))
    for layer, tokens in loaded(name)(x).items():
        assert tokens.shape[1] == 3 * 50
        torch.testing.assert_close(tokens[:, 50:100], alone[layer], atol=1e-4, rtol=1e-4)


@every_recogniser
def test_the_gradient_is_the_slope(name):
    """In float64, along one direction; with noise, as equal neighbours have no one maximum."""
    network = copy.deepcopy(loaded(name).network).double()
    outputs = (loaded(name).values["sequence"],)
    generator = torch.Generator().manual_seed(0)
    x = (2 * line("slope", 48, 30) - 1).double()
    noise, direction = torch.randn(2, *x.shape, generator=generator, dtype=torch.float64)
    weights = torch.randn(1, 1, 120, generator=generator, dtype=torch.float64)
    x = (x + 0.1 * noise).requires_grad_()

    def value(of: Tensor) -> Tensor:
        return (network(of, outputs)[0] * weights).sum()

    (gradient,) = torch.autograd.grad(value(x), x)
    with torch.no_grad():
        slope = (value(x + 1e-7 * direction) - value(x - 1e-7 * direction)) / 2e-7
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=0)


def test_the_packages_are_not_imported():
    assert loaded("pp-ocrv6").read(line("rate", 48, 30)) == ["rate"]
    assert not {"rapidocr", "rapidocr_onnxruntime", "cv2", "shapely"} & sys.modules.keys()


def graph(tmp_path, operation: str, *constants: np.ndarray, opset: int = 11, **attributes):
    """A file with one operation on `x`, which has four axes, and constants; and the same for onnxruntime."""
    names = ["x", *(f"constant.{i}" for i in range(len(constants)))]
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node(operation, names, ["y"], **attributes)],
            "one",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * 4)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(value, name) for name, value in zip(names[1:], constants, strict=True)],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    path = tmp_path / "one.onnx"
    onnx.save(model, path)
    return path, model


RANDOM = np.random.default_rng(0)
KERNEL = RANDOM.standard_normal((6, 2, 3, 2)).astype(np.float32)
KERNEL_OF_ALL = RANDOM.standard_normal((5, 4, 2, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("operation", "constants", "attributes"),
    [
        ("Conv", [KERNEL], {"kernel_shape": [3, 2], "group": 2, "strides": [2, 1], "pads": [1, 0, 2, 1]}),
        ("Conv", [KERNEL], {"kernel_shape": [3, 2], "group": 2, "dilations": [2, 1]}),
        ("Conv", [KERNEL], {"kernel_shape": [3, 2], "group": 2, "auto_pad": "SAME_UPPER"}),
        ("Conv", [KERNEL_OF_ALL], {"kernel_shape": [2, 3], "strides": [2, 2], "auto_pad": "SAME_LOWER"}),
        ("MaxPool", [], {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}),
        ("MaxPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1}),
        ("AveragePool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("AveragePool", [], {"kernel_shape": [3, 2], "strides": [3, 2], "count_include_pad": 1}),
        ("Softmax", [], {"axis": 2}),
        ("Softmax", [], {}),
        ("HardSigmoid", [], {}),
        ("ReduceMean", [], {"axes": [-1], "keepdims": 0}),
        ("ReduceMean", [], {"axes": [1, 2]}),
        ("Reshape", [np.array([0, -1, 3])], {}),
        ("Slice", [np.array([1, -3]), np.array([1000, -1]), np.array([2, 3])], {}),
        ("Slice", [np.array([0]), np.array([-2]), np.array([3]), np.array([2])], {}),
        ("Clip", [np.array(-0.5, np.float32)], {}),
        ("Unsqueeze", [], {"axes": [3, 0]}),
        ("GlobalAveragePool", [], {}),
    ],
)
def test_operations_are_those_of_onnxruntime(tmp_path, operation, constants, attributes):
    path, model = graph(tmp_path, operation, *constants, **attributes)
    x = torch.randn(2, 4, 9, 12, generator=torch.Generator().manual_seed(0))
    (ours,) = OnnxGraph(path, "this test")(x, ("y",))
    (theirs,) = session(model).run(None, {"x": x.numpy()})
    torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("operation", "details", "code"),
    [
        ("Tan", {}, "unsupported-onnx-operation"),
        ("Softmax", {"temperature": 2.0}, "unsupported-onnx-attributes"),
        ("Relu", {"opset": 13}, "unsupported-onnx-version"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path, operation, details, code):
    path, _ = graph(tmp_path, operation, **details)
    with pytest.raises(UserError) as error:
        OnnxGraph(path, "pp-ocrv9")
    assert error.value.code == code


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "one.onnx"
    path.write_bytes(b"no graph" * 100)
    with pytest.raises(UserError) as error:
        OnnxGraph(path, "pp-ocrv9")
    assert error.value.code == "damaged-onnx"
