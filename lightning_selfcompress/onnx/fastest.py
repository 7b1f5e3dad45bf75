"""Which form of an ONNX file is fastest here: each is written, timed on the example, and the fastest is kept."""

import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_selfcompress.files.atomic_write import write_beside
from lightning_selfcompress.onnx.report import OnnxReport

_LEAST_ROUNDS, _SECONDS = 20, 1.0


def forms_of(*, integer: bool) -> dict[str, dict[str, Any]]:
    """Returns the forms that a file can have: name -> arguments of ``to_onnx``.

    Args:
        integer: Whether the network quantizes its activations.
    """
    forms: dict[str, dict[str, Any]] = {name: {"weights": name} for name in ("float", "multiply")}
    forms["dequantize"] = {"weights": "dequantize", "activations": False}
    return forms | ({"integer": {"weights": "dequantize", "activations": True}} if integer else {})


def write_fastest(
    write: Callable[..., OnnxReport],
    path: str | os.PathLike[str],
    tensors: Sequence[Tensor],
    forms: Mapping[str, Mapping[str, Any]],
) -> OnnxReport:
    """Writes each form of a file, times it in ONNX Runtime, and keeps the fastest.

    Args:
        write: Writes a file, called with its path and the arguments of a form.
        path: Where the fastest is to be.
        tensors: The example, as the inputs of the file.
        forms: The forms by name.

    Returns:
        The report on the file that is kept, with the times of all.

    Raises:
        ModuleNotFoundError: If onnxruntime is missing.
        RuntimeError: If ONNX Runtime runs none of the files.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ModuleNotFoundError(
            "Expected the package onnxruntime to measure which form is fastest, it is missing. Install it with "
            "pip install onnxruntime, or leave fastest=True out.",
            name="onnxruntime",
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        reports: dict[str, OnnxReport] = {}
        sessions: dict[str, Any] = {}
        for name, form in forms.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the notes of the file that is kept are told
                reports[name] = write(Path(folder) / name, **form)
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            try:
                sessions[name] = onnxruntime.InferenceSession(
                    str(Path(folder) / name), options, ["CPUExecutionProvider"]
                )
            except Exception as error:  # this ONNX Runtime lacks an operator of the form
                warnings.warn(f"ONNX Runtime does not open the form {name!r}: {error}", stacklevel=3)
        if not sessions:
            raise RuntimeError("ONNX Runtime opens none of the forms of this network, so none can be timed.")
        times = medians({name: _runner(session, tensors) for name, session in sessions.items()})
        best = min(times, key=lambda name: times[name])
        write_beside(path, lambda part: shutil.copyfile(Path(folder) / best, part))
    notes = reports[best].notes
    if notes:
        warnings.warn("\n".join(notes), stacklevel=3)
    return replace(reports[best], form=best, times=times)


def medians(runs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Returns the median milliseconds of some calls, which take turns, so that what slows one slows all.

    Args:
        runs: The calls by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    begun = time.perf_counter()
    while len(next(iter(seconds.values()))) < _LEAST_ROUNDS or time.perf_counter() - begun < _SECONDS:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def _runner(session: Any, tensors: Sequence[Tensor]) -> Callable[[], Any]:
    inputs = {value.name: t.detach().cpu().numpy() for value, t in zip(session.get_inputs(), tensors, strict=True)}
    return lambda: session.run(None, inputs)
