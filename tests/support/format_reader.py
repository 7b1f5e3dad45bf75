"""A second reader of packed files, written from docs/format.md alone, in plain Python and NumPy.

    tensors, attributes = read(Path("network.scnn").read_bytes())

Tensors are arrays by name; bfloat16 comes as float32, which holds the same values.
"""

import math
import zlib

import numpy as np

TYPES = "<f4 <f8 <f2 bfloat16 <u1 <i1 <i2 <i4 <i8 bool <c8 <c16".split()  # noqa: SIM905 - shorter
STORED = {1: "<f2", 3: "<i1", 4: "<i2", 5: "<i4", 6: "<i1", 7: "<u1"}
CODED, SCALED, LOGARITHMIC, SAME = 2, 6, 7, 8
FORMS = {2: SCALED, 3: LOGARITHMIC, 4: 0, 5: 1, 6: SAME}
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

    def zigzag(self):
        u = self.varint()
        return -(u + 1) // 2 if u % 2 else u // 2

    def name(self, path):
        tag = self.take(1)[0]
        if not tag & 16:
            more, dropped = divmod(self.varint(), 8)
            dropped += self.varint() if dropped == 7 else 0
            path = path[: len(path) - dropped] + self.take(more)
        return path, path.decode() + ("." + WORDS.split()[tag % 16 - 1] if tag % 16 else ""), tag >> 5


def read(data):
    """All tensors of a file by name, and its attributes by name."""
    if data[:4] != b"SCNN" or data[4:5] != b"\x01":
        raise ValueError("Expected a packed file of version 1.")
    if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise ValueError("Expected a checksum that fits.")
    file, heads, path, attributes = Bytes(data[5:-4]), [], b"", {}
    count, some = divmod(file.varint(), 2)
    size, exponent = 0, -64  # C and the first exponent of the coded tensor before
    while len(heads) < count:
        path, name, form = file.name(path)
        h = {"name": name, "type": "<f4", "storage": FORMS.get(form, CODED), "shape": (size,), "dim": 0, "groups": 1}
        heads.append(h)
        if form == 0:
            h["storage"], kind = divmod(file.take(1)[0], 16)
            h["type"], h["shape"] = TYPES[kind], tuple(file.varint() for _ in range(file.varint()))
            if h["storage"] == CODED:
                h["dim"], h["groups"] = file.varint(), file.varint()
            elif len(h["shape"]) == 1:
                size = h["shape"][0]
        elif form in (1, 7):
            flags, shape = file.varint(), []
            for d in range(flags % 32):
                last = flags & 64 and d == flags % 32 - 1
                shape.append(size if flags & 32 and d == 1 else shape[-1] if last else file.varint())
            h["shape"] = tuple(shape)
        if h["storage"] == CODED:
            exponent = read_alphabets(h, file, exponent)
            size = h["shape"][h["dim"]] * h["groups"]
        if form == 7:
            heads.append({"name": path.decode() + ".bias", "type": "<f4", "storage": SCALED, "shape": (size,)})
    for _ in range(file.varint() if some else 0):
        path, name, _ = file.name(path)
        attributes[name] = file.varint()
    held = 0
    if any(h["storage"] == CODED for h in heads):
        file, held = read_codes([h for h in heads if h["storage"] == CODED], file)
    values = {h["name"]: dequantized(h) if h["storage"] == CODED else plain(h, file) for h in heads}
    if len(file.data) > max(file.at, held) or any(file.data[file.at :]):
        raise ValueError("Expected the end of the file.")
    return values, attributes


def read_alphabets(h, file, exponent):
    """Gives a head its alphabets and its first exponent, which it returns, by that of the coded tensor before."""
    classes, shares = divmod(file.varint(), 2)
    h["levels"], h["level"] = divmod(classes, 79)
    h["exponents"] = file.varint()
    h["first"] = exponent + file.zigzag()
    h["symbols"] = file.varint()
    h["shares"], h["share"] = divmod(file.varint(), 15) if shares else (0, 0)
    h["bounds"] = file.varint() if shares else 1
    return h["first"]


