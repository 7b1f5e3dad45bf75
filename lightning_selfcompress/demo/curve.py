"""The size curve of the demo, drawn from TensorBoard files."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Series = tuple[list[int], list[float]]


def read_scalar(run: Path, tag: str) -> Series:
    """Reads one scalar from all files of a TensorBoard run.

    Args:
        run: Folder of the run.
        tag: Name of the scalar.

    Returns:
        The steps and the values; both are empty if the run does not have the scalar.
    """
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    points = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
    return [p.step for p in points], [p.value for p in points]


def draw_size_curve(float_run: Path, compressed_run: Path, out: Path) -> None:
    """Draws bits per weight and bytes over the steps, and the validation accuracies of both runs below.

    Args:
        float_run: TensorBoard folder of the float training.
        compressed_run: TensorBoard folder of the training with SelfCompression.
        out: The image file to write, whose suffix determines the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    size, accuracy = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 2]})
    size.plot(*read_scalar(compressed_run, "selfcompress/bits_per_weight"), color="tab:blue")
    size.set_ylabel("learned bits per weight", color="tab:blue")
    size.set_ylim(bottom=0)
    nbytes = size.twinx()
    steps, values = read_scalar(compressed_run, "selfcompress/nbytes")
    nbytes.plot(steps, [v / 1000 for v in values], color="tab:orange")
    nbytes.set_ylabel("whole network, kB", color="tab:orange")
    nbytes.set_ylim(bottom=0)
    for run, label, color in ((float_run, "float", "0.6"), (compressed_run, "compressed", "tab:blue")):
        steps, values = read_scalar(run, "val/accuracy")
        accuracy.plot(steps, [100 * v for v in values], label=label, color=color)
    accuracy.set_ylim(90, 100.2)
    accuracy.set_ylabel("validation accuracy, %")
    accuracy.set_xlabel("step")
    accuracy.legend(loc="lower right")
    figure.savefig(out, dpi=110)
