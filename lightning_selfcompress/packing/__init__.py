"""What is stored of a model, and as which bytes."""

from lightning_selfcompress.packing.content import Packed, PackedTensor, from_rows, is_half, to_rows
from lightning_selfcompress.packing.estimate import estimated_size
from lightning_selfcompress.packing.file import PackedFileError, PackedSize, from_bytes, packed_size, to_bytes

__all__ = [
    "Packed",
    "PackedFileError",
    "PackedSize",
    "PackedTensor",
    "estimated_size",
    "from_bytes",
    "from_rows",
    "is_half",
    "packed_size",
    "to_bytes",
    "to_rows",
]
