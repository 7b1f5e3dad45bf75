"""The report on an ONNX file."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class OnnxReport:
    """The report on a file that :func:`to_onnx` has written.

    Args:
        nbytes: Bytes of the file.
        types: Name of each compressed weight -> its type in the file: ``int4``, ``int8``, ``int16`` or ``float``;
            ``constant`` if the graph stores a constant result instead; ``none`` if ``forward`` does not use the weight.
        notes: The limitations of the file, each with its reason.
        form: The form of the file, if it was chosen by its time: ``float``, ``multiply``, ``dequantize`` or
            ``integer``.
        times: Median milliseconds of one call on the example in ONNX Runtime, by form, if they were measured.
    """

    nbytes: int
    types: Mapping[str, str]
    notes: tuple[str, ...]
    form: str = ""
    times: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = []
        for kind in dict.fromkeys(self.types.values()):
            n = list(self.types.values()).count(kind)
            where = {"constant": "in branches that emit constants", "none": "not used"}.get(kind, f"in {kind}")
            parts.append(f"{n} {'weight' if n == 1 else 'weights'} {where}")
        weights = ", ".join(parts) or "nothing compressed"
        ranked = sorted(self.times.items(), key=lambda item: item[1])
        times = [f"{name} {ms:.3g} ms{' (kept)' * (name == self.form)}" for name, ms in ranked]
        lines = ["Time of one call: " + ", ".join(times)] if times else []
        return "\n".join([f"{self.nbytes:,} bytes: {weights}", *lines, *self.notes])
