"""One tiny network for each operation that the channel graph has a rule for."""

from collections.abc import Callable

import torch
from graph_nets import WIDTH, Case, filled, legit, module, pinned, with_layer, with_linear, with_norm
from index_cases import INDEX_CASES
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # as user code names it


def attended(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = None if mask is None else mask.unsqueeze(1)
    return F.scaled_dot_product_attention(*(t.unsqueeze(1) for t in (q.contiguous(), k, k)), attn_mask=mask).squeeze(1)


class Attention(nn.Module):
    """Fused attention over positions, of one head."""

    def __init__(self, scale: float | None = 1.0) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unsqueeze(1) for layer in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale).squeeze(1)


def interpolated(mode: str, size: int = 9, **options: bool) -> Callable[[Tensor], Tensor]:
    return lambda x: F.interpolate(x, size=(size,) * (x.dim() - 2), mode=mode, **options)


def sampled(x: Tensor) -> Tensor:
    n = x.dim() - 2
    theta = torch.eye(n, n + 1, dtype=x.dtype).expand(x.shape[0], n, n + 1) * 0.7
    grid = F.affine_grid(theta, [x.shape[0], 1, *x.shape[2:]], align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def pooled_at_random(x: Tensor) -> Tensor:
    samples = torch.full((x.shape[0], x.shape[1], 2), 0.5, dtype=x.dtype)
    return F.fractional_max_pool2d(x, 2, output_size=3, _random_samples=samples)


def written_to(x: Tensor) -> Tensor:
    mask = torch.ones(1, 1, 1, 1).repeat(1, x.shape[1], 1, 1)
    mask[:, 0] = 0
    return x * mask


def mixed(x: Tensor) -> Tensor:
    """Quarters that are zero when dead, beside quarters that are not."""
    one, two, three, four = x.split(x.shape[1] // 4, 1)
    return torch.cat([one, two.cos(), three, four.cos()], 1)


def part_zero(x: Tensor) -> Tensor:
    """A half that is zero when dead, then a half that is not."""
    one, two = x.split(x.shape[1] // 2, 1)
    return torch.cat([one, two.cos()], 1)


ATEN = torch.ops.aten
SUMS = "d at last sums over it, and "
CASES = {
    # moves
    "as_strided": Case(lambda x: x.as_strided(x.shape, x.stride())),
    "as_strided, another shape": pinned(lambda x: x.as_strided((3, 8, 6), (288, 36, 1)), "as_strided looks at memory"),
    "view": Case(lambda x: x.view(x.shape[0], -1, 2, x.shape[2] // 2, x.shape[3])[:, :, 0]),
    "view, flattened": Case(lambda x: x.view(x.shape[0], -1)),
    "view, two groups": Case(lambda x: x.view(x.shape[0], 2, -1, *x.shape[2:])[:, 1], free=4),
    "view, two groups, one not zero": pinned(lambda x: part_zero(x).view(x.shape[0], 2, -1, *x.shape[2:])[:, 1], SUMS),
    "view, a single channel": pinned(
        lambda x: x.repeat_interleave(4, 1)[:, :4].unflatten(1, (2, 2))[:, 0], "view splits a single channel"
    ),
    "view, batch": Case(lambda x: x.view(x.shape[0] * x.shape[1], 1, *x.shape[2:]).relu().view(x.shape)),
    "view, batch and bias": pinned(
        module(
            lambda self: setattr(self, "conv", nn.Conv2d(1, 1, 3, padding=1)),
            lambda self, x: self.conv(x.view(-1, 1, *x.shape[2:])).view(x.shape),
        ),
        SUMS,
    ),
    "view, two dimensions of channels": pinned(
        lambda x: (x.unsqueeze(1) * x.unsqueeze(2)).view(x.shape[0], -1, *x.shape[2:]), "view merges channels"
    ),
    "_unsafe_view": Case(lambda x: x.relu(), "tokens"),
    "_reshape_alias": Case(lambda x: ATEN._reshape_alias(x, [x.shape[0], x[0].numel()], [x.stride(0), 1])),
    "view_copy": Case(lambda x: torch.view_copy(x, (x.shape[0], -1))),
    "t": Case(lambda x: x.t().relu().t(), "linear"),
    "transpose": Case(lambda x: x.transpose(1, 3)),
    "permute": Case(lambda x: x.permute(0, 2, -1, 1)),
    "unsqueeze": Case(lambda x: x.unsqueeze(-2)),
    "squeeze": Case(lambda x: x.mean(-1, keepdim=True).squeeze(-1)),
    "expand": Case(lambda x: x * torch.full((1, 1, 6, 6), 2.0).expand_as(x)),
    "expand, summed with what is not zero": pinned(
        lambda x: x.sigmoid() @ torch.full((1, 2), 2.0, dtype=x.dtype).expand(x.shape[1], 2),
        "mm sums over it",
        "linear",
    ),
    "repeat": Case(lambda x: x.repeat(1, 2, 1, 1)),
    "repeat, written to": pinned(written_to, "mul combines it with a tensor of a fixed size"),
    "flip": Case(lambda x: x.flip(1)),
    "roll": Case(lambda x: x.roll(1, -1)),
    "roll, channels": pinned(lambda x: x.roll(1, 1), "roll moves"),
    "select": Case(lambda x: x.select(-1, 2)),
    "select, channel": pinned(lambda x: x[:, 3].unsqueeze(1), "select picks a channel by its number"),
    "slice": Case(lambda x: x[:, :, 1:3]),
    "slice, half": Case(lambda x: x[:, x.shape[1] // 2 :], free=4),
    "slice, the half that is not zero": pinned(lambda x: part_zero(x)[:, x.shape[1] // 2 :], SUMS),
    "slice, by numbers": pinned(lambda x: x[:, 1:5], "slice takes channels by their numbers"),
    "split": Case(lambda x: torch.cat(x.split(x.shape[1] // 2, 1), 2), free=4),
    "split, unequal": pinned(lambda x: x.split(5, 1)[0], "split cuts its channels at given numbers"),
    "split_with_sizes": Case(lambda x: x.split([x.shape[1] // 4] * 4, 1)[1], free=2),
    "unsafe_split": Case(lambda x: torch.unsafe_split(x, x.shape[1] // 2, 1)[0], free=4),
    "unsafe_split_with_sizes": Case(lambda x: torch.unsafe_split_with_sizes(x, [x.shape[1] // 2] * 2, 1)[0], free=4),
    "unbind": Case(lambda x: x.unbind(-1)[0]),
    "unbind, channels": pinned(lambda x: torch.stack(x.unbind(1), 1), "unbind picks a channel by its number"),
    "cat": Case(lambda x: torch.cat([x, x.relu()], 1)),
    "cat, half of it not zero": pinned(lambda x: torch.cat([x, x.cos()], 1), SUMS),
    "cat, with an input": Case(lambda x: torch.cat([x, x.new_ones(3, 2, 6, 6), x], 1)),
    "cat, space": pinned(lambda x: torch.cat([x, torch.ones_like(x)], 2), SUMS),
    "stack": Case(lambda x: torch.stack([x, x.flip(1)], 2), free=4),
    "stack, one not zero": pinned(lambda x: torch.stack([x, x.cos()], 2), SUMS),
    "constant_pad_nd": Case(lambda x: F.pad(x, (1, 0, 0, 1))),
    "constant_pad_nd, ones": pinned(lambda x: F.pad(x, (1, 0), value=1.0), SUMS),
    "constant_pad_nd, channels": Case(lambda x: F.pad(x, (0, 0, 0, 0, 2, 1), value=3.0)),
    "constant_pad_nd, cut": pinned(lambda x: F.pad(x, (0, 0, 0, 0, -1, 0)), "constant_pad_nd cuts off channels"),
    "pixel_shuffle": Case(lambda x: F.pixel_shuffle(x, 2), free=2),
    "pixel_shuffle, not all zero": pinned(lambda x: F.pixel_shuffle(mixed(x), 2), SUMS),
    "pixel_shuffle, channels in space": pinned(
        lambda x: F.pixel_shuffle(x.transpose(1, 2)[:, :4], 2), "pixel_shuffle takes its channels for positions"
    ),
    "pixel_unshuffle": Case(lambda x: F.pixel_unshuffle(x, 2)),
    "pixel_unshuffle, channels in space": pinned(
        lambda x: F.pixel_unshuffle(x.transpose(1, 2), 2), "pixel_unshuffle takes its channels for positions"
    ),
    "channel_shuffle": Case(lambda x: F.channel_shuffle(x, 2), free=4),
    "native_channel_shuffle": Case(lambda x: torch.native_channel_shuffle(x, 2), free=4),
    "index": Case(lambda x: x[:, :, torch.tensor([1, 3])]),
    "index, channels": pinned(lambda x: x[:, torch.tensor([1, 3])], "index picks channels by their numbers"),
    "index, mask": Case(lambda x: x[torch.tensor([True, False, True])]),
    "index, by numbers of channels": pinned(
        lambda x: torch.ones(36, 2, dtype=x.dtype)[x.flatten(2).argmax(-1)].flatten(1),
        "index takes its channels for num",
    ),
    "index_select": Case(lambda x: x.index_select(2, torch.tensor([1, 3]))),
    "index_select, channels": pinned(lambda x: x.index_select(1, torch.tensor([1, 3])), "index_select picks channels"),
    "index_select, by numbers of channels": pinned(
        lambda x: torch.ones(36, 2).to(x).index_select(0, x[0].flatten(1).argmax(-1)), "index_select takes its channels"
    ),
    "unfold": Case(lambda x: x.unfold(2, 2, 2)),
    "unfold, channels": pinned(lambda x: x.unfold(1, 2, 2)[..., 0], "unfold slides over its channels"),
    "im2col": Case(lambda x: F.unfold(x, 2)),
    "im2col, channels in space": pinned(lambda x: F.unfold(x.transpose(1, 2), 2), "im2col takes its channels for pos"),
    # random and constant numbers
    "native_dropout": Case(lambda x: torch.native_dropout(x, 0.0, True)[0]),
    "native_dropout, mask": pinned(lambda x: torch.native_dropout(x, 0.0, True)[1].to(x), SUMS),
    "rrelu_with_noise": Case(lambda x: F.rrelu(x, 0.2, 0.2, training=True)),
    "glu": Case(lambda x: F.glu(x, 1), free=4),
    "zeros_like": Case(lambda x: x + torch.zeros_like(x)),
    "new_empty": Case(lambda x: x * x.new_empty(x.shape[0], 1, 1, 1).fill_(2.0)),
    "new_empty_strided": Case(lambda x: x * x.new_empty_strided((1,), (1,)).fill_(2.0)),
    "new_zeros": Case(lambda x: x * (1 + x.new_zeros(1))),
    "new_zeros, by width": Case(lambda x: x + x.new_zeros(x.shape)),
    "new_ones": Case(lambda x: x * x.new_ones(1)),
    "new_full": Case(lambda x: x * x.new_full((1,), 3.0)),
    "bernoulli": Case(filled(lambda x: torch.bernoulli(x.sigmoid()))),
    "bernoulli_": Case(with_layer(lambda: nn.Dropout2d(0.3))),
    "bernoulli_, of another": Case(filled(lambda x: torch.empty_like(x).bernoulli_(x.flip(1).sigmoid())), free=4),
    "empty_like": Case(filled(lambda x: torch.empty_like(x).zero_())),
    "ones_like": pinned(lambda x: x + torch.ones_like(x), SUMS),
    "full_like": Case(filled(lambda x: torch.full_like(x, 2.0))),
    "rand_like": Case(filled(torch.rand_like)),
    "randn_like": Case(filled(torch.randn_like)),
    "randint_like": Case(filled(lambda x: torch.randint_like(x, 9))),
    "uniform": Case(filled(lambda x: torch.empty_like(x).uniform_())),
    "normal": Case(filled(lambda x: torch.normal(x, x.flip(1).abs())), free=4),
    "exponential": Case(filled(lambda x: torch.empty_like(x).exponential_())),
    "random": Case(filled(lambda x: torch.empty_like(x).random_(5))),
    "geometric": Case(filled(lambda x: torch.empty_like(x).geometric_(0.5))),
    "log_normal": Case(filled(lambda x: torch.empty_like(x).log_normal_())),
    "cauchy": Case(filled(lambda x: torch.empty_like(x).cauchy_())),
    # products
    "mm": Case(with_linear(lambda layer, x: layer(x), bias=False), "linear"),
    "mm, with constants": Case(lambda x: x @ torch.ones(x.shape[1], 2).to(x), "linear"),
    "mm, with constants that vary": pinned(
        lambda x: x @ torch.arange(2.0 * x.shape[1]).view(-1, 2).to(x),
        "mm combines it with a tensor of a fixed size",
        "linear",
    ),
    "addmm": Case(with_linear(lambda layer, x: layer(x)), "linear"),
    "addmm, to what is not zero": pinned(
        with_linear(lambda layer, x: torch.addmm(x.cos(), x, layer.weight.t())), "Linear at last sums over it", "linear"
    ),
    "addmm, an input too": pinned(
        with_linear(lambda layer, x: layer(x) + layer(torch.arange(4.0 * WIDTH).view(4, WIDTH).to(x))),
        "Linear at body.linear combines it with a tensor of a fixed size",
        "linear",
    ),
    "addmm, ones too": pinned(
        with_linear(lambda layer, x: layer(x) + layer(torch.ones(4, WIDTH).to(x))),
        "Linear at body.linear sums over it, and",
        "linear",
    ),
    "bmm": Case(lambda x: torch.bmm(x, x.transpose(1, 2).relu() @ x), "tokens"),
    "baddbmm": Case(lambda x: torch.baddbmm(x, x @ x.transpose(1, 2), x), "tokens"),
    "mv": Case(with_linear(lambda layer, x: layer.weight.mv(x), bias=False), "vector"),
    "addmv": Case(with_linear(lambda layer, x: torch.addmv(layer.bias, layer.weight, x)), "vector"),
    "dot": Case(lambda x: x * x.dot(x.relu()), "vector"),
    "dot, not zero": pinned(lambda x: x * x.sigmoid().dot(x.cos()), "dot sums over it", "vector"),
    "vdot": Case(lambda x: x * torch.vdot(x, x.relu()), "vector"),
    "_addmm_activation": Case(
        with_linear(lambda layer, x: torch._addmm_activation(layer.bias, x, layer.weight.t())), "linear"
    ),
    "_trilinear": Case(
        module(
            lambda self: setattr(self, "layer", nn.Bilinear(WIDTH, WIDTH, 4)), lambda self, x: self.layer(x, x.relu())
        ),
        "linear",
    ),
    "_trilinear, not zero": pinned(
        module(
            lambda self: setattr(self, "layer", nn.Bilinear(WIDTH, WIDTH, 4)),
            lambda self, x: self.layer(x.cos(), x.cos()),
        ),
        "Bilinear at body.layer sums over it, and cos in Body at body leaves it other than zero when it is dead",
        "linear",
    ),
    "convolution": Case(with_layer(lambda: nn.Conv2d(WIDTH, 6, 3))),
    "convolution, channels in space": pinned(
        module(lambda self: setattr(self, "conv", nn.Conv2d(6, 6, 1)), lambda self, x: self.conv(x.transpose(1, 2))),
        "Conv2d at body.conv slides over it",
    ),
    "convolution, another shift": Case(
        module(
            lambda self: setattr(self, "conv", nn.Conv2d(WIDTH, WIDTH, 3)),
            lambda self, x: F.conv2d(x, self.conv.weight, self.conv.bias + 1),
        )
    ),
    "convolution, depthwise, fixed kernel": pinned(
        lambda x: F.conv2d(x, torch.arange(9.0 * x.shape[1]).view(-1, 1, 3, 3).to(x), groups=x.shape[1]),
        "convolution combines it with a tensor of a fixed size",
    ),
    "convolution, depthwise, box filter": Case(
        lambda x: F.conv2d(x, torch.full((x.shape[1], 1, 3, 3), 1 / 9).to(x), groups=x.shape[1])
    ),
    "convolution, transposed, groups, scaled weight": pinned(
        module(
            lambda self: setattr(self, "conv", nn.ConvTranspose2d(WIDTH, 6, 3, groups=2)),
            lambda self, x: F.conv_transpose2d(x, self.conv.weight * 2, self.conv.bias, groups=2),
        ),
        "mul in Body at body is applied to a weight in groups",
    ),
    "convolution, transposed, weight in other groups": pinned(
        module(
            lambda self: setattr(self, "conv", nn.ConvTranspose2d(WIDTH, 4, 3, groups=2)),
            lambda self, x: F.conv_transpose2d(x, self.conv.weight, self.conv.bias[:2]),
        ),
        "convolution in Body at body reads a weight in other groups",
    ),
    "convolution, groups": Case(with_layer(lambda: nn.Conv2d(WIDTH, 6, 3, groups=2)), free=4),
    "convolution, depthwise": Case(with_layer(lambda: nn.Conv2d(WIDTH, WIDTH, 3, groups=WIDTH))),
    "convolution, depthwise, several outputs": Case(with_layer(lambda: nn.Conv2d(WIDTH, 16, 3, groups=WIDTH))),
    "convolution, transposed": Case(with_layer(lambda: nn.ConvTranspose2d(WIDTH, 6, 3))),
    "convolution, transposed, groups": Case(with_layer(lambda: nn.ConvTranspose2d(WIDTH, 6, 3, groups=2)), free=4),
    "convolution, transposed, depthwise": Case(with_layer(lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 2, groups=WIDTH))),
    "convolution, transposed, depthwise, several outputs": Case(
        with_layer(lambda: nn.ConvTranspose2d(WIDTH, 16, 2, groups=WIDTH))
    ),
    "convolution, circular": Case(with_layer(lambda: nn.Conv2d(WIDTH, 6, 3, padding=1, padding_mode="circular"))),
    "convolution, in inference mode": Case(
        with_layer(lambda: nn.Sequential(nn.Conv2d(WIDTH, 6, 3), nn.BatchNorm2d(6), nn.MaxPool2d(2), nn.Flatten())),
        mode=torch.inference_mode,
    ),
    "_scaled_dot_product_flash_attention_for_cpu": Case(Attention, "tokens"),
    "_scaled_dot_product_flash_attention_for_cpu, scaled by width": pinned(
        lambda x: F.scaled_dot_product_attention(*[x.unsqueeze(1)] * 3).squeeze(1),
        "scaled_dot_product_attention scales by the number of channels",
        "tokens",
    ),
    "_scaled_dot_product_flash_attention_for_cpu, over channels": pinned(
        lambda x: attended(x.mT, x.mT.contiguous()).mT,
        "scaled_dot_product_attention takes its channels for positions",
        "tokens",
    ),
    "_scaled_dot_product_flash_attention_for_cpu, channels ask": pinned(
        lambda x: attended(x.mT, torch.ones(3, 5, 6).to(x)).mT, "sums over it, and it is not zero", "tokens"
    ),
    "_scaled_dot_product_flash_attention_for_cpu, channels in the mask": pinned(
        lambda x: attended(torch.ones(3, 6, 4).to(x), torch.ones(3, WIDTH, 4).to(x), x.detach()),
        "scaled_dot_product_attention takes its channels for positions",
        "tokens",
    ),
    "embedding": Case(lambda x: x.relu(), "embedding"),
    "embedding, by numbers of channels": pinned(
        lambda x: F.embedding(x.flatten(2).argmax(-1), torch.ones(36, 4).to(x)), SUMS
    ),
    "_embedding_bag": Case(lambda x: x.relu(), "bag"),
    "_embedding_bag, weighted by channels": pinned(
        module(
            lambda self: setattr(self, "bag", nn.EmbeddingBag(32, 4, mode="sum")),
            lambda self, x: self.bag(torch.arange(32).view(4, 8), per_sample_weights=x),
        ),
        "EmbeddingBag at body.bag picks rows by their numbers",
        "linear",
    ),
    "_embedding_bag_forward_only": Case(lambda x: x.relu(), "frozen bag", mode=torch.no_grad),
    "mkldnn_rnn_layer": Case(
        module(
            lambda self: setattr(self, "layer", nn.LSTM(WIDTH, 4, batch_first=True)), lambda self, x: self.layer(x)[0]
        ),
        "float32",
    ),
    "mkldnn_rnn_layer, channels for steps": pinned(
        module(
            lambda self: setattr(self, "layer", nn.LSTM(6, 4, batch_first=True)), lambda self, x: self.layer(x.mT)[0]
        ),
        "LSTM at body.layer takes its channels for positions",
        "float32",
    ),
    "mkldnn_rnn_layer, channels for a state": pinned(
        module(
            lambda self: setattr(self, "layer", nn.LSTM(4, WIDTH, batch_first=True)),
            lambda self, x: self.layer(torch.ones(3, 6, 4), (x[:, 0].unsqueeze(0), torch.ones(1, 3, WIDTH)))[0],
        ),
        "LSTM at body.layer sums over it",
        "float32",
    ),
    "mkldnn_rnn_layer, a state that channels start": Case(
        module(
            lambda self: setattr(self, "layer", nn.LSTM(4, WIDTH, batch_first=True)),
            lambda self, x: self.layer(torch.ones(3, 6, 4), (x[:, 0].unsqueeze(0), x.new_zeros(1, *x[:, 0].shape)))[0],
        ),
        "float32",
    ),
    # normalization, softmax
    "native_batch_norm": Case(with_layer(lambda: nn.BatchNorm2d(WIDTH))),
    "native_batch_norm, channels in space": pinned(
        module(lambda self: setattr(self, "norm", nn.BatchNorm2d(6)), lambda self, x: self.norm(x.transpose(1, 2))),
        "BatchNorm2d at body.norm normalizes over it",
    ),
    "native_batch_norm, after a shift": Case(with_norm(lambda norm, x: norm(x + 1))),
    "native_batch_norm, without scale": Case(with_layer(lambda: nn.BatchNorm2d(WIDTH, affine=False))),
    "native_batch_norm, without scale, after a shift": pinned(
        module(
            lambda self: setattr(self, "norm", nn.BatchNorm2d(WIDTH, affine=False)), lambda self, x: self.norm(x + 1)
        ),
        SUMS,
    ),
    "native_batch_norm, another shift": pinned(
        with_norm(lambda n, x: F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias + 1, True)), SUMS
    ),
    "native_batch_norm, another scale": Case(
        with_norm(lambda n, x: F.batch_norm(x, n.running_mean, n.running_var, n.weight + 1, n.bias, n.training))
    ),
    "native_batch_norm, instances": Case(with_layer(lambda: nn.InstanceNorm2d(WIDTH, affine=True))),
    "native_batch_norm, instances remembered": Case(
        with_layer(lambda: nn.InstanceNorm2d(WIDTH, track_running_stats=True))
    ),
    **{
        name: Case(legit(name))
        for name in ("_native_batch_norm_legit", "_native_batch_norm_legit_functional", "_batch_norm_with_update")
    },
    "native_layer_norm": pinned(
        with_layer(lambda: nn.LayerNorm(WIDTH)), "LayerNorm at body.layer needs every channel of its input", "tokens"
    ),
    "native_layer_norm, of space": pinned(with_layer(lambda: nn.LayerNorm([6, 6])), SUMS),
    "native_layer_norm, of space, without shift": Case(with_layer(lambda: nn.LayerNorm([6, 6], bias=False))),
    "mean, RMS norm": pinned(
        with_layer(lambda: nn.RMSNorm(WIDTH)), "RMSNorm at body.layer needs every channel of its input", "tokens"
    ),
    "native_group_norm": Case(with_layer(lambda: nn.GroupNorm(4, WIDTH)), free=4),
    "native_group_norm, channels in space": pinned(
        module(lambda self: setattr(self, "norm", nn.GroupNorm(2, 6)), lambda self, x: self.norm(x.transpose(1, 2))),
        "GroupNorm at body.norm normalizes over it",
    ),
    "native_group_norm, not all zero": pinned(lambda x: F.group_norm(mixed(x), 2), SUMS),
    "native_group_norm, batch": pinned(
        module(
            lambda self: setattr(self, "norm", nn.GroupNorm(1, 1)),
            lambda self, x: self.norm(x.view(-1, 1, *x.shape[2:])).view(x.shape),
        ),
        SUMS,
    ),
    "native_group_norm, after a shift": Case(
        module(lambda self: setattr(self, "norm", nn.GroupNorm(4, WIDTH)), lambda self, x: self.norm(x + 1)), free=4
    ),
    "native_group_norm, without scale": pinned(
        with_layer(lambda: nn.GroupNorm(4, WIDTH, affine=False)), "groups of them, which no file could tell"
    ),
    "_softmax": pinned(lambda x: x.softmax(1), "softmax needs every channel of its input"),
    "_softmax, of space": pinned(lambda x: x.softmax(-1), SUMS),
    "_softmax, of space, then multiplied": Case(lambda x: x * x.softmax(-1)),
    "_log_softmax": pinned(lambda x: x.log_softmax(1), "log_softmax needs every channel of its input"),
    "_safe_softmax": pinned(lambda x: torch._safe_softmax(x, 1), "safe_softmax needs every channel of its input"),
    # pooling, interpolation, padding
    "fractional_max_pool2d": Case(pooled_at_random),
    "grid_sampler_2d": Case(sampled),
    "grid_sampler_2d, channels for positions": pinned(
        lambda x: F.grid_sample(torch.ones(3, 9, 4, 4).to(x), x.flatten(2)[..., :2].unsqueeze(1), align_corners=False),
        "grid_sampler_2d takes its channels for positions",
    ),
    "grid_sampler_3d": Case(sampled, "conv3d"),
    "upsample_linear1d": Case(interpolated("linear"), "conv1d"),
    "upsample_bilinear2d": Case(interpolated("bilinear")),
    "_upsample_bilinear2d_aa": Case(interpolated("bilinear", 4, antialias=True)),
    "upsample_bicubic2d": Case(interpolated("bicubic")),
    "upsample_trilinear3d": Case(interpolated("trilinear"), "conv3d"),
    "max_pool2d_with_indices, channels for positions": pinned(
        lambda x: F.max_pool2d(x.transpose(1, 2), 2), "max_pool2d_with_indices takes its channels for positions"
    ),
    "max_pool2d_with_indices, indices": pinned(lambda x: F.max_pool2d(x, 2, return_indices=True)[1].to(x), SUMS),
}
POOLS = {
    "max_pool{}d_with_indices": {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d},
    "avg_pool{}d": {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d},
    "_adaptive_avg_pool{}d": {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d},
    "adaptive_max_pool{}d": {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d},
}
for n in (1, 2, 3):
    CASES |= {
        f"upsample_nearest{n}d": Case(interpolated("nearest"), f"conv{n}d"),
        f"_upsample_nearest_exact{n}d": Case(interpolated("nearest-exact"), f"conv{n}d"),
        f"reflection_pad{n}d": Case(lambda x: F.pad(x, (1, 2) * (x.dim() - 2), mode="reflect"), f"conv{n}d"),
        f"replication_pad{n}d": Case(lambda x: F.pad(x, (1, 2) * (x.dim() - 2), mode="replicate"), f"conv{n}d"),
    }
    for op, pool in POOLS.items():
        key = op.format(n) if n > 1 else f"{op.format(2)}, 1d"
        CASES[key] = Case(lambda x, f=pool[n]: f(x, 2), f"conv{n}d")
CASES["max_pool2d_with_indices, no gradients"] = Case(lambda x: F.max_pool1d(x, 2), "conv1d", mode=torch.no_grad)

# Reductions: in space, where zeros stay zeros or are multiplied with; over channels, where all but sums pin.
KEPT = {
    "sum": lambda x, d: x.sum(d, keepdim=True),
    "mean": lambda x, d: x.mean(d, keepdim=True),
    "amax": lambda x, d: x.amax(d, keepdim=True),
    "amin": lambda x, d: x.amin(d, keepdim=True),
    "max": lambda x, d: x.max(d, keepdim=True)[0],
    "min": lambda x, d: x.min(d, keepdim=True)[0],
    "prod": lambda x, d: x.prod(d, keepdim=True),
    "nansum": lambda x, d: x.nansum(d, keepdim=True),
    "aminmax": lambda x, d: torch.aminmax(x, dim=d, keepdim=True)[1],
    "var_mean": lambda x, d: torch.var_mean(x, d, keepdim=True)[0],
    "std_mean": lambda x, d: torch.std_mean(x, d, keepdim=True)[1],
    "nanmedian": lambda x, d: x.nanmedian(d, keepdim=True)[0],
    "kthvalue": lambda x, d: x.kthvalue(2, d, keepdim=True)[0],
    "norm": lambda x, d: ATEN.norm(x, 2, [d], True),
    "linalg_vector_norm": lambda x, d: x.norm(dim=d, keepdim=True),
    "var": lambda x, d: x.var(d, keepdim=True),
    "std": lambda x, d: x.std(d, keepdim=True),
    "cumsum": lambda x, d: x.cumsum(d),
    "cummin": lambda x, d: x.cummin(d)[0],
    "cummax": lambda x, d: x.cummax(d)[0],
    "cumprod": lambda x, d: x.cumprod(d),
    "mode": lambda x, d: x.mode(d, keepdim=True)[0],
    "median": lambda x, d: x.median(d, keepdim=True)[0],
    "sort": lambda x, d: x.sort(d)[0],
    "topk": lambda x, d: x.topk(3, d)[0],
}
LOST = {
    "logsumexp": lambda x, d: x.logsumexp(d, keepdim=True),
    "argmax": lambda x, d: x.argmax(d, keepdim=True) + 0.0 * x,
    "argmin": lambda x, d: x.argmin(d, keepdim=True) + 0.0 * x,
    "all": lambda x, d: (x > 0).all(d, keepdim=True) + 0.0 * x,
    "any": lambda x, d: (x > 0).any(d, keepdim=True) + 0.0 * x,
    "count_nonzero": lambda x, d: x.count_nonzero(d).unsqueeze(d) + 0.0 * x,
    "logcumsumexp": lambda x, d: x.logcumsumexp(d),
}
for op, reduce in {**KEPT, **LOST}.items():
    space = Case(lambda x, f=reduce: f(x, -1)) if op in KEPT else pinned(lambda x, f=reduce: f(x, -1), SUMS)
    CASES[op] = space
    CASES[f"{op}, then multiplied"] = Case(lambda x, f=reduce: x * f(x, -1)) if op != "topk" else space
    CASES[f"{op}, channels"] = pinned(lambda x, f=reduce: f(x, 1), f"{op} needs every channel of its input")
SUMMED = {name: KEPT[name] for name in ("sum", "nansum", "norm", "linalg_vector_norm")}
for op, reduce in SUMMED.items():
    CASES[f"{op}, channels"] = Case(lambda x, f=reduce: f(x, 1))
for op in ("norm", "linalg_vector_norm"):
    CASES[f"{op}, channels that are not zero"] = pinned(
        lambda x, f=KEPT[op]: f(x.cos(), 1), f"{op} needs every channel"
    )
CASES["norm, the smallest channel"] = pinned(lambda x: ATEN.norm(x, -torch.inf, [1], True), "norm needs every channel")
CASES["linalg_vector_norm, the smallest channel"] = pinned(
    lambda x: torch.linalg.vector_norm(x, -torch.inf, 1, keepdim=True), "linalg_vector_norm needs every channel"
)
CASES["sum, channels that are not zero"] = pinned(lambda x: x.cos().sum(1, keepdim=True), "sum sums over it")

CASES |= INDEX_CASES

WITHOUT_A_CASE = {
    "cudnn_batch_norm": "CUDA",
    "_fused_rms_norm": "CUDA",
    "linear": "MPS; elsewhere it is made of others",
    "max_pool2d": "MPS; elsewhere it is made of others",
    "miopen_batch_norm": "ROCm",
    "_scaled_dot_product_flash_attention": "CUDA",
    "_scaled_dot_product_efficient_attention": "CUDA",
    "_scaled_dot_product_cudnn_attention": "CUDA",
    "_scaled_dot_product_fused_attention_overrideable": "for backends outside torch",
    "convolution_overrideable": "for backends outside torch",
}
