"""Integers in LEB128: each byte holds seven bits, the lowest bits first, in as few bytes as possible."""


def write(number: int) -> bytes:
    """Returns the bytes of a number >= 0."""
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def zigzag(number: int) -> int:
    """Maps an integer to an integer >= 0: 0, -1, 1, -2, ... become 0, 1, 2, 3, ..."""
    return number << 1 if number >= 0 else (-number << 1) - 1


def from_zigzag(number: int) -> int:
    """Undoes :func:`zigzag`."""
    return number >> 1 if number % 2 == 0 else -(number + 1 >> 1)
