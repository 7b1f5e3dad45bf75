"""Files of integer codes: an entropy coder for the codes, with everything that a loader needs counted.

A file holds, for the matrices and kernels of a network, codes and a float16 scale for each output channel, and float16
for all else. Names and, unless channels were removed, shapes are those of the network that the file is loaded into. The
codes of each tensor are range coded with the best of a histogram, a Laplace and a Gauss distribution, or all together
go through the best of general compressors, whichever is smaller.
"""

import lzma
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import constriction
import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor, nn

Codes = NDArray[np.int32]
_model = constriction.stream.model


@dataclass(frozen=True)
class Coded:
    """A quantized tensor: ``codes * scale`` by output channel.

    Args:
        codes: Integers of the tensor's shape, from -32,768 to 32,767.
        scale: A factor ``(out,)`` in float16.
    """

    codes: Codes
    scale: NDArray[np.float16]

    def value(self) -> Tensor:
        """The tensor in float32."""
        scale = self.scale.astype(np.float32).reshape(-1, *[1] * (self.codes.ndim - 1))
        return torch.from_numpy(self.codes.astype(np.float32) * scale)


def squeeze(content: bytes) -> bytes:
    """The content by the best of general compressors, after a byte that says which."""
    zstd = zstandard.ZstdCompressor(level=22, write_checksum=False, write_content_size=True)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]
    found = (
        content,
        zlib.compress(content, 9, -15),
        lzma.compress(content, lzma.FORMAT_RAW, filters=filters),
        zstd.compress(content),
    )
    which = min(range(len(found)), key=lambda i: len(found[i]))
    return bytes([which]) + found[which]


def unsqueeze(content: bytes) -> bytes:
    """The inverse of :func:`squeeze`."""
    which, content = content[0], content[1:]
    if which == 1:
        return zlib.decompress(content, -15)
    if which == 2:
        return lzma.decompress(content, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "lc": 4, "pb": 0}])
    return zstandard.ZstdDecompressor().decompress(content) if which == 3 else content


def joined(parts: list[bytes]) -> bytes:
    """Parts one after the other, each but the last after its length."""
    return b"".join(varint(len(part)) + part for part in parts[:-1]) + parts[-1]


def split(content: bytes, parts: int) -> list[bytes]:
    """The inverse of :func:`joined`."""
    found = []
    for _ in range(parts - 1):
        length = shift = 0
        while True:
            byte, content = content[0], content[1:]
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        found.append(content[:length])
        content = content[length:]
    return [*found, content]


def varint(number: int) -> bytes:
    """A whole number in seven bits a byte."""
    found = []
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def _tables(codes: Codes) -> Iterator[bytes]:
    """Descriptions of distributions for codes: the kind, the smallest and the largest code, and what the kind needs."""
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    if low == high:
        yield struct.pack("<Bhh", 0, low, high)
        return
    if high - low < 256:
        counts = np.bincount(codes - low)
        weights = np.where(counts > 0, np.maximum(1, np.round(np.sqrt(counts / counts.max()) * 255)), 0)
        yield struct.pack("<Bhh", 1, low, high) + weights.astype(np.uint8).tobytes()
    mean, deviation = float(codes.mean()), float(codes.std())
    spread = float(np.abs(codes - np.median(codes)).mean())
    yield struct.pack("<Bhhff", 2, low, high, mean, max(deviation, 1e-2))
    yield struct.pack("<Bhhff", 3, low, high, float(np.median(codes)), max(spread, 1e-2))


def _distribution(content: bytes, start: int) -> tuple[Any, int, int, int]:
    """The distribution that is described from ``start`` on, what to subtract from codes, the only code, and the end."""
    kind, low, high = struct.unpack_from("<Bhh", content, start)
    start += 5
    if kind == 0:
        return None, 0, low, start
    if kind == 1:
        end = start + high - low + 1
        weights = np.frombuffer(content[start:end], np.uint8).astype(np.float32) ** 2
        return _model.Categorical(weights / weights.sum(), perfect=False), low, 0, end
    center, spread = struct.unpack_from("<ff", content, start)
    family = _model.QuantizedGaussian if kind == 2 else _model.QuantizedLaplace
    return family(low, high, center, spread), 0, 0, start + 8


