"""The networks of the zoo that are not convolutional at heart: transformers, recurrent ones, perceptrons."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # as user code names it


def normal(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    """Makes one normal tensor (4, *shape) for each shape, the same ones at every call."""

    def inputs() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(7)
        return tuple(torch.randn(4, *shape, generator=generator) for shape in shapes)

    return inputs


def tokens(vocabulary: int, length: int) -> Callable[[], tuple[Tensor, ...]]:
    """Makes tokens (4, length) below ``vocabulary``, the same ones at every call."""
    return lambda: (torch.randint(vocabulary, (4, length), generator=torch.Generator().manual_seed(7)),)


def bags() -> tuple[Tensor, ...]:
    """The tokens of four texts in a row, and where each text starts."""
    flat = torch.randint(30, (22,), generator=torch.Generator().manual_seed(7))
    return flat, torch.tensor([0, 4, 9, 15])


class Mlp(nn.Module):
    """Linear, GELU, dropout, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.drop = nn.Dropout(0.1)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.act(self.fc1(x))))


class MixerBlock(nn.Module):
    """An MLP over the tokens, then one over the channels."""

    def __init__(self, dim: int, tokens: int, token_hidden: int, channel_hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.token_mlp = Mlp(tokens, token_hidden)
        self.norm2 = nn.LayerNorm(dim)
        self.channel_mlp = Mlp(dim, channel_hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mlp(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(self.norm2(x))


class MlpMixer(nn.Module):
    """Patches by a strided convolution, mixer blocks, the mean over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 14, 4, stride=4)
        self.blocks = nn.Sequential(MixerBlock(14, 16, 10, 24), MixerBlock(14, 16, 12, 20))
        self.norm = nn.LayerNorm(14)
        self.head = nn.Linear(14, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


class Vit(nn.Module):
    """Patches, class token, learned positions, torch's own encoder."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, stride=4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + 16, dim))
        layer = nn.TransformerEncoderLayer(
            dim, nhead=2, dim_feedforward=28, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, 10)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)
        x = torch.cat((cls_token, x), dim=1) + self.pos_embed
        return self.head(self.encoder(x)[:, 0])


class CausalSelfAttention(nn.Module):
    """Heads of one joint projection, by scaled_dot_product_attention."""

    def __init__(self, dim: int, n_head: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(dim, 3 * dim)
        self.c_proj = nn.Linear(dim, dim)
        self.n_head = n_head

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).chunk(3, dim=-1)
        q = q.view(b, t, self.n_head, -1).transpose(1, 2)
        k = k.view(b, t, self.n_head, -1).transpose(1, 2)
        v = v.view(b, t, self.n_head, -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class Block(nn.Module):
    """A decoder's block with its norms in front."""

    def __init__(self, dim: int, n_head: int, hidden: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = CausalSelfAttention(dim, n_head)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class CharTransformer(nn.Module):
    """A language model with learned positions; its output layer is its embedding."""

    def __init__(self, vocabulary: int = 22, context: int = 12, dim: int = 20) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, dim)
        self.wpe = nn.Embedding(context, dim)
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.ModuleList([Block(dim, 2, 32), Block(dim, 4, 24)])
        self.ln_f = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor) -> Tensor:
        pos = torch.arange(idx.size(1), device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(pos))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class MaskedTransformer(nn.Module):
    """Torch's own layers, norms behind, under a causal mask and sinusoidal positions."""

    positions: Tensor

    def __init__(self, vocabulary: int = 22, context: int = 12, dim: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        angles = torch.arange(context)[:, None] * 10000 ** (-torch.arange(0, dim, 2) / dim)
        self.register_buffer("positions", torch.stack([angles.sin(), angles.cos()], -1).flatten(1), persistent=False)
        layer = nn.TransformerEncoderLayer(dim, nhead=2, dim_feedforward=18, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=1)
        self.head = nn.Linear(dim, vocabulary)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embedding(idx) + self.positions[: idx.size(1)]
        mask = torch.ones(idx.size(1), idx.size(1), dtype=torch.bool, device=idx.device).triu(1)
        return self.head(self.encoder(x, mask=mask, is_causal=True))


class LstmClassifier(nn.Module):
    """Embedding, LSTM of two layers, linear on the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 10)
        self.lstm = nn.LSTM(10, 14, num_layers=2, batch_first=True, dropout=0.1)
        self.fc = nn.Linear(14, 5)

    def forward(self, idx: Tensor) -> Tensor:
        _, (h, _) = self.lstm(self.embedding(idx))
        return self.fc(h[-1])


class GruTagger(nn.Module):
    """A linear layer in front of a GRU and two behind it, at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 9)
        self.gru = nn.GRU(9, 13, batch_first=True)
        self.norm = nn.LayerNorm(13)
        self.fc1 = nn.Linear(13, 11)
        self.fc2 = nn.Linear(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.gru(torch.tanh(self.proj(x)))
        return self.fc2(F.relu(self.fc1(self.norm(out))))


class BagClassifier(nn.Module):
    """The mean of a text's embeddings, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(30, 12, mode="mean")
        self.fc1 = nn.Linear(12, 16)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, text: Tensor, offsets: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(self.embedding(text, offsets))))


class TwoTower(nn.Module):
    """An image and a vector, each through its tower, concatenated into linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.table = nn.Sequential(nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(12 * 4 + 10, 20), nn.ReLU(), nn.Dropout(0.1), nn.Linear(20, 5))

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        return self.head(torch.cat([self.image(image), self.table(table)], dim=1))


class BilinearHead(nn.Module):
    """Two towers of vectors, joined by nn.Bilinear."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(6, 14), nn.ReLU(), nn.Linear(14, 9), nn.Tanh())
        self.right = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 11), nn.Tanh())
        self.bilinear = nn.Bilinear(9, 11, 10)
        self.fc = nn.Linear(10, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.fc(F.relu(self.bilinear(self.left(left), self.right(right))))


class EinsumMlp(nn.Module):
    """Linear layers and attention written as einsum over the layers' weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 18)
        self.down = nn.Linear(18, 10)
        self.query = nn.Linear(10, 8, bias=False)
        self.key = nn.Linear(10, 8, bias=False)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(torch.einsum("bnd,ed->bne", x, self.up.weight) + self.up.bias)
        x = torch.einsum("bne,de->bnd", x, self.down.weight) + self.down.bias
        scores = torch.einsum("bnd,bmd->bnm", self.query(x), self.key(x))
        x = torch.einsum("bnm,bmd->bnd", scores.softmax(-1), x)
        return self.head(x.mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(3 * 64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1),
        nn.Linear(32, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.1),
        nn.Linear(20, 10),
    )  # fmt: skip


SEQUENCE: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "mlp": (mlp, normal((3, 8, 8))),
    "mlp_mixer": (MlpMixer, normal((3, 16, 16))),
    "vit": (Vit, normal((3, 16, 16))),
    "char_transformer": (CharTransformer, tokens(22, 12)),
    "masked_transformer": (MaskedTransformer, tokens(22, 10)),
    "lstm_classifier": (LstmClassifier, tokens(30, 11)),
    "gru": (GruTagger, normal((9, 6))),
    "embedding_bag": (BagClassifier, bags),
    "multi_input": (TwoTower, normal((3, 16, 16), (7,))),
    "bilinear": (BilinearHead, normal((6,), (8,))),
    "einsum": (EinsumMlp, normal((7, 6))),
}
