"""Latency of ONNX files in ONNX Runtime on a CPU, batch 1: the compressed network against the float one.

    pip install "lightning-selfcompress[onnx]" onnxruntime
    python benchmarks/onnx_latency.py mnist CHECKPOINT     # LeNet-5 of the demo
    python benchmarks/onnx_latency.py cifar CHECKPOINT     # a ResNet of cifar.py

The networks take turns in one process. ``dequantize`` has integer weights, dequantized at every call or, with the
session's option, once; ``multiply`` is computed once without options; ``round_to=16`` rounds widths up to whole blocks
of channels, for the runtime's fast convolutions; ``float`` is the smaller network with float weights. ``integer``
computes in integers, if the network was trained with ``activations=8``, or is calibrated on noise by ``--calibrate``,
which gives the right times and wrong outputs.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import onnxruntime
import torch
from cifar import CifarNet

from lightning_selfcompress import calibrate_activations, load_from_checkpoint, size_report, to_onnx
from lightning_selfcompress.activations.layers import activated_modules
from lightning_selfcompress.demo.networks import LeNet5
from lightning_selfcompress.quantize.parameters import quantized_parameters

TASKS: dict[str, tuple[type[pl.LightningModule], tuple[int, ...]]] = {
    "mnist": (LeNet5, (1, 1, 28, 28)),
    "cifar": (CifarNet, (1, 3, 32, 32)),
}

FORMS: dict[str, dict[str, Any]] = {
    "dequantize": {"activations": False},
    "multiply": {"weights": "multiply"},
    "multiply, round_to=16": {"weights": "multiply", "round_to": 16},
    "float": {"weights": "float"},
}


def session(path: Path, threads: int, *, once: bool = False) -> onnxruntime.InferenceSession:
    """A session; ``once`` dequantizes weights when the file is opened."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if once:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def seconds(running: onnxruntime.InferenceSession, feed: dict[str, np.ndarray], calls: int) -> float:
    """Seconds of some calls."""
    start = time.perf_counter()
    for _ in range(calls):
        running.run(None, feed)
    return time.perf_counter() - start


def main() -> None:
    """Prints sizes, differences and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--calibrate", action="store_true")
    options = parser.parse_args()
    model_class, shape = TASKS[options.task]
    model = load_from_checkpoint(model_class, options.checkpoint).eval()
    full = model_class(**({"name": model.hparams["name"]} if options.task == "cifar" else {})).eval()
    example = torch.randn(shape)
    if options.calibrate:
        calibrate_activations(model, [torch.randn(64, *shape[1:])])
    forms = FORMS | ({"integer": {"activations": True}} if any(activated_modules(model)) else {})
    int8 = sum(p.latent.numel() for p in quantized_parameters(model))
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.onnx" for name in ("full", *forms)}
        to_onnx(full, paths["full"], example, weights="float")
        for name, settings in forms.items():
            to_onnx(model, paths[name], example, **settings)
        sizes = {name: path.stat().st_size for name, path in paths.items()}
        print(f"{size_report(model).weights_left:.1%} of the weights left; int8 bytes of these: {int8:,}")
        for name in forms:
            print(f"  {name}: {sizes[name]:,} bytes, {sizes[name] / int8:.3f} times these")
        for threads in (1, 2):
            running = {name: session(path, threads) for name, path in paths.items()}
            running["dequantize, once"] = session(paths["dequantize"], threads, once=True)
            feed = {running["full"].get_inputs()[0].name: example.numpy()}
            expected = model(example).detach().numpy()
            times: dict[str, list[float]] = {name: [] for name in running}
            for _ in range(options.pairs):
                for name, one in running.items():
                    times[name].append(seconds(one, feed, options.calls))
            print(f"{threads} thread(s): full {1e6 * statistics.median(times['full']) / options.calls:,.0f} us a call")
            for name in list(running)[1:]:
                ratios = [a / b for a, b in zip(times["full"], times[name], strict=True)]
                low, _, high = statistics.quantiles(ratios, n=4)
                difference = float(np.abs(running[name].run(None, feed)[0] - expected).max())
                print(
                    f"  {name}: {statistics.median(ratios):.2f} times as fast (quartiles {low:.2f}, {high:.2f}), "
                    f"outputs within {difference:.1e} of torch's"
                )


if __name__ == "__main__":
    main()