def read_codes(coded, file):
    """Gives each head its exponents (channels,) and its codes (channels, R); returns what follows the stream."""
    stream = Stream(file.data[file.at :])
    channels = [np.zeros(h["shape"][h["dim"]] * h["groups"], int) for h in coded]
    counts = [np.full((1, 1 + h["levels"] + h["shares"]), 10) for h in coded]
    classes = stream.group(list(zip(channels, counts, strict=True)))
    tables = [(np.zeros((c > 0).sum(), int), h) for h, c in zip(coded, classes, strict=True)]
    found = stream.group([(t, np.full((1, h[key]), 10)) for t, h in tables for key in ("exponents", "bounds")])
    parts = []
    for h, c, exponents, bounds in zip(coded, classes, found[::2], found[1::2], strict=True):
        others = math.prod(n for d, n in enumerate(h["shape"]) if d != h["dim"])
        h["row"], h["alive"], h["e"] = others // h["groups"], c > 0, np.zeros(len(c), int)
        h["e"][h["alive"]], h["k"] = exponents + h["first"], np.tile(bounds, others // h["groups"])
        start = [level_counts(h["level"] + i)[: h["symbols"]] for i in range(h["levels"])]
        for i in range(h["shares"]):
            w = 128 >> (14 - h["share"] - i)
            others = [1 + w // max(h["symbols"] - 2, 1)] * h["symbols"]
            start.append(([1 + (128 - w) // 2] * 2 + others)[: h["symbols"]])
        parts.append((np.tile(c[c > 0] - 1, h["row"]), np.array(start or [[1] * h["symbols"]])))
    symbols = stream.group(parts)
    if (stream.x >> 16 != 1).any():
        raise ValueError("Expected a stream that ends where it began.")
    file = Bytes(stream.x.astype("<u2").tobytes() + file.data[file.at + 2 * stream.at :])
    for h, symbol in zip(coded, symbols, strict=True):
        codes_of(h, symbol, file)
    return file, 2 * len(stream.x)


def codes_of(h, symbol, file):
    """Gives a head its codes (channels, R)."""
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


def level_counts(level):
    """The counts at the start of a level's table."""
    n = level - 16
    r = (math.isqrt((1 << 128) + (1 << 128 + n)) - (1 << 64) << 64) // math.isqrt(1 << 128 + n)
    m = [1 << 64]
    for _ in range(7):
        m.append(m[-1] * r >> 64)
    p, q = m[7] * r >> 64, sum(m)
    for _ in range(28):
        m.append(p * q >> 64)
        p, q = p * p >> 64, q + m[-1]
    m = [m[0], *(mass for mass in m[1:] for _ in range(2))]
    return [1 + (1024 if n < 4 else 256) * mass // sum(m) for mass in m] + [1, 1]


class Stream:
    def __init__(self, data):
        self.words, self.at = np.frombuffer(data, "<u2", len(data) // 2).astype(int), 0
        self.x = np.zeros(0, int)

    def group(self, parts):
        """The symbols of each part, which is the table of each symbol and the counts at the start."""
        total = sum(len(table_of) for table_of, _ in parts)
        more = max(0, max(1, min(total // 2048, 64 + total // 16384)) - len(self.x))
        states = self.words[self.at : self.at + 2 * more].reshape(more, 2)
        self.x, self.at = np.append(self.x, states @ [1, 1 << 16]), self.at + 2 * more
        return [self.part(table_of, counts.copy()) for table_of, counts in parts]

    def part(self, table_of, counts):
        x, lanes, (tables, alphabet) = self.x, len(self.x), counts.shape
        symbols, until = np.zeros(len(table_of), int), 0
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
            x[empty] = x[empty] * 2**16 + self.words[self.at : self.at + len(empty)]
            self.at += len(empty)
            np.add.at(counts, (table, s), 16)
        return symbols


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
    stored, shape = STORED.get(h["storage"], h["type"]), h["shape"]
    first = file.zigzag() if h["storage"] in (SCALED, LOGARITHMIC) else 0
    kind = np.dtype({"bfloat16": "<u2", "bool": "<u1"}.get(stored, stored))
    count = 1 if h["storage"] == SAME else math.prod(shape)
    values = np.frombuffer(file.take(count * kind.itemsize), kind)
    values = np.broadcast_to(values, shape) if h["storage"] == SAME else values.reshape(shape)
    if h["storage"] == SCALED:
        return np.ldexp(values.astype(float), first).astype("<f4")
    if h["storage"] == LOGARITHMIC:
        return np.exp2((values.astype(int) + first) / 16).astype("<f4")
    if stored == "bfloat16":
        return (values.astype("<u4") << 16).view("<f4")
    return values != 0 if stored == "bool" else values.astype(h["type"])
