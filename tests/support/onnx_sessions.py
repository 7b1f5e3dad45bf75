"""ONNX files run by ONNX Runtime."""

import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")


def session(model, *, once=False):
    """ONNX Runtime on a file or a model; ``once`` dequantizes when it opens the file."""
    options = runtime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if once:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(opened, inputs):
    feeds = {i.name: x.numpy() for i, x in zip(opened.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(out) for out in opened.run(None, feeds)]


def assert_close(found, expected):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 1e-4 * max(1.0, float(b.abs().max()))


def kinds(path):
    return {n.op_type for n in onnx.load(path).graph.node}
