"""Padding of the channels of an ONNX graph to whole blocks, which a runtime's fast convolutions need.

Compressed networks have widths such as 253. ONNX Runtime's blocked convolutions need inputs of whole blocks of channels
(16 with AVX-512, otherwise 8); slower convolutions compute all other inputs. Operators of the graph pad the weights.
The runtime computes these operators once when it opens the file, so the file does not store the zeros.
"""

import math
from collections.abc import Iterator
from typing import Any

from lightning_selfcompress.onnx.nodes import Names

# These operators have one input and one output with the same channels, and turn finite values into finite values.
_SAME = {"AveragePool", "Clip", "Elu", "GlobalAveragePool", "HardSigmoid", "HardSwish", "LeakyRelu", "MaxPool", "Relu"}


_SAME |= {"Sigmoid", "Tanh"}


_JOIN = {"Add", "Mul", "Sub"}


def round_channels(proto: Any, multiple: int) -> None:
    """Pads the outputs of convolutions that feed other convolutions to a multiple of channels, in place.

    The values of a padded channel are finite, and the next convolution multiplies them by zero. Every other operator
    reads a slice without the padded channels.

    Args:
        proto: An ONNX model.
        multiple: Channels per block. Tensors with at most so many channels are not padded.
    """
    graph = proto.graph
    if any(a.HasField("g") or a.graphs for node in graph.node for a in node.attribute):
        return  # a node's inputs do not list the outer tensors that its subgraph reads
    shapes = {t.name: tuple(t.dims) for t in graph.initializer}
    shapes |= {n.output[0]: shapes[n.input[0]] for n in graph.node if _dequantizes(n) and n.input[0] in shapes}
    wide = _wide(graph, shapes, multiple)
    if wide:
        rounding = _Rounding(graph, wide, multiple)
        nodes = [made for node in graph.node for made in rounding.rewritten(node, shapes)]
        del graph.node[:]
        graph.node.extend(nodes)


def _dequantizes(node: Any) -> bool:
    return bool(node.op_type == "DequantizeLinear")


def _is_plain_convolution(node: Any, shapes: dict[str, tuple[int, ...]]) -> bool:
    grouped = any(a.name == "group" and a.i != 1 for a in node.attribute)
    return node.op_type == "Conv" and not grouped and all(name in shapes for name in node.input[1:])


def _wide(graph: Any, shapes: dict[str, tuple[int, ...]], multiple: int) -> dict[str, int]:
    """Returns the names of the tensors to be padded, with their present numbers of channels."""
    kept = {value.name for value in graph.output}
    found: dict[str, tuple[int, int]] = {}  # name of a tensor -> its channels and its rank
    consumers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
        before = [found.get(name) for name in node.input]
        if _is_plain_convolution(node, shapes):
            now: tuple[int, int] | None = (shapes[node.input[1]][0], len(shapes[node.input[1]]))
        elif node.op_type in _SAME:
            now = before[0]
        elif node.op_type in _JOIN:
            now = before[0] if before[0] == before[1] else _beside_constant(node, before, shapes)
        else:
            now = None
        if now and now[0] > multiple and now[0] % multiple and len(node.output) == 1 and node.output[0] not in kept:
            found[node.output[0]] = now
    useful: set[str] = set()
    for name in reversed(found):
        for node in consumers.get(name, ()):
            feeds = _is_plain_convolution(node, shapes) and node.input[0] == name
            if feeds or (node.op_type in _SAME | _JOIN and node.output[0] in useful):
                useful.add(name)
    return {name: channels for name, (channels, _) in found.items() if name in useful}


def _beside_constant(
    node: Any, found: list[tuple[int, int] | None], shapes: dict[str, tuple[int, ...]]
) -> tuple[int, int] | None:
    """Returns channels and rank of a tensor joined with an initializer of one value per channel, or of one for all."""
    for now, name in ((found[0], node.input[1]), (found[1], node.input[0])):
        shape = shapes.get(name)
        if now and shape is not None and len(shape) <= now[1] and math.prod(shape) in (1, now[0]):
            at = len(shape) - now[1] + 1  # the dimension of the channels in the initializer
            if math.prod(shape) == 1 or (at >= 0 and shape[at] == now[0]):
                return now
    return None


class _Rounding:
    """Rewrites the nodes of a graph in which some tensors get more channels."""

    def __init__(self, graph: Any, wide: dict[str, int], multiple: int) -> None:
        self.graph, self.wide, self.multiple = graph, wide, multiple
        self.names = Names(graph)
        self.made: dict[tuple[Any, ...], str] = {}  # the outputs of new nodes, by input and amounts

    def rewritten(self, node: Any, shapes: dict[str, tuple[int, ...]]) -> Iterator[Any]:
        """Yields the nodes that pad or slice the inputs of a node, and then the node itself."""
        if _is_plain_convolution(node, shapes):
            channels = shapes[node.input[1]]
            ends = zip(channels, self._ends(node), strict=False)
            extra = [-n % self.multiple if t in self.wide else 0 for n, t in ends]
            for i in range(1, len(node.input)):
                amounts = [*extra, *[0] * (len(channels) - 2)] if i == 1 else extra[:1]
                if any(amounts):
                    yield from self._padded(node, i, amounts)
        elif node.output[0] in self.wide:
            for i, name in enumerate(node.input):
                if node.op_type in _JOIN and math.prod(shapes.get(name, ())) > 1:
                    more = -self.wide[node.output[0]] % self.multiple
                    yield from self._padded(node, i, [more if n > 1 else 0 for n in shapes[name]])
        else:
            for i, name in enumerate(node.input):
                if name in self.wide:
                    yield from self._sliced(node, i)
        yield node

    @staticmethod
    def _ends(node: Any) -> tuple[str, str]:
        return node.output[0], node.input[0]

    def _padded(self, node: Any, i: int, amounts: list[int]) -> Iterator[Any]:
        import onnx

        name, key = node.input[i], (node.input[i], *amounts)
        if key not in self.made:
            sizes = self._constant([0] * len(amounts) + amounts)
            self.made[key] = self.names.new(f"{name}_padded")
            yield onnx.helper.make_node("Pad", [name, sizes], [self.made[key]])
        node.input[i] = self.made[key]

    def _sliced(self, node: Any, i: int) -> Iterator[Any]:
        import onnx

        name, key = node.input[i], (node.input[i],)
        if key not in self.made:
            bounds = [self._constant([n]) for n in (0, self.wide[name], 1)]
            self.made[key] = self.names.new(f"{name}_sliced")
            yield onnx.helper.make_node("Slice", [name, *bounds], [self.made[key]])
        node.input[i] = self.made[key]

    def _constant(self, values: list[int]) -> str:
        import onnx

        key = tuple(values)
        if key not in self.made:
            self.made[key] = self.names.new(f"whole_{'_'.join(map(str, values))}")
            tensor = onnx.helper.make_tensor(self.made[key], onnx.TensorProto.INT64, [len(values)], values)
            self.graph.initializer.append(tensor)
        return self.made[key]
