"""One tiny network for each operation that makes new tensors, or that reads or writes entries by their numbers."""

import torch
from graph_nets import WIDTH, Case, module, pinned
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # as user code names it
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

ATEN = torch.ops.aten
ROWS = torch.tensor([0, 2, 2])  # numbers of images
SUMS = "d at last sums over it, and "
NUMBERS = "takes its channels for numbers of others"


def spread(x: Tensor, numbers: Tensor = ROWS) -> Tensor:
    """A number for every entry of a tensor, the same at all positions but along the first dimension."""
    return numbers.view(-1, *[1] * (x.dim() - 1)).expand(-1, *x.shape[1:])


def best(x: Tensor) -> Tensor:
    """The numbers of the largest images, another one for every channel and pixel."""
    return x.argmax(0, keepdim=True).expand_as(x)


def assigned(x: Tensor, where: object, value: object) -> Tensor:
    x = x.clone()
    x[where] = value
    return x


def packed(x: Tensor) -> Tensor:
    sequence = pack_padded_sequence(x, torch.tensor([6, 4, 1]), batch_first=True)
    return pad_packed_sequence(sequence._replace(data=sequence.data.relu()), batch_first=True)[0]


def in_turn(x: Tensor) -> Tensor:
    """Outputs that are written step by step."""
    out, state = torch.zeros(x.shape), torch.zeros(x.shape[0], x.shape[2])
    for t in range(x.shape[1]):
        state = 0.5 * state + x[:, t]
        out[:, t] = state
    return out.to(x)


def in_parts(x: Tensor) -> Tensor:
    """Channels side by side, written into one tensor."""
    out = x.new_empty(x.shape[0], 2 * x.shape[1], *x.shape[2:])
    out[:, : x.shape[1]] = x
    out[:, x.shape[1] :] = x.relu()
    return out


def positions_flattened(x: Tensor) -> Tensor:
    """A new tensor whose positions are flattened after it was written to."""
    out = x.new_zeros(x.shape)
    out[:, :, 1:3] = x[:, :, 1:3]
    return out.flatten(1)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True)


def flexible(x: Tensor, v: Tensor) -> Tensor:
    """Attention with a bias of its own, of one head; on a CPU it has no gradients."""
    q, v = x.detach().unsqueeze(1), v.detach().unsqueeze(1)
    with torch.no_grad():
        return flex_attention(q, q, v, lambda score, b, h, i, j: score - (i - j).abs()).squeeze(1)


