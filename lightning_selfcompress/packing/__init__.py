"""What is stored of a model, and as which bytes."""

from lightning_selfcompress.packing.content import Packed, PackedTensor
from lightning_selfcompress.packing.file import PackedFileError, PackedSize, from_bytes, packed_size, to_bytes

__all__ = ["Packed", "PackedFileError", "PackedSize", "PackedTensor", "from_bytes", "packed_size", "to_bytes"]
