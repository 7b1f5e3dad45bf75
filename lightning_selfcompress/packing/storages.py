"""The storages of tensors that are not coded: as they are, or in fewer bytes that hold the same values."""

import torch
from torch import Tensor

from lightning_selfcompress.packing import varint
from lightning_selfcompress.packing.narrow_floats import logarithmic, scaled_int8

RAW, HALF, CODED, INT8, INT16, INT32, SCALED, LOGARITHMIC, CONSTANT = range(9)


MOST_NBYTES = 16  # the bytes of one value of the widest dtype


NARROW = {
    HALF: torch.float16,
    INT8: torch.int8,
    INT16: torch.int16,
    INT32: torch.int32,
    SCALED: torch.int8,
    LOGARITHMIC: torch.uint8,
}


# The dtypes of the tensors that each storage is for; any dtype for a storage that is not listed.
WIDER = {
    HALF: (torch.float32,),
    INT8: (torch.int16, torch.int32, torch.int64),
    INT16: (torch.int32, torch.int64),
    INT32: (torch.int64,),
    SCALED: (torch.float32,),
    LOGARITHMIC: (torch.float32,),
}


VECTOR_FORMS = {2: SCALED, 3: LOGARITHMIC, 4: RAW, 5: HALF, 6: CONSTANT}  # of heads of float32 vectors


def storage_of(values: Tensor) -> int:
    """Returns the storage that holds all values exactly in the fewest bytes."""
    count = values.numel()
    if count > 1 and is_constant(values):
        if count > MOST_NBYTES:  # any other storage has a byte for each value
            return CONSTANT
        other = _narrowest(values)
        return CONSTANT if values.element_size() <= len(to_stored(values, other)) else other
    return _narrowest(values)


def is_constant(values: Tensor) -> bool:
    """Returns whether a tensor has entries, and they are all the same, to the bit."""
    if not values.numel():
        return False
    if all(stride == 0 or size == 1 for stride, size in zip(values.stride(), values.shape, strict=True)):
        return True  # without a look at the entries, which may be one number of which a file claims many
    flat = values.reshape(-1)
    return all(
        bool((some.view(torch.uint8).view(-1, some.element_size()) == some[:1].view(torch.uint8)).all())
        for some in (flat[:64], flat)
    )


def _narrowest(values: Tensor) -> int:
    """Returns the storage of fewest bytes among those that hold each value on its own."""
    if values.dtype == torch.float32:
        count = values.numel()
        nbytes = {HALF: 2 * count} if torch.equal(values.half().float(), values) else {}
        for storage, found in ((SCALED, scaled_int8(values)), (LOGARITHMIC, logarithmic(values))):
            if found is not None:
                nbytes[storage] = len(varint.write(varint.zigzag(found[0]))) + count
        nbytes[RAW] = 4 * count
        return min(nbytes, key=nbytes.__getitem__)
    for storage in (INT8, INT16, INT32):
        if values.dtype in WIDER[storage]:
            limits = torch.iinfo(NARROW[storage])
            if not values.numel() or limits.min <= int(values.min()) <= int(values.max()) <= limits.max:
                return storage
    return RAW


def to_stored(values: Tensor, storage: int) -> bytes:
    """Returns the bytes of values that this storage can hold."""
    if storage == CONSTANT:
        values = values[(0,) * values.dim()]
    if storage in (SCALED, LOGARITHMIC):
        found = scaled_int8(values) if storage == SCALED else logarithmic(values)
        assert found is not None
        return varint.write(varint.zigzag(found[0])) + found[1].tobytes()
    narrow = values.to(NARROW.get(storage, values.dtype)).contiguous()
    return narrow.reshape(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b""
