"""Exported models equal the original model in every runtime; damaged or foreign files raise clear errors."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from PIL import ExifTags, Image
from torch import nn

import conditional_detr.deploy.export as module
from conditional_detr import ConditionalDETR, Detector, Metadata, Preprocessing, optimize
from conditional_detr.data.synthetic import draw_image, image_index
from conditional_detr.deploy.export import export
from conditional_detr.inference import runtimes
from conditional_detr.inference.exported import Description, ExportedModel
from helpers.exports import OneTrace
from helpers.models import assert_same_detections, pixels_of, run_example
from helpers.models import differences as differences_of

ROOT = Path(__file__).parents[2]
FORMATS = (".pt2", ".onnx", ".xml")
TOP_K = 20
NAMES = (None, "cat", "dog", "bird", "fish", "horse", "ant")
# other batch and image sizes than in the trace, (2, 160, 224); at a stride of 16 the last feature map has one cell
SIZES = [(1, 97, 131), (3, 64, 200), (1, 12, 14)]
HALF = (0.02, 0.003)  # tolerance of logits and boxes in float16, which has 11 bits


def differences(exported, plain, size):
    return differences_of(exported, plain, pixels_of(*size))


@pytest.fixture(scope="module")
def plain(least):
    """A model whose parts differ, with an unused row in its class head and no default preprocessing."""
    model = ConditionalDETR.from_pretrained(least)
    model.class_head.bias.data[0] += 3  # so that the unused row has high scores
    preprocessing = Preprocessing(96, 160, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    model.metadata = Metadata(NAMES, (0, 3, 5, 7, 9, 11, 13), preprocessing)
    return model


@pytest.fixture(scope="module")
def shapes():
    return ConditionalDETR.from_pretrained("shapes")


class Exports:
    """Exported models that several tests share, each exported on first use, with their descriptions."""

    def __init__(self, folder, models, photograph, written):
        self.folder, self.models, self.photograph, self.trace = folder, models, photograph, OneTrace()
        self.written = {(*key, None, torch.float32): (path, None) for key, path in written.items()}

    def __call__(self, name, suffix, *, top_k=None, dtype=torch.float32):
        key = (name, suffix, top_k, dtype)
        if key not in self.written:
            path = self.folder / f"{name}-{top_k}-{str(dtype)[6:]}{suffix}"
            image = self.photograph if suffix == ".onnx" else None
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "trace", self.trace)
                description = export(self.models[name], path, top_k=top_k, dtype=dtype, image=image)
            self.written[key] = path, description
        return self.written[key]


@pytest.fixture(scope="module")
def exports(tmp_path_factory, plain, shapes, photograph, shapes_onnx):
    models, written = {"tiny": plain, "shapes": shapes}, {("shapes", ".onnx"): shapes_onnx}
    return Exports(tmp_path_factory.mktemp("exports"), models, photograph, written)


@pytest.fixture(scope="module", params=FORMATS)
def written(request, exports):
    """An exported model with post-processing in each format, and its description."""
    return exports("tiny", request.param, top_k=TOP_K)


@pytest.fixture
def path(written):
    return written[0]


@pytest.fixture(scope="module")
def exported(written):
    return ExportedModel(written[0])


FORKED = """
import multiprocessing, sys
import torch
from conditional_detr import ExportedModel
torch.set_num_threads(2)
models = [ExportedModel(path, threads=None if path.endswith(".pt2") else 2) for path in sys.argv[1:]]
def work():
    for model in models:
        assert model(torch.zeros(1, 3, 97, 131)).boxes.isfinite().all()
