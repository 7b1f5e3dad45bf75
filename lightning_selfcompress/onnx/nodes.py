"""Rewrites of the nodes of an ONNX graph that read integer weights, and removal of its unused parts."""

from collections.abc import Collection, Iterator
from typing import Any


class Names:
    """Unique names for the new tensors of a graph.

    The names in a graph come from names in the user's code, so any name may exist already.

    Args:
        graph: The graph of a model.
    """

    def __init__(self, graph: Any) -> None:
        self._taken = {value.name for part in _graphs(graph) for value in (*part.input, *part.initializer)}
        self._taken |= {name for part in _graphs(graph) for node in part.node for name in node.output}

    def new(self, name: str) -> str:
        """Returns this name, or this name with a number appended if it exists already."""
        found, i = name, 0
        while found in self._taken:
            i += 1
            found = f"{name}_{i}"
        self._taken.add(found)
        return found


def flatten_matrices(proto: Any, codes: Collection[str]) -> None:
    """Replaces the Reshape that removes the last dimension of a dequantized matrix, of size 1, by Flatten, in place.

    Flatten needs no shape, and ONNX Runtime inserts no node between the weights and Flatten.

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
    """Adds the default zero points to DequantizeLinear, in place, if its output goes to an operator not in _IN_PLACE.

    ONNX Runtime before 1.28 quantizes the output of a Reshape or a Transpose again, and without zero points it
    quantizes to unsigned integers: negative weights become 0.

    Args:
        proto: An ONNX model.
        codes: Names of the initializers that are codes.
    """
    import onnx

    stored, names = {t.name: t for t in proto.graph.initializer}, Names(proto.graph)
    moved = {name for node in _nodes(proto) if node.op_type not in _IN_PLACE for name in node.input}
    points: dict[str, str] = {}  # name of the codes -> name of their zero points
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


# ONNX Runtime inserts no node between the weights and these operators.
_IN_PLACE = {"Conv", "ConvTranspose", "Flatten", "Gather", "Pad"}


def multiply_out(proto: Any, codes: Collection[str]) -> None:
    """Replaces DequantizeLinear by a cast of the codes and a product with the scales, in place, with equal values.

    Args:
        proto: An ONNX model.
        codes: Names of the initializers that are codes.
    """
    import onnx

    stored, names = {t.name: t for t in proto.graph.initializer}, Names(proto.graph)
    factors: dict[tuple[str, tuple[int, ...]], str] = {}  # by the name of the scales and their shape

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
    """Yields a graph and the subgraphs of its nodes, at any depth."""
    yield graph
    for node in graph.node:
        for a in node.attribute:
            for inner in (*a.graphs, *([a.g] if a.HasField("g") else ())):
                yield from _graphs(inner)


def drop_unused(proto: Any) -> None:
    """Removes nodes and initializers that no output depends on, in place.

    Args:
        proto: An ONNX model.
    """
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    model = onnx_ir.from_proto(proto)
    RemoveUnusedNodesPass()(model)
    proto.CopyFrom(onnx_ir.to_proto(model))
    proto.graph.ClearField("value_info")  # the types of tensors, which may become narrower later


def drop_defaults(proto: Any) -> None:
    """Removes attributes that have their default value, in place.

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
