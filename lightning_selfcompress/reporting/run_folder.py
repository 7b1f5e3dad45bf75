"""The record of a run, read from its folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_selfcompress.errors import CheckpointError, RunError
from lightning_selfcompress.files.checkpoint import read_checkpoint
from lightning_selfcompress.monitoring.scalars import PREFIX
from lightning_selfcompress.reporting.csv_files import NAME, read_csv_file
from lightning_selfcompress.reporting.event_files import PATTERN, read_event_files
from lightning_selfcompress.reporting.front import Mode, Point
from lightning_selfcompress.reporting.history import NBYTES, RunHistory, Series, guess_metric, guess_mode
from lightning_selfcompress.reporting.recording import Recording


def read_run(folder: Path, *, metric: str = "", mode: Mode | None = None) -> RunHistory:
    """Reads the record of a run from its folder: event files or ``metrics.csv``, and the last checkpoint.

    Where a CompressionReport was among the callbacks, the checkpoint holds its record, which is whole.

    Args:
        folder: The folder of the run, such as ``lightning_logs/version_0``, or one that holds a single run.
        metric: Name of the metric to set against the bytes; by default what ParetoCheckpoint or ModelCheckpoint
            monitors, or else the scalar that most likely tells how good a network is.
        mode: ``"max"`` if a good metric is a large one, ``"min"`` if it is a small one; by default as its name says.

    Returns:
        The record.

    Raises:
        RunError: If the folder holds no run of this package, or several, or a damaged file; or has no such metric.
        OSError: If the folder does not exist or cannot be read.
    """
    place = _run_in(folder)
    events = sorted(place.glob(PATTERN))
    scalars, frames = read_event_files(events) if events else (read_csv_file(place / NAME), ())
    if NBYTES not in scalars:
        raise RunError(
            f"Expected a run with SelfCompression in {str(folder)!r}, found one whose {len(scalars)} scalars have no "
            f"{NBYTES!r} among them. Name the folder of a run that had the callback and a logger."
        )
    checkpoint = last_checkpoint(place)
    states, notes = _callback_states(checkpoint)
    recorded = next((Recording.from_state(s["recording"]) for n, s in states.items() if "CompressionReport" in n), None)
    front: Mapping[str, Any] = next(
        (state for name, state in states.items() if name.startswith("ParetoCheckpoint")), {}
    )
    chosen = metric or _monitored(states, scalars) or (recorded.metric if recorded else "") or guess_metric([*scalars])
    if metric and metric not in scalars:
        raise RunError(
            f"Expected a metric {metric!r} in {str(folder)!r}, found {_known(scalars)}. Give one of these to --metric."
        )
    return RunHistory(
        name=place.resolve().name,
        scalars=scalars,
        metric=chosen,
        mode=mode or (front["mode"] if front.get("monitor") == chosen else guess_mode(chosen)),
        frames=frames or (recorded.frames if recorded else ()),
        before=recorded.before if recorded else {},
        float_nbytes=recorded.float_nbytes if recorded else _float_nbytes(scalars),
        left_in_float=recorded.left_in_float if recorded else (),
        kept=tuple(Point(*values) for values in front.get("front", ()) if front.get("monitor") == chosen),
        command=recorded.command if recorded else _command(place),
        notes=notes,
    )


def _monitored(states: Mapping[str, Any], scalars: Mapping[str, Series]) -> str:
    """Returns what ParetoCheckpoint monitors, or else ModelCheckpoint, if it was logged and is no size."""
    ordered = sorted((name for name in states if "Checkpoint" in name), key=lambda name: "Pareto" not in name)
    monitored = [str(states[name].get("monitor")) for name in ordered]
    return next((tag for tag in monitored if tag in scalars and not tag.startswith(f"{PREFIX}/")), "")


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the checkpoint below a folder that was written last; None if there is none."""
    return max(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)


def _callback_states(checkpoint: Path | None) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Returns the states of the callbacks in a checkpoint by their keys, and a note where there are none to read."""
    if checkpoint is None:
        return {}, ()
    try:
        states = read_checkpoint(checkpoint).get("callbacks")
    except CheckpointError as error:
        return {}, (f"What callbacks recorded is left out: {error}",)
    states = states if isinstance(states, Mapping) else {}
    return {str(name): state for name, state in states.items() if isinstance(state, Mapping)}, ()


def _float_nbytes(scalars: Mapping[str, Series]) -> int | None:
    """Returns the bytes of the float network, which a run tells by the share that is left of it."""
    shares, nbytes = scalars.get(f"{PREFIX}/percent_of_float", Series()), scalars[NBYTES]
    if not shares.values or not shares.values[-1]:
        return None
    return round(100 * nbytes.at(shares.steps[-1]) / shares.values[-1])


def _run_in(folder: Path) -> Path:
    """Returns the one folder, this or one below it, in which a logger has written."""
    if not folder.is_dir():
        raise RunError(f"Expected the folder of a run, got {str(folder)!r}, which is none.")
    found = {path.parent for pattern in (PATTERN, NAME) for path in folder.rglob(pattern)}
    if folder in found:
        return folder
    if not found:
        raise RunError(
            f"Expected a run in {str(folder)!r}, found neither TensorBoard's event files nor a {NAME} in it or below. "
            f"Name the folder of a logger, such as lightning_logs/version_0."
        )
    if len(found) > 1:
        names = sorted(str(path.relative_to(folder)) for path in found)
        more = ", ..." if len(names) > 4 else ""
        raise RunError(
            f"Expected one run in {str(folder)!r}, found {len(names)}: {', '.join(names[:4])}{more}. Name one of them."
        )
    return found.pop()


def _known(scalars: Mapping[str, Series]) -> str:
    return ", ".join(sorted(repr(tag) for tag in scalars if not tag.startswith("selfcompress"))) or "none"


def _command(folder: Path) -> str:
    """Returns the command that repeats a run of LightningCLI, whose configuration lies in its folder."""
    config = folder / "config.yaml"
    return f"python YOUR_SCRIPT.py fit --config {config}" if config.exists() else ""