child = multiprocessing.get_context("fork").Process(target=work)
child.start()
child.join(60)
hangs = child.is_alive()
child.kill()
sys.exit("the child hangs" if hangs else child.exitcode)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems start processes without fork")
def test_a_process_that_has_opened_exported_models_can_be_forked(exports):
    """Each runtime has threads of its own, which a child does not have."""
    paths = [exports("tiny", suffix, top_k=TOP_K)[0] for suffix in FORMATS]
    command = [sys.executable, "-W", "ignore", "-c", FORKED, *map(str, paths)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("suffix", FORMATS)
def test_torchs_defaults_have_no_effect(plain, tmp_path, suffix):
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            description = export(plain, tmp_path / f"x{suffix}")
    finally:
        torch.set_default_dtype(torch.float32)
    assert max(parity.boxes for parity in description.parity) < 1e-5


def test_equals_the_plain_model_at_other_sizes_than_the_trace(exported, plain):
    for size in SIZES:
        logits, boxes = differences(exported, plain, size)
        assert logits < 1e-4
        assert boxes < 1e-5


def test_the_published_architecture(r50, tmp_path):
    plain = ConditionalDETR.from_pretrained(r50.folder)
    plain.metadata = replace(plain.metadata, preprocessing=Preprocessing(96, 160))
    export(plain, tmp_path / "r50.onnx")
    exported = ExportedModel(tmp_path / "r50.onnx")
    for size in [(1, 97, 131), (3, 64, 100)]:
        logits, boxes = differences(exported, plain, size)
        assert logits < 1e-4
        assert boxes < 1e-5


@pytest.mark.parametrize("name", ["model.ONNX", "model.XML", "model.Pt2"])
def test_a_suffix_may_be_in_capitals(name, plain, exports, tmp_path, monkeypatch):
    """The weights of an .XML are in a .bin in lower case, which OpenVINO looks for."""
    monkeypatch.setattr(module, "trace", exports.trace)
    description = export(plain, tmp_path / name)
    assert {file.name for file in tmp_path.iterdir()} == {name} | ({"model.bin"} if name == "model.XML" else set())
    exported = Detector.from_file(tmp_path / name).model
    assert exported.description == description
    assert max(differences(exported, plain, SIZES[0])) < 1e-4
    if name == "model.XML":
        assert len(runtimes.openvino_core().read_model(tmp_path / name).inputs) == 1


def test_the_model_is_not_changed(plain, exports):
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    module.trace(plain, dtype=torch.float16, top_k=TOP_K)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    assert all(parameter.requires_grad for parameter in plain.decoder.parameters())


def test_detections_on_photographs_are_the_plain_models(exported, plain, shared):
    images = sorted((shared / "data/coco/val2017").glob("*.jpg"))[:12]
    expected = Detector(plain)(images, threshold=0.3, batch_size=2)
    assert len({found.size for found in expected}) > 3
    assert sum(map(len, expected)) > 100
    for found, wanted in zip(Detector(exported)(images, threshold=0.3, batch_size=2), expected, strict=True):
        assert_same_detections(found, wanted, 0.3)
        assert set(zip(found.names, found.category_ids, strict=True)) <= set(
            zip(NAMES[1:], (3, 5, 7, 9, 11, 13), strict=True)
        )


def images_of_shapes():
    sizes = [(192, 256), (200, 150), (192, 256), (130, 260), (192, 256)]
    return [draw_image(0, image_index("demo", index), size=size)[0] for index, size in enumerate(sizes)]


def test_detections_of_trained_weights_are_equal(exports, shapes):
    path, _ = exports("shapes", ".onnx")
    images = images_of_shapes()
    expected = Detector(shapes)(images, batch_size=2)
    assert sum(map(len, expected)) > 10
    for found, wanted in zip(Detector.from_file(path)(images, batch_size=2), expected, strict=True):
        assert_same_detections(found, wanted, 0.5)


def run_without_library(path, pixels, sizes):
    """Return the outputs of a runtime by name, without this library."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        found = session.run(names, {"pixels": pixels.numpy(), "sizes": sizes.numpy()})
    elif path.suffix == ".xml":
        core = runtimes.openvino_core()  # one per process
        compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        result = compiled({"pixels": pixels.numpy(), "sizes": sizes.numpy()})
        names = [output.any_name for output in compiled.outputs]
        found = [result[name] for name in names]
    else:
        names = ["logits", "boxes", "corners", "scores", "labels"]
        with torch.no_grad():
            found = [x.numpy() for x in torch.export.load(path).module()(pixels, sizes)]
    return {name: torch.from_numpy(values) for name, values in zip(names, found, strict=True)}


def test_post_processing_in_the_file_is_the_detectors(path, plain, photograph):
    """Two images of different sizes that are resized to one size."""
    from conditional_detr.inference.images import open_image
    from conditional_detr.inference.preprocessing import to_pixels

    first = Image.open(photograph)
    images = [first, first.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((256, 192))]
    pixels = torch.stack([to_pixels(open_image(p, "image"), plain.metadata.preprocessing) for p in images])
    found = run_without_library(path, pixels, torch.tensor([[96, 128], [192, 256]]))
    assert [*found] == ["logits", "boxes", "corners", "scores", "labels"]
    assert found["corners"].shape == (2, TOP_K, 4)
    assert found["labels"].dtype == torch.int64
    for index, expected in enumerate(Detector(plain)(images, threshold=0, top_k=TOP_K)):
        assert (expected.scores.diff() < -1e-5).all()  # so that their order is certain
        assert found["labels"][index].tolist() == expected.labels.tolist()
        torch.testing.assert_close(found["scores"][index], expected.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(found["corners"][index], expected.boxes, rtol=0, atol=1e-2)
    # the row without a name has high scores, and is excluded
    assert (found["logits"][..., 0].sigmoid() > found["scores"].min()).any()
    assert 0 not in found["labels"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_half_precision_is_within_a_tolerance(suffix, exports, plain, shapes):
    name, model = ("shapes", shapes) if suffix == ".onnx" else ("tiny", plain)
    path, description = exports(name, suffix, dtype=torch.float16)
    exported = ExportedModel(path)
    for size in SIZES[:2]:
        found = differences(exported, model, size)
        assert found[0] < HALF[0]
        assert found[1] < HALF[1]
        assert found[0] > 1e-5  # it is in half precision
    assert description.precision == "float16"
    logits, boxes = module.TOLERANCES[torch.float16]
    assert all(one.logits <= logits and one.boxes <= boxes for one in description.parity)


def types_of(path) -> dict[str, set[str]]:
    """Return the dtypes of the first input of each operation type in an exported model."""
    found = defaultdict(set)
    if path.suffix == ".onnx":
        import onnx

        graph = onnx.load(path).graph
        types = {known.name: known.type.tensor_type.elem_type for known in [*graph.value_info, *graph.input]}
        types |= {constant.name: constant.data_type for constant in graph.initializer}
        for node in graph.node:
            found[node.op_type] |= {onnx.TensorProto.DataType.Name(types[name]).lower() for name in node.input[:1]}
    elif path.suffix == ".xml":
        for node in runtimes.openvino_core().read_model(path).get_ops():
            if node.get_input_size():
                kind = node.get_input_element_type(0).get_type_name()
                found[node.get_type_name()].add({"f16": "float16", "f32": "float"}.get(kind, kind))
    else:
        for node in torch.export.load(path).graph.nodes:
            first = node.args[0].meta.get("val") if node.args and hasattr(node.args[0], "meta") else None
            if node.op == "call_function" and isinstance(first, torch.Tensor):
                kind = str(first.dtype)[6:]
                found[node.target.__name__.split(".")[0]].add("float" if kind == "float32" else kind)
    return found


@pytest.mark.parametrize(
    ("suffix", "single", "half", "norm"),
    [
        (".onnx", ["Softmax", "Sin", "Cos", "Sigmoid", "CumSum"], ["Conv"], "LayerNormalization"),
        (".xml", ["Softmax", "Sin", "Cos", "Sigmoid", "CumSum"], ["Convolution"], "MVN"),
        # torch's attention computes softmax in float32 for every input dtype
        (".pt2", ["sin", "cos", "sigmoid", "cumsum"], ["conv2d", "scaled_dot_product_attention"], "layer_norm"),
    ],
)
def test_half_precision_keeps_sensitive_operations_in_float32(suffix, single, half, norm, exports):
    path, _ = exports("shapes" if suffix == ".onnx" else "tiny", suffix, dtype=torch.float16)
    types = types_of(path)
    assert {kind: types[kind] for kind in single} == {kind: {"float"} for kind in single}
    assert {kind: types[kind] for kind in half} == {kind: {"float16"} for kind in half}
    assert types[norm] == {"float", "float16"}, "those of the decoder and of the encoder"
    assert "float16" in types[{".onnx": "MatMul", ".xml": "MatMul", ".pt2": "linear"}[suffix]]
    assert types["Log"] | types["log"] <= {"float"}


def test_detections_of_trained_weights_are_similar_in_half_precision(exports, shapes):
    path, _ = exports("shapes", ".onnx", dtype=torch.float16)
    images = images_of_shapes()
    for found, wanted in zip(
        Detector.from_file(path)(images, threshold=0.4), Detector(shapes)(images, threshold=0.5), strict=True
    ):
        assert len(found.filter(threshold=0.5)) == pytest.approx(len(wanted), abs=1)
        for box, score, name in wanted:
            same = found.filter(classes=[name])
            distances = (same.boxes - torch.tensor(box)).abs().amax(dim=1)
            assert distances.min() < 1  # pixel
            assert same.scores[distances.argmin()] == pytest.approx(score, abs=0.02)


def test_description_of_an_exported_model(written, exported, plain, photograph):
    path, description = written
    assert exported.description == description
    assert exported.config == description.config == plain.config
    assert exported.metadata == description.metadata == plain.metadata
    assert (description.precision, description.top_k, description.measured) == ("float32", TOP_K, {})
    assert [(one.height, one.width) for one in description.parity] == [(96, 128), (49, 65)]
    assert all(0 < one.logits < 1e-4 and 0 < one.boxes < 1e-5 for one in description.parity)
    assert description.image == (str(photograph) if path.suffix == ".onnx" else "drawn")
    packages = {".onnx": {"onnx", "onnxscript", "onnxruntime"}, ".xml": {"openvino"}, ".pt2": set()}
    assert description.versions.keys() == {"conditional-detr", "torch"} | packages[path.suffix]
    assert description.versions["torch"] == version("torch")
    assert exported.device == torch.device("cpu")
    assert not exported.training
    assert [*exported.parameters()] == []


def test_other_programs_can_read_the_description(exports):
    import onnx

    path, _ = exports("tiny", ".onnx", top_k=TOP_K)
    properties = {one.key: one.value for one in onnx.load(path).metadata_props}
    read = json.loads(properties["conditional_detr"])["metadata"]
    assert read["class_names"] == [*NAMES]
    assert read["preprocessing"] == {
        "shortest_edge": 96,
        "longest_edge": 160,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.25],
        "resizing": "edges",
        "size": None,
    }


def test_axes_of_onnx_have_names(exports):
    import onnx

    graph = onnx.load(exports("tiny", ".onnx", top_k=TOP_K)[0]).graph
    axes = {one.name: [d.dim_param or d.dim_value for d in one.type.tensor_type.shape.dim] for one in graph.input}
    assert axes == {"pixels": ["batch", 3, "height", "width"], "sizes": ["batch", 2]}
    assert all(value.type.tensor_type.shape.dim[0].dim_param == "batch" for value in graph.output)


def test_top_k_is_at_most_the_number_of_scores(exports, plain):
    graph = module.Graph(plain, dtype=torch.float32, top_k=1000)
    *_, corners, scores, labels = graph(pixels_of(2, 64, 96), torch.tensor([[64, 96], [64, 96]]))
    assert corners.shape == (2, 11 * 6, 4)
    assert scores.shape == labels.shape == (2, 11 * 6)


@pytest.mark.parametrize("spoilt", ["other weights", "not finite"])
def test_wrong_outputs_are_not_written(spoilt, path, plain, tmp_path, monkeypatch):
    """The writer writes another model."""

    def wrong_writer(*_, **__):
        def write(draft, _):
            for part in path.parent.glob(f"{path.stem}.*"):
                if part.suffix in ({".xml", ".bin"} if path.suffix == ".xml" else {path.suffix}):
                    shutil.copy(part, draft.with_suffix(part.suffix))

        return write

    monkeypatch.setattr(module, "make_writer", wrong_writer)
    model = copy.deepcopy(plain)
    with torch.no_grad():
        model.class_head.bias[2] += 0.5 if spoilt == "other weights" else float("nan")
    target = tmp_path / f"model{path.suffix}"
    logits = "0.5" if spoilt == "other weights" else "nan"
    message = (
        rf"model\{path.suffix}: not written, its output differs from the model's: at 96 x 128, expected differences"
        rf" of logits and boxes of at most 0\.0001 and 1e-05, got {logits} and [\d.e-]+"
    )
    with pytest.raises(ValueError, match=message):
        export(model, target)
    assert [*tmp_path.iterdir()] == []
    if spoilt == "not finite":
        return
    for old in (target, target.with_suffix(".bin")):
        old.write_bytes(b"older")
    with pytest.raises(ValueError, match=message):
        export(model, target, overwrite=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == dict.fromkeys(
        (target.name, "model.bin"), b"older"
    )


class Mine(ConditionalDETR):
    """A subclass may change anything."""


def test_errors_of_export(plain, tmp_path):
    (tmp_path / "folder.onnx").mkdir()
    target = tmp_path / "model.pt2"
    endings = r"expected a file name that ends in one of \.onnx, \.xml, \.pt2"
    refusals = [
        (lambda: export(optimize(plain), target), ValueError, "model: expected a plain model, got an optimised copy"),
        (lambda: export(Mine(plain.config), target), TypeError, "expected a ConditionalDETR or DETR, got Mine"),
        (lambda: export(nn.Linear(2, 2), target), TypeError, "expected a ConditionalDETR or DETR, got Linear"),
        (lambda: export(plain, tmp_path / "model.trt"), ValueError, rf"model\.trt: {endings}"),
        (lambda: export(plain, tmp_path), ValueError, endings),
        (lambda: export(plain, tmp_path / "folder.onnx"), OSError, r"folder\.onnx: expected a file name, got a fol"),
        (lambda: export(plain, tmp_path / "none" / "model.pt2"), OSError, "none: no such folder"),
        (
            lambda: export(plain, target, dtype=torch.bfloat16),
            ValueError,
            r"dtype: expected one of torch\.float32",
        ),
        (lambda: export(plain, target, dtype="float16"), TypeError, "dtype: expected a torch.dtype, got 'float16'"),
        (lambda: export(plain, target, top_k=0), ValueError, "top_k: expected an int of at least 1, got 0"),
        (lambda: export(plain, target, image=tmp_path / "none.jpg"), OSError, r"none\.jpg: no such file"),
    ]
    for do, error, message in refusals:
        with pytest.raises(error, match=message):
            do()
    assert [file.name for file in tmp_path.iterdir()] == ["folder.onnx"]


@pytest.mark.parametrize(
    ("suffix", "missing", "extra"),
    [(".onnx", "onnxscript", "onnx"), (".onnx", "onnxruntime", "onnx"), (".xml", "openvino", "openvino")],
)
def test_missing_package_raises_before_any_work(suffix, missing, extra, plain, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    message = rf"model\{suffix}: needs {missing}, which is not installed: pip install 'conditional-detr\[{extra}\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        export(plain, tmp_path / f"model{suffix}")


@pytest.mark.parametrize(("suffix", "missing"), [(".onnx", "onnxruntime"), (".xml", "openvino")])
def test_missing_runtime_raises(suffix, missing, exports, monkeypatch):
    path, _ = exports("tiny", suffix, top_k=TOP_K)
    monkeypatch.setitem(sys.modules, missing, None)
    # as in a process without a core; the existing one must not be freed
    monkeypatch.setattr(runtimes, "_core", runtimes._core.__wrapped__)
    message = rf"{path.name}: needs {missing}, which is not installed: pip install 'conditional-detr\["
    with pytest.raises(ModuleNotFoundError, match=message):
        Detector.from_file(path)


DAMAGED = "damaged, or not supported by the installed runtime"


def test_errors_of_opening(path, tmp_path):
    suffix, content = path.suffix, path.read_bytes()
    target = tmp_path / f"model{suffix}"
    if suffix == ".xml":
        shutil.copy(path.with_suffix(".bin"), tmp_path / "model.bin")
    with pytest.raises(FileNotFoundError, match=rf"model\{suffix}: no such file"):
        ExportedModel(target)
    target.mkdir()
    with pytest.raises(FileNotFoundError, match=rf"model\{suffix}: expected a file, got a folder"):
        ExportedModel(target)
    target.rmdir()
    for damaged in (content[: len(content) // 2], np.random.default_rng(0).bytes(2000), b"some text\n", b""):
        target.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"model\{suffix}: {DAMAGED}: \S") as caught:
            ExportedModel(target)
        assert "Exception from" not in str(caught.value)  # a location in OpenVINO's source
        assert "\n" not in str(caught.value)


def test_openvino_needs_the_whole_bin(exports, tmp_path):
    path, _ = exports("tiny", ".xml", top_k=TOP_K)
    shutil.copy(path, tmp_path / "model.xml")
    with pytest.raises(FileNotFoundError, match=r"model\.bin: no such file; it contains the weights of model\.xml"):
        ExportedModel(tmp_path / "model.xml")
    weights = path.with_suffix(".bin").read_bytes()
    for length in (len(weights) // 2, len(weights) - 1):
        (tmp_path / "model.bin").write_bytes(weights[:length])
        message = rf"model\.bin: truncated: expected at least {len(weights)} bytes, got {length}"
        with pytest.raises(ValueError, match=message):
            ExportedModel(tmp_path / "model.xml")


@pytest.mark.parametrize(("suffix", "part"), [(".onnx", ".onnx"), (".xml", ".xml"), (".xml", ".bin")])
def test_a_flipped_bit_is_detected(suffix, part, exports, tmp_path):
    path, _ = exports("tiny", suffix, top_k=TOP_K)
    for file in path.parent.glob(f"{path.stem}.*"):
        shutil.copy(file, tmp_path)
    target = tmp_path / path.with_suffix(part).name
    content = target.read_bytes()
    for position in (len(content) // 3, len(content) // 2, len(content) - 200):
        damaged = bytearray(content)
        damaged[position] ^= 1
        target.write_bytes(damaged)
        wrong = rf"{path.name}: {DAMAGED}: (its checksum is wrong|the checksum of it and .+ is wrong), unless"
        with pytest.raises(ValueError, match=wrong):
            ExportedModel(tmp_path / path.name)
    target.write_bytes(content)
    ExportedModel(tmp_path / path.name)


def test_files_that_other_programs_have_rewritten_are_opened(exports, tmp_path):
    import onnx
    import openvino

    path, description = exports("tiny", ".onnx", top_k=TOP_K)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {**{one.key: one.value for one in model.metadata_props}, "more": "1"})
    onnx.save(model, tmp_path / "more.onnx")
    path, _ = exports("tiny", ".xml", top_k=TOP_K)
    openvino.save_model(runtimes.openvino_core().read_model(path), tmp_path / "same.xml", compress_to_fp16=True)
    for name in ("more.onnx", "same.xml"):
        assert ExportedModel(tmp_path / name).description.metadata == description.metadata


def test_damaged_weights_in_an_archive_are_detected(exports, tmp_path):
    path, _ = exports("tiny", ".pt2", top_k=TOP_K)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "model.pt2").write_bytes(content)
    with pytest.raises(ValueError, match=rf"model\.pt2: {DAMAGED}: the checksum of \S+weight_\d+ is wrong"):
        ExportedModel(tmp_path / "model.pt2")


def write_one_operation(target, description=None):
    """Write a file with one operation and optionally a description."""
    if target.suffix == ".onnx":
        import onnx

        shape = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
        graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "one", shape[:1], shape[1:])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
        onnx.helper.set_model_props(model, {} if description is None else {"conditional_detr": description})
        onnx.save(model, target)
    elif target.suffix == ".xml":
        import openvino
        from openvino import opset13

        x = opset13.parameter([1], name="x")
        network = openvino.Model([opset13.relu(x)], [x])
        if description is not None:
            network.set_rt_info(description, ["conditional_detr", "description"])
        openvino.save_model(network, target)
    else:
        program = torch.export.export(nn.ReLU(), (torch.zeros(1),))
        extra = {} if description is None else {"conditional_detr.json": description}
        torch.export.save(program, target, extra_files=extra)


@pytest.mark.parametrize("suffix", FORMATS)
def test_foreign_files_and_damaged_descriptions(suffix, tmp_path, exports):
    target = tmp_path / f"other{suffix}"
    write_one_operation(target)
    with pytest.raises(ValueError, match=rf"other\{suffix}: expected a model exported by `conditional-detr export`"):
        ExportedModel(target)
    newer = '{"format": 5, "versions": {"conditional-detr": "9.1"}}'
    write_one_operation(target, newer)
    message = rf"other\{suffix}: expected a description of format 4, got 5, written by conditional-detr 9\.1; exp"
    with pytest.raises(ValueError, match=message):
        ExportedModel(target)
    write_one_operation(target, '{"format": 2, "config": {}')
    with pytest.raises(ValueError, match=rf"other\{suffix}: its description is damaged"):
        ExportedModel(target)


def test_damaged_descriptions(exports):
    _, description = exports("tiny", ".pt2", top_k=TOP_K)
    content = json.loads(description.to_json())
    assert Description.from_json(json.dumps(content)) == description
    damaged = [{k: v for k, v in content.items() if k != left_out} for left_out in content]
    damaged += [{**content, "more": 1}, {**content, "metadata": []}, {**content, "parity": [1]}, [], 1, None]
    damaged += [{**content, "config": {**content["config"], "heads": -1}}]
    for one in damaged:
        with pytest.raises(ValueError, match="its description is damaged"):
            Description.from_json(json.dumps(one))
    for versions in ([], None, {}):
        with pytest.raises(ValueError, match=r"format 4, got 0, written by conditional-detr \?; export"):
            Description.from_json(json.dumps({**content, "format": 0, "versions": versions}))


def test_errors_of_an_exported_model(path, exported, plain, photograph):
    pixels = pixels_of(1, 64, 96)
    found = Detector(exported)(photograph, threshold=0)
    other_threads = "call torch.set_num_threads" if path.suffix == ".pt2" else "threads: expected an int of at least 1"
    refusals = [
        (lambda: ExportedModel(path, device="nonsense"), ValueError, r"device: .*got 'nonsense'"),
        (lambda: ExportedModel(path, device="meta"), ValueError, r"device: .*got 'meta'"),
        (lambda: ExportedModel(path, device=None), ValueError, r"device: .*got 'None'"),
        (lambda: ExportedModel(path, threads=0), ValueError, "threads: expected an int of at least 1, got 0"),
        (lambda: ExportedModel(path, threads="2"), ValueError, "threads: expected an int of at least 1, got '2'"),
        (lambda: ExportedModel(path, threads=1 if path.suffix == ".pt2" else 1.5), ValueError, other_threads),
        (lambda: ExportedModel(path, dtype=torch.float64), ValueError, r"dtype: .*got torch\.float64"),
        (
            lambda: exported(pixels, torch.zeros(1, 64, 96, dtype=torch.bool)),
            ValueError,
            "padding: expected None, as an exported model",
        ),
        (lambda: exported(pixels[0]), ValueError, r"pixels: expected \(B, 3, H, W\)"),
        (lambda: exported(pixels.byte()), TypeError, "pixels: expected a normalised floating point tensor"),
        (lambda: exported.train(), ValueError, "an exported model cannot be trained"),
        (lambda: exported.half(), ValueError, "stays on its device and in its precision"),
        (lambda: exported.to("cpu"), ValueError, "stays on its device and in its precision"),
        (lambda: exported.state_dict(), ValueError, "has no weights to save"),
        (lambda: copy.deepcopy(exported), ValueError, "an exported model cannot be copied; open the file again"),
        (lambda: Detector(exported).draw_attention(found), ValueError, "attention maps: an exported model has none"),
        (lambda: export(exported, path), TypeError, "expected a ConditionalDETR or DETR, got ExportedModel"),
    ]
    for do, error, message in refusals:
        with pytest.raises(error, match=message):
            do()
    exported.eval()
    assert max(differences(exported, plain, SIZES[0])) < 1e-4


def test_other_files_and_dtypes_are_refused(exports, tmp_path):
    message = (
        r"model\.safetensors: expected an exported model \(\.onnx, \.xml, \.pt2\); from_pretrained loads checkpoints"
    )
    with pytest.raises(ValueError, match=message):
        Detector.from_file(ROOT / "weights" / "shapes" / "model.safetensors")
    path, _ = exports("tiny", ".onnx", top_k=TOP_K)
    with pytest.raises(
        ValueError, match=r"dtype: expected None for \.onnx, which runs in its exported dtype, got torch\.float16"
    ):
        ExportedModel(path, dtype=torch.float16)


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_the_number_of_threads_does_not_change_the_output(suffix, exports, plain):
    path, _ = exports("tiny", suffix, top_k=TOP_K)
    assert max(differences(ExportedModel(path, threads=1, device=torch.device("cpu")), plain, SIZES[0])) < 1e-4


def test_openvino_computes_in_other_precisions(exports, plain):
    path, _ = exports("tiny", ".xml", top_k=TOP_K)
    logits, boxes = differences(ExportedModel(path, dtype=torch.bfloat16), plain, SIZES[0])
    assert 1e-4 < logits < 0.1
    assert boxes < 0.02
    capabilities = runtimes.openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "FP16" not in capabilities:  # it would use bfloat16 instead
        with pytest.raises(
            ValueError, match=r"dtype: OpenVINO cannot compute in torch\.float16 on this CPU, and would use b?f"
        ):
            ExportedModel(path, dtype=torch.float16)


def test_an_interrupt_during_the_openvino_conversion_is_raised_afterwards(plain, tmp_path, monkeypatch):
    """During the conversion it would abort the process."""
    convert, done = openvino.convert_model, []

    def interrupted(program):
        os.kill(os.getpid(), signal.SIGINT)
        done.append(convert(program))
        return done[0]

    monkeypatch.setattr(openvino, "convert_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(plain, tmp_path / "x.xml")
    assert len(done) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_does_not_match_its_names(plain, tmp_path):
    model = copy.deepcopy(plain)
    model.class_head = torch.nn.Linear(32, 5)
    with pytest.raises(ValueError, match=r"model\.metadata: expected 5 class names, .*, got 7"):
        export(model, tmp_path / "x.pt2")
    nameless = copy.deepcopy(plain)
    nameless.metadata = Metadata((None,) * 7)
    with pytest.raises(ValueError, match="top_k: post-processing needs a class with a name, got none"):
        export(nameless, tmp_path / "x.pt2", top_k=3)
    assert list(tmp_path.iterdir()) == []


def test_threads_may_share_an_exported_model(exported, plain, photograph):
    """A detector on images of several sizes, and direct calls at other sizes, run concurrently."""
    image = np.asarray(Image.open(photograph))
    images = [image, image[:60], image[:, :70], image[::-1]]
    expected = Detector(plain)(images, threshold=0.3)
    begin = threading.Barrier(3)

    def detect():
        begin.wait()
        return [Detector(exported)(images, threshold=0.3, batch_size=2) for _ in range(3)]

    def call(size):
        begin.wait()
        return [differences(exported, plain, size) for _ in range(6)]

    with ThreadPoolExecutor(3) as pool:
        detected = pool.submit(detect)
        called = [pool.submit(call, size) for size in SIZES[:2]]
        for found in detected.result():
            for one, wanted in zip(found, expected, strict=True):
                assert_same_detections(one, wanted, 0.3)
        for calls in called:
            assert max(logits for logits, _ in calls.result()) < 1e-4
            assert max(boxes for _, boxes in calls.result()) < 1e-5


@pytest.mark.skipif(os.name != "posix", reason="alternate stacks for signals are POSIX's")
def test_an_interrupt_after_openvino_files_were_closed_is_no_crash(exports):
    path, _ = exports("tiny", ".xml", top_k=TOP_K)
    code = f"""
import gc, os, signal, time, torch
from conditional_detr.inference.exported import ExportedModel
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
first, second = ExportedModel({str(path)!r}), ExportedModel({str(path)!r})
for opened in (first, second):
    opened(torch.zeros(1, 3, 64, 96))
del opened, first
gc.collect()
del second
gc.collect()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
except KeyboardInterrupt:
    print("interrupted")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "interrupted\n"), ended.stderr


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory):
    """Command of a Python with only numpy, pillow and onnxruntime, which runs a script."""
    import numpy
    import onnxruntime
    import PIL

    folder = tmp_path_factory.mktemp("without_torch")
    for package, libraries in ((numpy, "numpy.libs"), (PIL, "pillow.libs"), (onnxruntime, "onnxruntime.libs")):
        where = Path(package.__file__).parent
        (folder / where.name).symlink_to(where)
        if (where.parent / libraries).exists():
            (folder / libraries).symlink_to(where.parent / libraries)
    code = f"""
import runpy, sys
sys.path.insert(0, {str(folder)!r})
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    return [sys.executable, "-I", "-S", "-c", code]


@pytest.mark.parametrize("package", ["torch", "conditional_detr", "onnx"])
def test_that_python_has_no_other_packages(package, without_torch, tmp_path):
    (tmp_path / "script.py").write_text(f"import onnxruntime, {package}")
    ran = subprocess.run([*without_torch, tmp_path / "script.py"], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert f"ModuleNotFoundError: No module named '{package}'" in ran.stderr


@pytest.mark.parametrize(("name", "top_k", "threshold"), [("tiny", TOP_K, 0.3), ("shapes", None, 0.5)])
def test_example_run_onnx(name, top_k, threshold, without_torch, exports, photograph, tmp_path):
    """On a rotated image and on one of shapes, the example prints the detections of the library."""
    path, _ = exports(name, ".onnx", top_k=top_k)
    image = tmp_path / "image.png"
    if name == "shapes":
        draw_image(0, image_index("demo", 0))[0].save(image)
    else:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        with Image.open(photograph) as upright:
            upright.convert("RGBA").save(image, exif=exif)
    expected = Detector.from_file(path)(image, threshold=threshold)
    assert expected.size == ((192, 256) if name == "shapes" else (128, 96))
    assert len(expected) > 3
    options = () if threshold == 0.5 else ("--threshold", str(threshold))
    printed = run_example("run_onnx", path, image, *options, folder=tmp_path, python=without_torch)
    for line, (box, score, found) in zip(printed, expected, strict=True):
        printed_name, *numbers = line.split()
        assert printed_name == found
        assert [float(number) for number in numbers] == pytest.approx([score, *box], abs=0.01)
        assert float(numbers[0]) == pytest.approx(score, abs=1e-4)
    assert len((ROOT / "examples" / "run_onnx.py").read_text().splitlines()) <= 60
