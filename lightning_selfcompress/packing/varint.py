"""Whole numbers in as many bytes as they need: seven bits a byte, the lowest first, LEB128."""


def write(number: int) -> bytes:
    """The bytes of a number >= 0."""
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def zigzag(number: int) -> int:
    """A number of either sign as one >= 0: 0, -1, 1, -2, ..."""
    return number << 1 if number >= 0 else (-number << 1) - 1


def from_zigzag(number: int) -> int:
    """Inverse of :func:`zigzag`."""
    return number >> 1 if number % 2 == 0 else -(number + 1 >> 1)
