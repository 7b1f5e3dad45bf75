"""Tiny networks around an operation, and of two layers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WIDTH = 8
FIRST: dict[str, Callable[[], nn.Module]] = {
    "conv1d": lambda: nn.Conv1d(2, WIDTH, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(2, WIDTH, 3, padding=1),
    "conv3d": lambda: nn.Conv3d(2, WIDTH, 3, padding=1),
    "linear": lambda: nn.Linear(5, WIDTH),
    "tokens": lambda: nn.Linear(5, WIDTH, bias=False),
    "rows": lambda: nn.Linear(5, WIDTH),
    "vector": lambda: nn.Linear(5, WIDTH),
    "embedding": lambda: nn.Embedding(10, WIDTH),
    "bag": lambda: nn.EmbeddingBag(10, WIDTH),
    "frozen bag": lambda: nn.EmbeddingBag(10, WIDTH).requires_grad_(False),
    "float32": lambda: nn.Linear(5, WIDTH),
}
SHAPES = {
    "conv1d": (3, 2, 6),
    "conv2d": (3, 2, 6, 6),
    "conv3d": (3, 2, 4, 4, 4),
    "linear": (4, 5),
    "rows": (3, 5),
    "vector": (5,),
}
SHAPES |= {"tokens": (3, 6, 5), "float32": (3, 6, 5)}


class Around(nn.Module):
    """A layer of eight channels, what is to be tested, and a layer that reads the outcome."""

    def __init__(self, kind: str, body: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.body = FIRST[kind](), body
        self.dtype = torch.float32 if kind == "float32" else torch.float64
        self.to(self.dtype).train()
        with torch.no_grad():
            x = self.body(self.first(self.example(kind)))
        self.last: nn.Module = nn.Linear(x.shape[-1], 3)
        if x.dim() > 2 and kind.startswith("conv") and x.shape[-1] != WIDTH:  # channels are still where they were
            self.last = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[x.dim()](x.shape[1], 3, 1)
        self.to(self.dtype)

    def example(self, kind: str) -> Tensor:
        if kind in ("embedding", "bag", "frozen bag"):
            return torch.arange(12).view(3, 4) % 10
        return torch.randn(SHAPES[kind], dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)))


@dataclass(frozen=True)
class Case:
    """A body between two layers.

    Args:
        body: A function or a module; a function that takes none makes the module.
        kind: What comes before it.
        free: How many channels of the first layer may go (channels that go together count once).
        reason: What the reason says why the others stay.
        mode: Under which the step is watched.
    """

    body: Callable[..., Tensor]
    kind: str = "conv2d"
    free: int = WIDTH
    reason: str = ""
    mode: Callable[[], object] = torch.enable_grad

    def make(self) -> nn.Module:
        return Around(self.kind, self.body() if isinstance(self.body, type) else self.body)


def pinned(body: Callable[..., Tensor], reason: str, kind: str = "conv2d", mode: object = torch.enable_grad) -> Case:
    return Case(body, kind, 0, reason, mode)


def filled(fill: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Uses numbers in the shape of x, in a way that does not depend on them."""
    return lambda x: x * (1 + 0 * fill(x))


def module(build: Callable[[nn.Module], None], forward: Callable[..., Tensor]) -> type[nn.Module]:
    """A class of modules."""

    def init(self: nn.Module) -> None:
        nn.Module.__init__(self)
        build(self)

    return type("Body", (nn.Module,), {"__init__": init, "forward": forward})


def with_linear(forward: Callable[[nn.Linear, Tensor], Tensor], bias: bool = True) -> type[nn.Module]:
    def build(self: nn.Module) -> None:
        self.linear = nn.Linear(WIDTH, WIDTH, bias=bias)

    return module(build, lambda self, x: forward(self.linear, x))


def with_layer(make: Callable[[], nn.Module]) -> type[nn.Module]:
    return module(lambda self: setattr(self, "layer", make()), lambda self, x: self.layer(x))


def with_norm(forward: Callable[[nn.BatchNorm2d, Tensor], Tensor]) -> type[nn.Module]:
    return module(lambda self: setattr(self, "norm", nn.BatchNorm2d(WIDTH)), lambda self, x: forward(self.norm, x))


def legit(name: str) -> type[nn.Module]:
    """Batch normalization under one of its many names."""

    def forward(n: nn.BatchNorm2d, x: Tensor) -> Tensor:
        op = getattr(torch.ops.aten, name)
        return op(x, n.weight, n.bias, n.running_mean.clone(), n.running_var.clone(), *middle, 0.1, 1e-5)[0]

    middle = () if name == "_batch_norm_with_update" else (True,)
    return with_norm(forward)


X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).double()
IMAGES = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0)).double()


def small_net() -> nn.Sequential:
    """Eight channels between two convolutions, five outputs."""
    first, last = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 4, 3)
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), last, nn.Flatten(), nn.Linear(16, 5))


class Calling(nn.Module):
    """Two linear layers of eight channels between them, called as a test says: ``call(self, x)``."""

    def __init__(self, call, **more: nn.Module) -> None:
        super().__init__()
        self.first, self.last, self.call = nn.Linear(5, 8), nn.Linear(8, 3), call
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.call(self, x)
