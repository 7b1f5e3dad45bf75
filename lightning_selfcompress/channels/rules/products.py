"""Rules of sums of products: matrix products, convolutions, attention, embeddings and recurrent layers."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_selfcompress.channels.atoms import Axis, Dim, Dims
from lightning_selfcompress.channels.call import FIXED_SIZE, Call, Result, Rule
from lightning_selfcompress.channels.layout import never_zero

_ADDING = ("addmm", "baddbmm", "addmv", "_addmm_activation", "_sparse_addmm")


def matrix_product(call: Call) -> Result:
    """Handles ``mm``, ``bmm``, ``mv``, ``dot``, ``linear``, and the variants that add a tensor to the product."""
    tensors = [*call.inputs]
    added = tensors.pop(0) if call.name.rstrip("_") in _ADDING else None
    one, other = (call.dims(t) for t in tensors[:2])
    if call.name == "linear":
        other = other[::-1]
        added = tensors[2] if len(tensors) > 2 else None
    call.contract(one[-1], other[-2] if len(other) > 1 else other[-1])
    rows, columns = one[:-1], other[-1:] if len(other) > 1 else ()
    if call.name.rstrip("_") in ("bmm", "baddbmm"):
        batch = call.meet([one[0], other[0]], [tensors[0].shape[0], tensors[1].shape[0]], zero=_any)
        call.store.batches += [batch.atoms] if isinstance(batch, Axis) else []
        rows = (batch, *rows[1:])
    result: Dims = (*rows, *columns)
    if added is not None:
        result = call.broadcast([result, call.dims(added)], [call.shape, tuple(added.shape)], _all)
    return [result]


def _any(known: Any) -> bool:
    return bool(known.any())


def _all(known: Any) -> bool:
    return bool(known.all())


def distances(call: Call) -> Result:
    """Handles the distances between rows of two tensors: where both are zero when dead, they do not count."""
    one, other = (call.dims(call[name]) for name in ("x1", "x2"))
    sizes = [tuple(call[name].shape) for name in ("x1", "x2")]
    call.sum_over(call.meet([one[-1], other[-1]], [shape[-1] for shape in sizes], zero=_all))
    lead = call.broadcast([one[:-2], other[:-2]], [shape[:-2] for shape in sizes], _all) if len(one) > 2 else ()
    return [(*lead, *never_zero((one[-2], other[-2])))]


def trilinear(call: Call) -> Result:
    """Handles ``nn.Bilinear``, which expands three operands, multiplies them and sums over some dimensions."""
    operands, shapes = [], []
    for i in ("1", "2", "3"):
        tensor: Tensor = call[f"i{i}"]
        dims, shape = list(call.dims(tensor)), list(tensor.shape)
        for d in call[f"expand{i}"]:
            dims.insert(d, None)
            shape.insert(d, 1)
        operands.append(tuple(dims))
        shapes.append(tuple(shape))
    product = call.broadcast(operands, shapes, _any)
    for d in call["sumdim"]:
        call.sum_over(product[d])
    return [tuple(dim for d, dim in enumerate(product) if d not in call["sumdim"])]


CONVOLUTIONS = ("convolution", "convolution_overrideable")


def convolution(call: Call) -> Result:
    """Handles every convolution: plain, grouped, depthwise and transposed, in any number of dimensions."""
    x, weight = call.dims(call["input"]), call.dims(call["weight"])
    for dim in (*x[2:], *weight[2:]):
        call.pin(dim, "slides over it")
    groups, shape = call["groups"], tuple(call["weight"].shape)
    produced = call.produced(call["weight"])
    if produced is not None and (groups == 1 or not call["transposed"]):
        for dim in (*weight[:2], produced):
            call.pin(dim, "reads a weight in other groups")
    channels = call["input"].shape[1]
    if groups == 1:
        call.contract(x[1], weight[0] if call["transposed"] else weight[1])
        out = weight[1] if call["transposed"] else weight[0]
    elif groups == channels:
        out = _depthwise(call, x[1], weight, shape)
    else:
        out = _grouped(call, x[1], weight, shape)
    result: Dims = (x[0], out, *[None] * len(x[2:]))
    return [call.add_bias(result, call["bias"], 1)]


def _depthwise(call: Call, x: Dim, weight: Dims, shape: tuple[int, ...]) -> Dim:
    """Handles depthwise convolutions: each input channel is tied to its own output channels."""
    groups = call["groups"]
    produced = call.produced(call["weight"])
    rows = weight[0]
    if call["transposed"]:  # weight (groups, outputs per group, ...)
        call.pin(weight[1], "has so many outputs for each channel")
        if not isinstance(rows, Axis):
            return None
        if isinstance(produced, Axis):
            call.tie(rows.repeat(shape[1]).atoms, produced.atoms)
        out = produced if isinstance(produced, Axis) else rows.repeat(shape[1]).with_zero(False)
    elif isinstance(rows, Axis):  # weight (groups * outputs per group, 1, ...)
        out = rows
    else:
        call.pin(x, FIXED_SIZE)
        return None
    if not isinstance(x, Axis):
        call.pin(out, FIXED_SIZE)
        return None
    spread = x.repeat(len(out) // groups)
    call.tie(spread.atoms, out.atoms)
    return out.with_zero(spread.zero | out.zero)


def _grouped(call: Call, x: Dim, weight: Dims, shape: tuple[int, ...]) -> Dim:
    """Handles grouped convolutions: the channels at the same position in all groups are tied."""
    groups = call["groups"]
    inside = call.align(x, groups) if isinstance(x, Axis) else None
    if not call["transposed"]:
        call.contract(inside, weight[1])
        rows = weight[0]
        return rows.with_zero(call.align(rows, groups).tile(groups).zero) if isinstance(rows, Axis) else None
    rows = weight[0]
    call.contract(inside, call.align(rows, groups) if isinstance(rows, Axis) else None)
    columns, produced = weight[1], call.produced(call["weight"])
    if not isinstance(columns, Axis):
        return None
    if not isinstance(produced, Axis):
        return columns.tile(groups).with_zero(False)
    call.tie(columns.tile(groups).atoms, produced.atoms)
    return produced


def attention(call: Call) -> Result:
    """Handles fused scaled dot product attention, whose inputs are ``(batch, heads, positions, features)``."""
    q, k, v = (call.dims(call[name]) for name in ("query", "key", "value"))
    if call["scale"] is None:
        call.pin(q[-1], "scales by the number of channels")
    call.contract(q[-1], k[-1])
    for dim in (k[-2], v[-2]):
        call.pin(dim, "takes its channels for positions")
    lead: list[Dim] = []
    sizes = [tuple(call[name].shape) for name in ("query", "key", "value")]
    for d in range(len(q) - 2):
        most = max(shape[d] for shape in sizes)  # of grouped queries, several share the keys and values of a head
        here = [_repeated(dims[d], most // shape[d]) for dims, shape in zip((q, k, v), sizes, strict=True)]
        lead.append(
            call.meet(here, [most if shape[d] > 1 else 1 for shape in sizes], zero=lambda known: bool(known[2]))
        )
    call.store.batches += [dim.atoms for dim in lead[1:] if isinstance(dim, Axis)]
    for extra in ("attn_mask", "attn_bias"):
        mask = call.get(extra)
        for dim in call.dims(mask) if mask is not None else ():
            call.pin(dim, "takes its channels for positions")
    rows = q[-2].with_zero(False) if isinstance(q[-2], Axis) else q[-2]
    return [(*lead, rows, v[-1]), *[None] * (len(call.outputs) - 1)]


def _repeated(dim: Dim, times: int) -> Dim:
    return dim.repeat(times) if isinstance(dim, Axis) else dim


def flex_attention(call: Call) -> Result:
    """Handles attention whose scores a function of the user changes, by the numbers of batch, head and positions."""
    q, k, v = (call.dims(call[name]) for name in ("query", "key", "value"))
    call.pin(q[-1], "scales by the number of channels")
    call.contract(q[-1], k[-1])
    others = [d for t in call.inputs[3:] for d in call.dims(t)]
    for dim in (*q[:-1], *k[:-1], *v[:-1], *others):
        call.pin(dim, "takes its channels for positions")
    return [(*[None] * (len(q) - 1), v[-1]), *[None] * (len(call.outputs) - 1)]


def embedding(call: Call) -> Result:
    """Handles ``embedding``: it pins the rows, which are picked by number, and keeps the channels of the columns."""
    rows, columns = call.dims(call["weight"])
    call.pin(rows, "picks rows by their numbers")
    return [(*never_zero(call.dims(call["indices"])), columns)]


def embedding_bag(call: Call) -> Result:
    """Handles sums, means or maxima of rows that are picked by number."""
    rows, columns = call.dims(call["weight"])
    for dim in (rows, *(d for t in call.inputs[1:] for d in call.dims(t))):
        call.pin(dim, "picks rows by their numbers")
    return [(None, columns), *[None] * (len(call.outputs) - 1)]


def recurrent_layer(call: Call) -> Result:
    """Handles one layer and direction of a fused recurrent layer, whose state starts and ends as a tensor."""
    x, batches = call.dims(call["input"]), [call.dims(call[name])[:-1] for name in ("hx_", "cx_")]
    for dim in (*x[:-1], *(d for batch in batches for d in batch)):
        call.pin(dim, "takes its channels for positions")
    weights = [call[f"weight{i}"] for i in range(4 if call["has_biases"] else 2)]
    state = _recurrence(call, x[-1], weights, [call["hx_"], call["cx_"]])
    of_state = [(*[None] * (t.dim() - 1), state) for t in call.outputs[:3]]
    return [*of_state, *[None] * len(call.outputs[3:])]


def _recurrence(call: Call, x: Dim, weights: Sequence[Tensor], states: Sequence[Tensor]) -> Dim:
    """Returns the channels of a hidden state, zero where the state starts at zero and no gate's rows are alive.

    Args:
        call: The operation.
        x: The channels of the input.
        weights: The weights of the input and of the state, and their biases, ``(gates * hidden, ...)``.
        states: What the state starts from, each ``(..., hidden)``.
    """
    call.contract(x, call.dims(weights[0])[1])
    size = weights[1].shape[1]
    rows = [call.dims(t)[0] for t in weights]
    gates = [
        call.align(dim, t.shape[0] // size) if isinstance(dim, Axis) and size > 1 else None
        for dim, t in zip(rows, weights, strict=True)
    ]
    starts = [call.dims(t)[-1] for t in states]
    state = call.meet([*gates, *starts], [size] * (len(gates) + len(starts)), zero=_all)
    call.contract(state, call.dims(weights[1])[1])
    return state


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            *("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "vdot", "linear", "_addmm_activation"),
            "_sparse_addmm",
        ),
        matrix_product,
    ),
    **dict.fromkeys(("_cdist_forward", "_euclidean_dist"), distances),
    "_trilinear": trilinear,
    **dict.fromkeys(CONVOLUTIONS, convolution),
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        attention,
    ),
    "flex_attention": flex_attention,
    "embedding": embedding,
    **dict.fromkeys(("_embedding_bag", "_embedding_bag_forward_only"), embedding_bag),
    "mkldnn_rnn_layer": recurrent_layer,
}