MASK = torch.tensor([True, False, True])
INDEX_CASES = {
    # new tensors
    "zeros": Case(lambda x: x + torch.zeros(x.shape)),
    "zeros, step by step": Case(in_turn, "tokens"),
    "zeros, a width of their own": Case(lambda x: torch.cat([x, torch.zeros(3, 2, 6, 6)], 1)),
    "zeros, joined to an input": pinned(
        lambda x: x + (torch.zeros(x.shape) + torch.arange(8.0).view(-1, 1, 1)), "add combines it with a"
    ),
    "zeros, one channel written": pinned(lambda x: x + assigned(torch.zeros(x.shape), (slice(None), 3), 1.0), "add"),
    "new_zeros, written to by an unknown operation": pinned(
        lambda x: x + (z := x.new_zeros(x.shape), torch._foreach_add_([z], [torch.arange(6.0)]))[0], "add combines it"
    ),
    "zeros, without dimensions": Case(lambda x: torch.where(x > 1, x, torch.zeros((), dtype=x.dtype))),
    "zeros, without dimensions, written to": pinned(
        lambda x: torch.where(x > 1, x, torch.zeros((), dtype=x.dtype).add_(1)), SUMS
    ),
    "new_zeros, a number, written to through a view": pinned(
        lambda x: torch.where(x > 1, x, (z := x.new_zeros(1), z.view(1, 1).add_(1))[0]), SUMS
    ),
    "new_zeros, a number, written to by an unknown operation": pinned(
        lambda x: torch.where(x > 1, x, (z := x.new_zeros(1), torch._foreach_add_([z], 1.0))[0]), SUMS
    ),
    "ones": pinned(lambda x: x + torch.ones(x.shape), SUMS),
    "ones, multiplied": Case(lambda x: x * torch.ones(x.shape)),
    "ones, joining": Case(lambda x: x * (ones := torch.ones(x.shape[1], 1, 1)) + (x.flip(1) * ones), free=4),
    "full": pinned(lambda x: x + torch.full(x.shape, 0.5), SUMS),
    "full, zeros": Case(lambda x: x + torch.full(x.shape, 0.0)),
    "empty": Case(lambda x: torch.empty(x.shape, dtype=x.dtype).copy_(x)),
    "empty, filled": pinned(lambda x: x + torch.empty(x.shape).fill_(2.0), SUMS),
    "new_empty, in parts": Case(in_parts),
    "new_zeros, positions flattened": Case(positions_flattened),
    "empty_strided": Case(lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)),
    "empty_permuted": Case(lambda x: torch.empty_permuted(x.shape, (0, 1, 3, 2), dtype=x.dtype).copy_(x)),
    "scalar_tensor": Case(lambda x: torch.where(x > 1, x, 0.0)),
    "scalar_tensor, not zero": pinned(lambda x: torch.where(x > 1, x, 1.0), SUMS),
    "lift_fresh": Case(lambda x: torch.where(x > 1, x, torch.tensor(0.0))),
    "lift_fresh, not zero": pinned(lambda x: torch.where(x > 1, x, torch.tensor(1.0)), SUMS),
    "rand": Case(lambda x: x * (1 + 0 * torch.rand(x.shape))),
    "randn": Case(lambda x: x * (1 + 0 * torch.randn(x.shape))),
    "randn, added": pinned(lambda x: x + torch.randn(x.shape), SUMS),
    "randint": Case(lambda x: x * (1 + 0 * torch.randint(9, x.shape))),
    "normal, of a size": Case(lambda x: x * (1 + 0 * torch.normal(0.0, 1.0, x.shape))),
    # index
    "_unsafe_index": Case(lambda x: ATEN._unsafe_index(x, [None, None, torch.tensor([1, 3])])),
    "index, numbers and a mask": Case(lambda x: x[ROWS[:2], :, torch.arange(6) > 3].unsqueeze(-1)),
    "index_put": Case(lambda x: torch.index_put(torch.zeros_like(x), (ROWS,), x, accumulate=True)),
    "index_put, in place": Case(lambda x: assigned(x, ROWS[:2], x[:2] * 2)),
    "index_put, a row of all": Case(lambda x: assigned(x, (slice(None), slice(None), ROWS[1:]), x[..., :1, :])),
    "index_put, what is not zero": pinned(lambda x: assigned(x, ROWS[:2], x[:2].cos()), SUMS),
    "index_put, a mask": Case(lambda x: assigned(x, MASK, 0.0)),
    "index_put, a mask of channels": Case(lambda x: assigned(x, x > 1, 0.0)),
    "index_put, ones under a mask": pinned(lambda x: assigned(x, MASK, 1.0), SUMS),
    "index_put, ones under a mask of channels": Case(lambda x: assigned(x, x > 1, 1.0)),
    "index_put, ones under a mask that dead channels set": pinned(lambda x: assigned(x, x <= 0, 1.0), SUMS),
    "index_put, values of channels under a mask": pinned(
        lambda x: assigned(x, x > 1, x[x > 1] * 2), "index picks channels by their numbers"
    ),
    "index_put, an input under a mask": pinned(
        lambda x: assigned(x, MASK, torch.arange(12.0).view(2, 1, 6, 1).to(x)), SUMS
    ),
    "index_put, channels": pinned(
        lambda x: assigned(x, (slice(None), ROWS[:2]), 0.0), "index_put picks channels by their numbers"
    ),
    "index_put, fixed mask of channels": pinned(
        lambda x: assigned(x, (slice(None), torch.arange(x.shape[1]) > 3), 0.0), "index_put combines it with a"
    ),
    "index_put, numbers of channels": pinned(
        lambda x: torch.index_put(torch.zeros(8).to(x), (x[0].flatten(1).argmax(-1) % 8,), x.new_ones(1)), NUMBERS
    ),
    "_unsafe_index_put": Case(lambda x: ATEN._unsafe_index_put(x, [ROWS[:2]], x[:2] * 2)),
    "_index_put_impl_": Case(lambda x: ATEN._index_put_impl_(x.clone(), [ROWS[:2]], x[:2] * 2)),
    # along a dimension
    "index_add": Case(lambda x: torch.zeros_like(x).index_add(0, ROWS, x)),
    "index_add, in place": Case(lambda x: torch.zeros(x.shape, dtype=x.dtype).index_add_(0, ROWS, x, alpha=2)),
    "index_add, through a view": Case(
        lambda x: (z := x.new_zeros(x.shape), z.view(*x.shape[:2], -1).index_add_(0, ROWS, x.flatten(2)))[0]
    ),
    "index_add, to what is not zero": pinned(lambda x: x.cos().index_add(0, ROWS, x), SUMS),
    "index_add, what is not zero": pinned(lambda x: x.index_add(0, ROWS, x.cos()), SUMS),
    "index_add, channels": pinned(
        lambda x: x.index_add(1, torch.arange(x.shape[1]) % 3, x), "index_add picks channels by their numbers"
    ),
    "index_copy": Case(lambda x: x.index_copy(0, ROWS[:2], x[:2].relu())),
    "index_reduce": Case(lambda x: torch.zeros_like(x).index_reduce(0, ROWS, x, "amax")),
    "index_fill": Case(lambda x: x.index_fill(2, ROWS, 0.0)),
    "index_fill, ones": pinned(lambda x: x.index_fill(2, ROWS, 1.0), SUMS),
    "index_fill, channels": pinned(lambda x: x.index_fill(1, ROWS, 0.0), "index_fill picks channels"),
    "scatter": Case(lambda x: torch.zeros_like(x).scatter(0, spread(x), x)),
    "scatter, in place": Case(lambda x: torch.zeros(x.shape, dtype=x.dtype).scatter_(0, spread(x), x)),
    "scatter, zeros": Case(lambda x: x.scatter(0, spread(x), 0.0)),
    "scatter, ones": pinned(lambda x: x.scatter(0, spread(x), 1.0), SUMS),
    "scatter, what is not zero": pinned(lambda x: x.scatter(0, spread(x), x.cos()), SUMS),
    "scatter, by numbers of each channel": Case(lambda x: torch.zeros_like(x).scatter(0, best(x), x.flip(1)), free=4),
    "scatter, to the first channels": pinned(
        lambda x: x.scatter(0, spread(x[:, :4]), 0.0), "scatter writes to the first of its channels"
    ),
    "scatter, from wider": pinned(
        lambda x: x.scatter(0, spread(x), torch.cat([x, x], 1)), "scatter picks channels by their numbers"
    ),
    "scatter, channels": pinned(lambda x: x.scatter(1, x.argmax(1, keepdim=True), 0.0), "argmax needs every channel"),
    "scatter_add": Case(lambda x: x.new_zeros(x.shape).scatter_add(0, spread(x), x)),
    "scatter_add, in place": Case(lambda x: x.new_zeros(4, *x.shape[1:]).scatter_add_(0, spread(x), x)[1:]),
    "scatter_add, to what is not zero": pinned(lambda x: x.cos().scatter_add(0, spread(x), x), SUMS),
    "scatter_add, numbers that vary": pinned(
        lambda x: x.scatter_add(0, torch.arange(x.numel()).view(x.shape) % 3, x), "scatter_add combines it with a"
    ),
    **{
        f"scatter_reduce, {how}": Case(
            lambda x, how=how: x.new_zeros(x.shape).scatter_reduce(0, spread(x), x, how, include_self=how == "sum")
        )
        for how in ("sum", "mean", "amax", "amin", "prod")
    },
    "gather": Case(lambda x: x.gather(0, spread(x))),
    "gather, by numbers of each channel": Case(lambda x: x.gather(0, best(x.flip(1))), free=4),
    "gather, numbers that vary": pinned(
        lambda x: x.gather(0, torch.arange(x.numel()).view(x.shape) % 3), "gather combines it with a"
    ),
    "gather, from the first channels": pinned(lambda x: x.gather(0, spread(x[:, :4])), "gather picks channels"),
    "gather, channels": pinned(lambda x: x.gather(1, torch.zeros(3, 2, 6, 6).long()), "gather picks channels"),
    "gather, take_along_dim": Case(lambda x: torch.take_along_dim(x, ROWS.view(-1, 1, 1, 1), 0)),
    # under a mask
    "masked_scatter": Case(lambda x: x.masked_scatter(MASK.view(-1, 1, 1), x.relu().flip(0)), "tokens"),
    "masked_scatter, expanded": Case(
        lambda x: x.masked_scatter(MASK.view(-1, 1, 1).expand_as(x), x.relu()[:2].flatten(0, 1)), "tokens"
    ),
    "masked_scatter, single entries": pinned(
        lambda x: x.masked_scatter(x > 0, x.relu()), "masked_scatter writes to single entries of rows", "tokens"
    ),
    "masked_scatter, what is not zero": pinned(
        lambda x: x.masked_scatter(MASK.view(-1, 1, 1), x.cos()), "Linear at last sums over it, and ", "tokens"
    ),
    "masked_select": Case(lambda x: x.masked_select(MASK.view(-1, 1, 1)).view(-1, x.shape[-1]), "tokens"),
    "masked_select, single entries": pinned(
        lambda x: x * x.masked_select(x > 0).sum(), "masked_select picks single entries of rows", "tokens"
    ),
    "slice_scatter": Case(lambda x: torch.slice_scatter(x, x[:, :, :2].relu(), 2, 1, 3)),
    "slice_scatter, what is not zero": pinned(lambda x: torch.slice_scatter(x, x[:, :, :2].cos(), 2, 1, 3), SUMS),
    "slice_scatter, channels": pinned(
        lambda x: torch.slice_scatter(x, x.new_zeros(3, 2, 6, 6), 1, 1, 3), "slice_scatter picks"
    ),
    "select_scatter": Case(lambda x: torch.select_scatter(x, x[:, :, 2].relu(), -2, 1)),
    "select_scatter, channels": pinned(
        lambda x: torch.select_scatter(x, x.new_zeros(3, 6, 6), 1, 1), "select_scatter picks channels"
    ),
    # segments, sequences
    **{
        f"segment_reduce, {how}": Case(
            lambda x, how=how: torch.segment_reduce(x, how, lengths=torch.tensor([1, 2]), initial=0), "rows"
        )
        for how in ("sum", "mean", "max", "min")
    },
    "segment_reduce, nothing at first": Case(
        lambda x: torch.segment_reduce(x, "sum", lengths=torch.tensor([1, 3])), "linear"
    ),
    "segment_reduce, products": pinned(
        lambda x: torch.segment_reduce(x, "prod", lengths=torch.tensor([1, 3])), "sums over it, and it is not", "linear"
    ),
    "segment_reduce, channels": pinned(
        lambda x: torch.segment_reduce(x.t().contiguous(), "sum", lengths=torch.tensor([3, 5])).t(),
        "segment_reduce takes its channels for members of segments",
        "linear",
    ),
    "_pack_padded_sequence": Case(packed, "tokens"),
    "_pack_padded_sequence, channels for steps": pinned(
        lambda x: pack_padded_sequence(x.mT, torch.tensor([8, 3, 1]), batch_first=True).data,
        "pack_padded_sequence takes its channels for steps",
        "tokens",
    ),
    "_pack_padded_sequence, a recurrent layer": Case(
        module(
            lambda self: setattr(self, "layer", nn.LSTM(WIDTH, 4, batch_first=True, bidirectional=True)),
            lambda self, x: pad_packed_sequence(
                self.layer(pack_padded_sequence(x, torch.tensor([6, 4, 1]), batch_first=True))[0]
            )[0],
        ),
        "tokens",
    ),
    "full, pad_sequence": Case(lambda x: pad_sequence([x[0], x[1, :4], x[2, :1]], batch_first=True), "tokens"),
    # views, windows, triangles, complex numbers, transforms
    "view, a size left open": Case(lambda x: x.view(x.shape[0], -1, 4)[:, :, 1], "linear", free=2),
    "view, heads of a size left open": Case(
        lambda x: x.view(x.shape[0], 4, -1).relu().view(x.shape[0], -1), "linear", free=2
    ),
    "col2im": Case(lambda x: F.fold(F.unfold(x, 2, stride=2), 6, 2, stride=2)),
    "col2im, windows of channels": Case(lambda x: F.fold(x.flatten(2), (12, 12), 2, stride=2), free=2),
    "col2im, not all zero": pinned(
        lambda x: F.fold(
            torch.cat([x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :].cos()], 1).flatten(2), 12, 2, 1, 0, 2
        ),
        SUMS,
    ),
    "col2im, channels for positions": pinned(
        lambda x: F.fold(x.flatten(2).mT, (4, 8), 2, stride=2)[..., :2], "col2im takes its channels"
    ),
    "view_as_complex": Case(
        lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * (1 + 2j)).flatten(-2)
    ),
    "view_as_complex, pairs of channels": Case(
        lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * 1j).flatten(-2),
        "linear",
        free=4,
    ),
    "view_as_complex, parts left open": pinned(
        lambda x: torch.view_as_complex(x.view(x.shape[0], 4, -1)).real, "view_as_complex takes its channels", "linear"
    ),
    "view_as_real": Case(lambda x: torch.view_as_real(torch.complex(x, x.relu()))[..., 1]),
    "view_as_real, conjugate": Case(
        lambda x: torch.view_as_real(torch.polar(x.relu(), x.flip(1)).conj().resolve_conj())[..., 1], free=4
    ),
    "tril": Case(torch.tril),
    "tril, channels": pinned(torch.tril, "tril takes its channels for positions", "tokens"),
    "triu": Case(torch.triu),
    "_fft_r2c": Case(lambda x: torch.fft.rfft2(x).abs()),
    "_fft_r2c, channels": pinned(lambda x: torch.fft.rfft(x).abs(), "fft_r2c needs every channel", "linear"),
    "_fft_c2r": Case(lambda x: torch.fft.irfft(torch.fft.rfft(x, 12), 12)[..., :6]),
    "_fft_c2c": Case(lambda x: torch.fft.ifft(torch.fft.fft(x, dim=2), dim=2).imag),
    # products
    "bmm, attention with dropout, scaled by width": pinned(
        lambda x: F.scaled_dot_product_attention(*[x.unsqueeze(1)] * 3, dropout_p=1e-9).squeeze(1),
        "attention scales by the number of channels",
        "tokens",
    ),
    "bmm, attention with dropout": Case(
        lambda x: F.scaled_dot_product_attention(*[x.unsqueeze(1)] * 3, dropout_p=1e-9, scale=0.5).squeeze(1), "tokens"
    ),
    "_scaled_dot_product_flash_attention_for_cpu, fewer heads of keys": Case(
        lambda x: grouped(x.new_ones(3, 4, 6, x.shape[2]), *[x.unsqueeze(1).repeat(1, 2, 1, 1)] * 2)[:, 0], "tokens"
    ),
    "_scaled_dot_product_flash_attention_for_cpu, fewer heads of keys, channels for heads": pinned(
        lambda x: grouped(x.new_ones(3, 16, 6, 5), x.mT.unsqueeze(-1).repeat(1, 1, 1, 5), x.new_ones(3, 8, 6, 5)),
        "merges channels of two dimensions",
        "tokens",
    ),
    "flex_attention": Case(lambda x: flexible(torch.ones(3, 6, 4).to(x), x), "tokens"),
    "flex_attention, channels for positions": pinned(
        lambda x: flexible(torch.ones(3, WIDTH, 4).to(x), x.mT).mT, "flex_attention takes its channels for", "tokens"
    ),
    "flex_attention, channels ask": pinned(lambda x: flexible(x, x), "flex_attention scales by the", "tokens"),
    "_sparse_addmm": Case(lambda x: torch.sparse.mm(torch.eye(4).to(x).to_sparse(), x), "linear"),
    "mm, sparse": Case(lambda x: torch.eye(4).to(x).to_sparse_csr() @ x, "linear"),
    "_cdist_forward": Case(lambda x: torch.cdist(x, x.relu()).softmax(-1) @ x, "linear"),
    "_cdist_forward, not zero": pinned(lambda x: torch.cdist(x, x.cos()), "cdist_forward sums over it", "linear"),
    "_cdist_forward, to an input": pinned(
        lambda x: torch.cdist(x, torch.arange(16.0).view(2, 8).to(x)), "cdist_forward combines it with", "linear"
    ),
    "_euclidean_dist": Case(lambda x: ATEN._euclidean_dist(x, x.relu()).softmax(-1) @ x, "linear"),
}
