"""A second reader of packed files, written from docs/format.md alone, in plain Python and NumPy.

    tensors, attributes = read(Path("network.scnn").read_bytes())

Tensors are arrays by name; bfloat16 comes as float32, which holds the same values.
"""

import math
import zlib

import numpy as np

TYPES = "<f4 <f8 <f2 bfloat16 <u1 <i1 <i2 <i4 <i8 bool <c8 <c16".split()  # noqa: SIM905 - shorter
STORED = {1: "<f2", 3: "<i1", 4: "<i2", 5: "<i4"}
CODED = 2
WORDS = "weight bias running_mean running_var num_batches_tracked in_proj_weight in_proj_bias groups"
WORDS += " num_features num_groups"


class Bytes:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, count):
        self.at += count
        if self.at > len(self.data):
            raise ValueError(f"Expected a file of at least {self.at} bytes.")
        return self.data[self.at - count : self.at]

    def varint(self):
        byte = self.take(1)[0]
        return byte if byte < 128 else byte - 128 + 128 * self.varint()

    def name(self, path_before):
        word, shared = self.take(1)[0], self.varint()
        path = path_before[:shared] + self.take(self.varint())
        return path, path.decode() + ("." + WORDS.split()[word - 1] if word else "")


def read(data):
    """All tensors of a file by name, and its attributes by name."""
    if data[:4] != b"SCNN" or data[4:5] != b"\x01":
        raise ValueError("Expected a packed file of version 1.")
    if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise ValueError("Expected a checksum that fits.")
    file = Bytes(data[5:-4])
    path, heads, attributes = b"", [], {}
    for _ in range(file.varint()):
        path, name = file.name(path)
        storage, kind = divmod(file.take(1)[0], 16)
        head = {"name": name, "type": TYPES[kind], "storage": storage}
        head["shape"] = tuple(file.varint() for _ in range(file.varint()))
        if storage == CODED:
            for key in ("dim", "groups", "classes", "exponents", "bounds", "symbols"):
                head[key] = file.varint()
            u = file.varint()
            head["first"] = -(u + 1) // 2 if u % 2 else u // 2
        heads.append(head)
    for _ in range(file.varint()):
        path, name = file.name(path)
        attributes[name] = file.varint()
    streams = [file.take(length) for length in (file.varint(), file.varint())]
    coded = [head for head in heads if head["storage"] == CODED]
    read_codes(coded, streams, file)
    values = {h["name"]: dequantized(h) if h["storage"] == CODED else plain(h, file) for h in heads}
    if file.at != len(file.data):
        raise ValueError("Expected the end of the file.")
    return values, attributes


def read_codes(coded, streams, file):
    """Gives each head its exponents (channels,) and its codes (channels, R)."""
    parts = []
    for h in coded:
        table = np.zeros(h["shape"][h["dim"]] * h["groups"], int)
        parts += [(table, 1, h[key]) for key in ("classes", "exponents", "bounds")]
    symbols = decode(streams[0], parts)
    parts = []
    for h, classes, exponents, bounds in zip(coded, symbols[::3], symbols[1::3], symbols[2::3], strict=True):
        others = math.prod(n for d, n in enumerate(h["shape"]) if d != h["dim"])
        h["row"], h["alive"], h["e"] = others // h["groups"], classes > 0, exponents + h["first"]
        h["k"] = np.tile(bounds[h["alive"]], h["row"])
        parts.append((np.tile(classes[h["alive"]] - 1, h["row"]), max(h["classes"] - 1, 1), h["symbols"]))
    for h, symbol in zip(coded, decode(streams[1], parts), strict=True):
        tokens = np.maximum(symbol - 2 * (h["k"] > 0), 0)
        lengths = np.where(tokens < 15, 0, (tokens - 15) // 2 + 4)
        magnitude = np.where(tokens < 15, (tokens + 1) // 2, 1 << np.maximum(lengths - 1, 0))
        bits = np.unpackbits(np.frombuffer(file.take((int((lengths - 1).clip(0).sum()) + 7) // 8), "u1"))
        for place in range(int(lengths.max(initial=0)) - 1):
            which = np.flatnonzero(lengths - 1 > place)
            magnitude[which] += bits[: len(which)].astype(int) << place
            bits = bits[len(which) :]
        h["codes"] = np.zeros((len(h["e"]), h["row"]), int)
        at_bound, ends = (h["k"] > 0) & (symbol < 2), np.where(symbol, h["k"] - 1, -h["k"])
        signed = np.where(at_bound, ends, np.where(tokens % 2, magnitude, -magnitude))
        h["codes"][h["alive"]] = signed.reshape(h["row"], h["alive"].sum()).T


def decode(stream, parts):
    """The symbols of each part, which is the table of each symbol, the number of tables and the alphabet."""
    total = sum(len(table_of) for table_of, _, _ in parts)
    lanes = max(1, min(total // 2048, 64 + total // 16384))
    x = np.frombuffer(stream, "<u4", lanes).astype(int)
    words, found = np.frombuffer(stream, "<u2", offset=4 * lanes).astype(int), []
    for table_of, tables, alphabet in parts:
        symbols, counts, until = np.zeros(len(table_of), int), np.ones((tables, alphabet), int), 0
        for t in range(-(-len(symbols) // lanes)):
            if t == until:  # a new stretch: the symbols of the last one are in counts by now
                f = 1 + counts * (2**14 - alphabet) // counts.sum(1, keepdims=True)
                f[range(tables), counts.argmax(1)] += 2**14 - f.sum(1)
                starts = f.cumsum(1) - f
                until = t + max(1, t // 16)
            here = slice(t * lanes, (t + 1) * lanes)
            table, n = table_of[here], len(table_of[here])
            slot = x[:n] % 2**14
            s = symbols[here] = (starts[table] <= slot[:, None]).sum(1) - 1
            x[:n] = f[table, s] * (x[:n] >> 14) + slot - starts[table, s]
            empty = np.flatnonzero(x[:n] < 2**16)
            x[empty] = x[empty] * 2**16 + words[: len(empty)]
            words = words[len(empty) :]
            np.add.at(counts, (table, s), 3)
        found.append(symbols)
    if len(words) or (x != 2**16).any():
        raise ValueError("Expected a stream that ends where it began.")
    return found


def dequantized(h):
    """The weights of a coded tensor."""
    wide = np.float64 if h["type"] == "<f8" else np.float32
    rows = h["codes"].astype(wide) * np.exp2(h["e"] / 16).astype(wide)[:, None]
    dim, groups, shape = h["dim"], h["groups"], h["shape"]
    split = [shape[0] // groups, *shape[1:]]
    rows = rows.reshape(groups, shape[dim], *split[:dim], *split[dim + 1 :])
    weights = np.moveaxis(rows, 1, dim + 1).reshape(shape)
    if h["type"] != "bfloat16":
        return weights.astype(h["type"])
    bits = np.ascontiguousarray(weights).view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype("<u4").view("<f4")


def plain(h, file):
    """The values of a tensor that is not coded."""
    stored = STORED.get(h["storage"], h["type"])
    kind = np.dtype({"bfloat16": "<u2", "bool": "<u1"}.get(stored, stored))
    values = np.frombuffer(file.take(math.prod(h["shape"]) * kind.itemsize), kind).reshape(h["shape"])
    if stored == "bfloat16":
        return (values.astype("<u4") << 16).view("<f4")
    return values != 0 if stored == "bool" else values.astype(h["type"])
