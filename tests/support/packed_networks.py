"""Networks of every kind that a packed file may hold, with random depths and exponents; files that may be damaged."""

import time
import zlib

import torch
from depths import mixed_net, with_depths
from killing import randomize
from torch import nn
from zoo import ZOO

from lightning_selfcompress.errors import PackedFileError
from lightning_selfcompress.packing import from_bytes
from lightning_selfcompress.quantize.parameters import quantized_parameters


def with_random_codes(model):
    """The model, converted, its channels at random depths from dead to 9 bits and at random exponents."""
    with_depths(model)
    randomize(model)
    return model


class Buffers(nn.Module):
    """Whole numbers that fit narrower types, or do not, truth values and complex numbers."""

    def __init__(self):
        super().__init__()
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
            for largest in (100, 30_000, 2**31 - 1, 2**62):
                if largest <= torch.iinfo(dtype).max:
                    name = f"{dtype}_{largest}".removeprefix("torch.")
                    self.register_buffer(name, torch.tensor([[0, largest, -largest]]).to(dtype))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("phase", torch.randn(2, 3, dtype=torch.complex64))
        self.register_buffer("wide_phase", torch.randn(2, dtype=torch.complex128))
        self.register_buffer("halves", torch.tensor([0.5, -0.0, float("inf")]))
        self.register_buffer("unusual", torch.tensor([float("nan"), 1e-40, 3e38]))
        self.register_buffer("temporary", torch.ones(3), persistent=False)
        self.register_buffer("scalar", torch.tensor(7))
        self.lin = nn.Linear(3, 4)


def tied():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9, bias=False))
    model[1].weight = model[0].weight
    return model


def empty_tensors():
    model = nn.Module()
    model.lin = nn.Linear(3, 4)
    model.none = nn.Parameter(torch.zeros(0, 5))
    model.register_buffer("nothing", torch.zeros(3, 0, dtype=torch.int64))
    return model


def without_channels():
    """A network whose layers lost all output channels, or all inputs."""
    model = with_random_codes(nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)}))
    a, b = model["a"], model["b"]
    for owner, name, shape in (
        (a, "weight", (0, 3)),
        (a, "bit_depth", (0,)),
        (a, "exponent", (0,)),
        (a, "bias", (0,)),
        (b, "weight", (2, 0)),
    ):
        table = owner._parameters if name in owner._parameters else owner._buffers
        table[name] = nn.Parameter(torch.zeros(shape)) if table is owner._parameters else torch.zeros(shape)
    for layer in model.values():
        layer.forget_quantized()
    return model


def large_codes(bits=24):
    """Codes of many bits, in one layer together with small ones."""
    model = with_random_codes(nn.Sequential(nn.Linear(20, 30), nn.Conv2d(3, 4, 3)))
    with torch.no_grad():
        for p in quantized_parameters(model):
            p.raw_depth.copy_(torch.linspace(0, bits, p.channels))
            p.exponent.sub_(p.raw_depth.round())
            p.latent.mul_(5)
    return model


def clipped():
    """Channels that have most of their weights at the ends of narrow clip ranges and of wide ones, and dead ones."""
    model = with_random_codes(
        nn.Sequential(nn.Linear(64, 26), nn.Conv2d(4, 13, 5), nn.ConvTranspose2d(4, 26, 5, groups=2))
    )
    depths = [-1, 1, 1.6, 2, 2.6, 3, 4.7, 7.9, 8, 8.1, 12.9, 13, 14]
    with torch.no_grad():
        for p in quantized_parameters(model):
            p.raw_depth.copy_(torch.tensor(depths).repeat(p.channels // len(depths)))
            p.exponent.copy_(1.6 - p.raw_depth)
            nn.init.normal_(p.latent)
    return model


def dead():
    model = with_random_codes(nn.Sequential(nn.Linear(5, 4), nn.Conv2d(3, 6, 3, groups=3)))
    with torch.no_grad():
        for p in quantized_parameters(model):
            p.raw_depth.fill_(-1)
    return model


def far_exponents():
    """Exponents as far apart as they may be, and beyond."""
    model = with_random_codes(nn.Linear(6, 7))
    with torch.no_grad():
        model.exponent.copy_(torch.tensor([-200.0, -128.0, -3.0, 0.0, 12.0, 120.0, 300.0]))
    return model


def convolutions():
    return nn.ModuleDict(
        {
            "grouped": nn.Conv2d(8, 12, 3, groups=4),
            "up": nn.ConvTranspose2d(8, 12, 3, groups=4),
            "up1": nn.ConvTranspose1d(4, 6, 3),
            "up3": nn.ConvTranspose3d(4, 6, 2, groups=2),
            "deep": nn.Conv3d(3, 5, (1, 2, 3)),
            "größe": nn.Conv1d(4, 6, 3, groups=2),
            "größer": nn.Linear(3, 2),
            "grün": nn.Bilinear(3, 4, 5),
        }
    )


def many_codes():
    """Enough weights for several lanes, and a layer with less than one symbol a lane."""
    return nn.Sequential(nn.Linear(300, 64), nn.Linear(3, 1), nn.Linear(64, 100))


SPECIAL = {
    "mixed": lambda: with_random_codes(mixed_net()),
    "convolutions": lambda: with_random_codes(convolutions()),
    "tied": lambda: with_random_codes(tied()),
    "double": lambda: with_random_codes(mixed_net().double()),
    "bfloat16": lambda: with_random_codes(mixed_net().bfloat16()),
    "float16": lambda: with_random_codes(mixed_net().half()),
    "double later": lambda: with_random_codes(mixed_net()).double(),
    "buffers": lambda: with_random_codes(Buffers()),
    "never converted": lambda: nn.Sequential(mixed_net(), Buffers()),
    "empty": nn.Module,
    "empty tensors": lambda: with_random_codes(empty_tensors()),
    "without channels": without_channels,
    "clipped": clipped,
    "24 bits": large_codes,
    "31 bits in double": lambda: large_codes(31).double(),
    "dead": dead,
    "far exponents": far_exponents,
    "one layer": lambda: with_random_codes(nn.Linear(2, 1)),
    "many codes": lambda: with_random_codes(many_codes()),
    "very many codes": lambda: with_random_codes(nn.Linear(600, 400)),  # more lanes than 64
}
NETWORKS = {**SPECIAL, **{name: lambda entry=entry: with_random_codes(entry.make()) for name, entry in ZOO.items()}}


def sealed(content):
    """A file of this content, with the checksum that belongs to it."""
    return content + zlib.crc32(content).to_bytes(4, "little")


def read_or_refuse(data):
    """What is read, or None where the file is refused; it takes no longer than some seconds."""
    start = time.perf_counter()
    try:
        return from_bytes(data)
    except PackedFileError:
        return None
    finally:
        assert time.perf_counter() - start < 5
