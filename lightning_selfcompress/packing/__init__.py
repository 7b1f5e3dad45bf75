"""The packed form of a model: the tensors that are stored, and the bytes that store them."""

from lightning_selfcompress.packing.content import (
    Codes,
    Packed,
    PackedTensor,
    as_bytes,
    as_codes,
    as_it_is,
    from_rows,
    is_half,
    kept_number,
    to_rows,
)
from lightning_selfcompress.packing.estimate import estimated_size
from lightning_selfcompress.packing.narrow_floats import is_vector, rounded
from lightning_selfcompress.packing.reading import from_bytes, from_file
from lightning_selfcompress.packing.structure import MAGIC, VERSION
from lightning_selfcompress.packing.writing import PackedSize, packed_size, stored_dtype, to_bytes

__all__ = [
    "MAGIC",
    "VERSION",
    "Codes",
    "Packed",
    "PackedSize",
    "PackedTensor",
    "as_bytes",
    "as_codes",
    "as_it_is",
    "estimated_size",
    "from_bytes",
    "from_file",
    "from_rows",
    "is_half",
    "is_vector",
    "kept_number",
    "packed_size",
    "rounded",
    "stored_dtype",
    "to_bytes",
    "to_rows",
]
