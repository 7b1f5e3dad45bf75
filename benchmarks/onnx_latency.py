"""Latency of ONNX files in ONNX Runtime on a CPU, batch 1: the compressed network against the float one.

    pip install "lightning-selfcompress[onnx]" onnxruntime openvino
    python benchmarks/onnx_latency.py mnist CHECKPOINT     # LeNet-5 of the demo
    python benchmarks/onnx_latency.py cifar CHECKPOINT     # a ResNet of cifar.py
    python benchmarks/onnx_latency.py lenet5 FILE --data-dir path/to/data     # a packed file that sizes.py wrote

The networks take turns in one process. ``dequantize`` has integer weights, dequantized at every call or, with the
session's option, once; ``multiply`` is computed once without options; ``round_to=16`` rounds widths up to whole blocks
of channels, for the runtime's fast convolutions; ``float`` is the smaller network with float weights. ``integer``
computes in integers, if the network was trained with ``activations=8``, or is calibrated on noise by ``--calibrate``,
which gives the right times and wrong outputs. Where OpenVINO is installed it runs the same file. With ``--data-dir``
the outputs on all test images are compared with torch's.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from cifar import CifarNet
from size_peers.networks import NETWORKS
from size_peers.task import load_task
from torch import Tensor, nn

from lightning_selfcompress import calibrate_activations, load, load_from_checkpoint, to_onnx
from lightning_selfcompress.activations.layers import activated_modules
from lightning_selfcompress.demo.networks import LeNet5

TRAINED: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mnist": (LeNet5, (1, 1, 28, 28)),
    "cifar": (CifarNet, (1, 3, 32, 32)),
}

FORMS: dict[str, dict[str, Any]] = {
    "dequantize": {"activations": False},
    "multiply": {"weights": "multiply"},
    "multiply, round_to=16": {"weights": "multiply", "round_to": 16},
    "float": {"weights": "float"},
}


class OpenVino:
    """OpenVINO's network of a file, called as ONNX Runtime's sessions are.

    Args:
        path: The file.
        threads: Threads of one call.
    """

    def __init__(self, path: Path, threads: int) -> None:
        import openvino

        core = openvino.Core()
        self._compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_NUM_THREADS": threads})

    def run(self, _: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of a batch."""
        return [self._compiled(list(feed.values()))[0]]


def session(path: Path, threads: int, *, once: bool = False) -> onnxruntime.InferenceSession:
    """A session; ``once`` dequantizes weights when the file is opened."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if once:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def sessions(paths: dict[str, Path], threads: int) -> dict[str, Any]:
    """All that is timed, by name; the float network first."""
    running: dict[str, Any] = {name: session(path, threads) for name, path in paths.items()}
    running["dequantize, once"] = session(paths["dequantize"], threads, once=True)
    try:
        running |= {f"{n}, OpenVINO": OpenVino(paths[n], threads) for n in ("full", "integer") if n in paths}
    except ImportError:
        print("OpenVINO: left out. Install openvino.")
    return running


def seconds(running: Any, feed: dict[str, np.ndarray], calls: int) -> float:
    """Seconds of some calls."""
    start = time.perf_counter()
    for _ in range(calls):
        running.run(None, feed)
    return time.perf_counter() - start


def networks(options: argparse.Namespace) -> tuple[nn.Module, nn.Module, Tensor, Path | None]:
    """The compressed network, the float one, an example, and the packed file if it is one."""
    if options.task in NETWORKS:
        shape = TRAINED["cifar" if options.task.startswith("resnet") else "mnist"][1]
        small = load(options.file, into=NETWORKS[options.task]())
        return small.eval(), NETWORKS[options.task]().eval(), torch.randn(shape), options.file
    model_class, shape = TRAINED[options.task]
    model = load_from_checkpoint(model_class, options.file).eval()
    full = model_class(**({"name": model.hparams["name"]} if options.task == "cifar" else {})).eval()
    return model, full, torch.randn(shape), None


def compare(options: argparse.Namespace, model: nn.Module, running: dict[str, Any]) -> None:
    """Prints on how many test images the largest output is that of torch."""
    kind = "cifar" if "cifar" in options.task or options.task.startswith("resnet") else "mnist"
    images, labels = load_task(kind, options.data_dir, quick=False).test
    with torch.no_grad():
        expected = torch.cat([model(part).argmax(1) for part in images.split(500)])
    print(f"torch: {100 * float((expected == labels).float().mean()):.2f}% of {len(labels):,} test images")
    for name in ("integer", "integer, OpenVINO"):
        if name in running:
            key = running["integer"].get_inputs()[0].name
            feeds = [{key: part.numpy()} for part in images.split(500)]
            found = torch.cat([torch.from_numpy(running[name].run(None, feed)[0]).argmax(1) for feed in feeds])
            equal, right = (100 * float((found == other).float().mean()) for other in (expected, labels))
            print(f"{name}: the same as torch on {equal:.2f}%, {right:.2f}% right")


def main() -> None:
    """Prints sizes, differences and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=(*TRAINED, *NETWORKS))
    parser.add_argument("file", type=Path)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--data-dir", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    model, full, example, codes = networks(options)
    if options.calibrate:
        calibrate_activations(model, [torch.randn(64, *example.shape[1:])])
    forms = FORMS | ({"integer": {"activations": True}} if any(activated_modules(model)) else {})
    weights, of_full = (sum(p.numel() for p in net.parameters() if p.dim() > 1) for net in (model, full))
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.onnx" for name in ("full", *forms)}
        to_onnx(full, paths["full"], example, weights="float")
        for name, settings in forms.items():
            to_onnx(model, paths[name], example, codes=codes, **settings)
        print(f"{weights / of_full:.1%} of the weights left; int8 bytes of these: {weights:,}")
        for name in forms:
            print(f"  {name}: {paths[name].stat().st_size:,} bytes")
        for threads in (1, 2):
            report(options, threads, sessions(paths, threads), example, model)
        if options.data_dir is not None:
            compare(options, model, sessions(paths, 1))


def report(
    options: argparse.Namespace, threads: int, running: dict[str, Any], example: Tensor, model: nn.Module
) -> None:
    """Times all in turns, and prints the ratios to the float network in ONNX Runtime."""
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
        of = "" if name.startswith("full") else f", outputs within {difference:.1e} of torch's"
        print(f"  {name}: {statistics.median(ratios):.2f} times as fast (quartiles {low:.2f}, {high:.2f}){of}")


if __name__ == "__main__":
    main()
