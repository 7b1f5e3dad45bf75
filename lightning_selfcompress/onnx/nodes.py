"""The nodes of an ONNX graph that read integer weights, and what a graph can do without."""

from collections.abc import Collection, Iterator
from typing import Any


class Names:
    """Names for new tensors of a graph, which no other has.

    Names in a graph come from names in the user's code, so any name may be taken.

    Args:
        graph: The graph of a model.
    """

    def __init__(self, graph: Any) -> None:
        self._taken = {value.name for part in _graphs(graph) for value in (*part.input, *part.initializer)}
        self._taken |= {name for part in _graphs(graph) for node in part.node for name in node.output}

    def new(self, name: str) -> str:
        """A name: this one, or it with a number behind."""
        found, i = name, 0
        while found in self._taken:
            i += 1
            found = f"{name}_{i}"
        self._taken.add(found)
        return found


def flatten_matrices(proto: Any, codes: Collection[str]) -> None:
    """Has Flatten take away the last dimension of codes, which is 1, in place of Reshape.

    It needs no shape, and ONNX Runtime leaves it where it is.

    Args:
        proto: An ONNX model.
        codes: Names of the initializers that are codes.
    """
    import onnx

    stored = {t.name: t for t in proto.graph.initializer}
    dims = {n.output[0]: list(stored[n.input[0]].dims) for n in _nodes(proto) if _dequantizes(n, codes)}
    for node in (node for node in _nodes(proto) if node.op_type == "Reshape" and node.input[0] in dims):
        shape = stored.get(node.input[1])
        wanted = onnx.numpy_helper.to_array(shape).tolist() if shape is not None else []
        if len(wanted) == 2 and [*wanted, 1] == dims[node.input[0]]:
            node.op_type = "Flatten"
            del node.input[1], node.attribute[:]
    drop_unused(proto)


def add_zero_points(proto: Any, codes: Collection[str]) -> None:
    """Tells DequantizeLinear the zero points that it has by default where its output is moved about, in place.

    ONNX Runtime before 1.28 quantizes again behind a Reshape or a Transpose, and without zero points it does so to
    unsigned integers: negative weights become 0.

    Args:
        proto: An ONNX model.
        codes: Names of the initializers that are codes.
    """
    import onnx

    stored, names = {t.name: t for t in proto.graph.initializer}, Names(proto.graph)
    moved = {name for node in _nodes(proto) if node.op_type not in _IN_PLACE for name in node.input}
    points: dict[str, str] = {}  # by the codes' names
    for node in _nodes(proto):
        if _dequantizes(node, codes) and node.output[0] in moved:
            values, scales = (stored[name] for name in node.input)
            if values.name not in points:
                points[values.name] = names.new(f"{values.name}_zero_point")
                zeros = onnx.helper.make_tensor(
                    points[values.name], values.data_type, list(scales.dims), [0] * scales.dims[0]
                )
                proto.graph.initializer.append(zeros)
            node.input.append(points[values.name])


_IN_PLACE = {
    "Conv",
    "ConvTranspose",
    "Flatten",
    "Gather",
    "Pad",
}  # no node is inserted between the weights and these operators


def multiply_out(proto: Any, codes: Collection[str]) -> None:
    """Replaces DequantizeLinear by a cast of the codes and their product with the scales, in place: the same values.

    Args:
        proto: An ONNX model.
        codes: Names of the initializers that are codes.
    """
    import onnx

    stored, names = {t.name: t for t in proto.graph.initializer}, Names(proto.graph)
    factors: dict[tuple[str, tuple[int, ...]], str] = {}  # by the scales' names and the shape they take

    def multiplied(node: Any) -> list[Any]:
        (integers, scales), (out,) = node.input, node.output
        sizes = [1] * len(stored[integers].dims)
        sizes[next((a.i for a in node.attribute if a.name == "axis"), 1)] = -1
        key = (scales, tuple(sizes))
        if key not in factors:
            factors[key] = names.new(f"{scales}_factor")
            values = onnx.numpy_helper.to_array(stored[scales]).reshape(sizes)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(values, factors[key]))
        cast = names.new(f"{out}_cast")
        return [
            onnx.helper.make_node("Cast", [integers], [cast], to=stored[scales].data_type),
            onnx.helper.make_node("Mul", [cast, factors[key]], [out]),
        ]

    for graph in _graphs(proto.graph):
        nodes = [m for node in graph.node for m in (multiplied(node) if _dequantizes(node, codes) else [node])]
        del graph.node[:]
        graph.node.extend(nodes)
    drop_unused(proto)


def _dequantizes(node: Any, codes: Collection[str]) -> bool:
    return node.op_type == "DequantizeLinear" and node.input[0] in codes


def _nodes(proto: Any) -> list[Any]:
    return [node for graph in _graphs(proto.graph) for node in graph.node]


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph, and those within its nodes."""
    yield graph
    for node in graph.node:
        for a in node.attribute:
            for inner in (*a.graphs, *([a.g] if a.HasField("g") else ())):
                yield from _graphs(inner)


def drop_unused(proto: Any) -> None:
    """Takes out nodes and initializers that no output depends on, in place.

    Args:
        proto: An ONNX model.
    """
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    model = onnx_ir.from_proto(proto)
    RemoveUnusedNodesPass()(model)
    proto.CopyFrom(onnx_ir.to_proto(model))
    proto.graph.ClearField("value_info")  # types of tensors, which may be stored narrower later on


def drop_defaults(proto: Any) -> None:
    """Leaves out attributes that say what holds without them, in place.

    Args:
        proto: An ONNX model.
    """
    import onnx

    (version,), value = (o.version for o in proto.opset_import if not o.domain), onnx.helper.get_attribute_value
    for node in (node for node in proto.graph.node if not node.domain):
        known = onnx.defs.get_schema(node.op_type, version).attributes
        defaults = {name: a.default_value for name, a in known.items() if a.default_value.type}
        told = [a for a in node.attribute if a.name not in defaults or value(a) != value(defaults[a.name])]
        del node.attribute[:]
        node.attribute.extend(told)