def _range_coded(tables: list[bytes], codes: list[Codes]) -> bytes:
    encoder = constriction.stream.queue.RangeEncoder()
    for table, values in zip(tables, codes, strict=True):
        distribution, offset, _, _ = _distribution(table, 0)
        if distribution is not None:
            encoder.encode((values - offset).astype(np.int32), distribution)
    words: bytes = encoder.get_compressed().astype("<u4").tobytes()
    return words


def _best_table(codes: Codes) -> bytes:
    return min(_tables(codes), key=lambda table: len(table) + len(_range_coded([table], [codes])))


def encode(codes: list[Codes]) -> bytes:
    """Codes of some tensors as bytes."""
    flat = [c.reshape(-1).astype(np.int32) for c in codes]
    tables = [_best_table(c) for c in flat]
    coded = joined([squeeze(b"".join(tables)), _range_coded(tables, flat)])
    narrow = all(c.min(initial=0) >= -128 and c.max(initial=0) < 128 for c in flat)
    plain = squeeze(b"".join(c.astype(np.int8 if narrow else "<i2").tobytes() for c in flat))
    return min(b"\0" + coded, bytes([1 if narrow else 2]) + plain, key=len)


def decode(content: bytes, sizes: list[int]) -> list[Codes]:
    """The inverse of :func:`encode`, flat."""
    kind, content = content[0], content[1:]
    if kind:
        values = np.frombuffer(unsqueeze(content), np.int8 if kind == 1 else "<i2").astype(np.int32)
        return np.split(values, np.cumsum(sizes)[:-1])
    tables, words = split(content, 2)
    tables, start, found = unsqueeze(tables), 0, []
    decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))
    for size in sizes:
        distribution, offset, only, start = _distribution(tables, start)
        values = np.full(size, only, np.int32) if distribution is None else decoder.decode(distribution, size)
        found.append((values + offset).astype(np.int32))
    return found


def pack(net: nn.Module, coded: Mapping[str, Coded], *, original: nn.Module) -> bytes:
    """A network as the bytes of a file.

    Args:
        net: A plain network without batch normalization.
        coded: Name of each tensor with two dimensions or more -> its codes.
        original: The network that the file will be loaded into. Shapes are stored if they differ from its own.
    """
    state = net.state_dict()
    shapes = [tuple(t.shape) for t in state.values()]
    dims = np.array([n for shape in shapes for n in shape[:2]], "<u2").tobytes()
    stored = squeeze(dims) if shapes != [tuple(t.shape) for t in original.state_dict().values()] else b""
    rest = [t.numpy().astype("<f2").tobytes() for name, t in state.items() if name not in coded]
    floats = b"".join([*(coded[name].scale.astype("<f2").tobytes() for name in state if name in coded), *rest])
    return joined([stored, squeeze(floats), encode([coded[name].codes for name in state if name in coded])])


def unpack(content: bytes, net: nn.Module) -> nn.Module:
    """Fills a network from the bytes that :func:`pack` returned; it takes the stored shapes."""
    stored, floats, codes = split(content, 3)
    state = net.state_dict()
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    if stored:
        dims = iter(np.frombuffer(unsqueeze(stored), "<u2").tolist())
        shapes = {name: (*(next(dims) for _ in shape[:2]), *shape[2:]) for name, shape in shapes.items()}
    numbers = np.frombuffer(unsqueeze(floats), "<f2")
    coded = [name for name, shape in shapes.items() if len(shape) > 1]
    rest = [name for name in shapes if name not in coded]
    lengths = [*(shapes[name][0] for name in coded), *(int(np.prod(shapes[name])) for name in rest)]
    parts = dict(zip([*coded, *rest], np.split(numbers, np.cumsum(lengths)[:-1]), strict=True))
    values = {name: torch.from_numpy(parts[name].astype(np.float32)).reshape(shapes[name]) for name in rest}
    for name, flat in zip(coded, decode(codes, [int(np.prod(shapes[name])) for name in coded]), strict=True):
        values[name] = Coded(flat.reshape(shapes[name]), parts[name]).value()
    return filled(net, values)


def filled(net: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """The network with these values, whose shapes it takes."""
    for name, value in values.items():
        path, _, attribute = name.rpartition(".")
        module = net.get_submodule(path)
        setattr(module, attribute, nn.Parameter(value.clone(), requires_grad=False))
        if attribute == "weight" and isinstance(module, nn.Linear):
            module.out_features, module.in_features = value.shape
        if attribute == "weight" and isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = value.shape[0], value.shape[1] * module.groups
    return net.eval()
