"""BLAKE3 in plain Python, for where the package `blake3` isn't installed: right, but a thousand times slower.

Unkeyed hashing only, of what fits into memory: what journals need. Written from the paper's description of BLAKE3.
"""

import struct

IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
CHUNK_START, CHUNK_END, PARENT, ROOT = 1, 2, 4, 8
CHUNK_BYTES, BLOCK_BYTES = 1024, 64
MASK = 0xFFFFFFFF


def _schedule():
    """The 56 mixing steps of a compression: four words of the state, two of the message."""
    order, steps = tuple(range(16)), []
    for _ in range(7):
        for index, words in enumerate(COLUMNS + DIAGONALS):
            steps.append(words + order[2 * index : 2 * index + 2])
        order = tuple(order[place] for place in PERMUTATION)
    return tuple(steps)


SCHEDULE = _schedule()


def _compress(chaining, block, counter, flags):
    """The eight words of chaining value, or of output, of one block of at most 64 bytes."""
    message = struct.unpack("<16I", block.ljust(BLOCK_BYTES, b"\0"))
    state = [*chaining, *IV[:4], counter & MASK, counter >> 32, len(block), flags]
    for a, b, c, d, x, y in SCHEDULE:
        va, vb, vc, vd = state[a], state[b], state[c], state[d]
        va = (va + vb + message[x]) & MASK
        vd ^= va
        vd = (vd >> 16 | vd << 16) & MASK
        vc = (vc + vd) & MASK
        vb ^= vc
        vb = (vb >> 12 | vb << 20) & MASK
        va = (va + vb + message[y]) & MASK
        vd ^= va
        vd = (vd >> 8 | vd << 24) & MASK
        vc = (vc + vd) & MASK
        vb ^= vc
        state[a], state[b], state[c], state[d] = va, (vb >> 7 | vb << 25) & MASK, vc, vd
    return [state[index] ^ state[index + 8] for index in range(8)]


def _chunk(data, counter, root):
    """The chaining value of up to 1024 bytes; the output if they are all there is."""
    chaining, last = IV, max(0, len(data) - 1) // BLOCK_BYTES
    for index in range(last + 1):
        flags = CHUNK_START * (index == 0) | (CHUNK_END | root) * (index == last)
        block = data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
        chaining = _compress(chaining, block, counter, flags)
    return chaining


def _tree(data, first_chunk, root):
    """The same of any number of bytes: the left half of the tree is the largest full one that leaves something."""
    if len(data) <= CHUNK_BYTES:
        return _chunk(data, first_chunk, root)
    left_chunks = 1 << ((len(data) - 1) // CHUNK_BYTES).bit_length() - 1
    left = _tree(data[: left_chunks * CHUNK_BYTES], first_chunk, 0)
    right = _tree(data[left_chunks * CHUNK_BYTES :], first_chunk + left_chunks, 0)
    return _compress(IV, struct.pack("<16I", *left, *right), 0, PARENT | root)


class blake3:  # noqa: N801, named as in the package
    """Has the three methods of the package's class that journals need."""

    def __init__(self, data=b""):
        self.data = bytearray(data)

    def update(self, data):
        self.data += data
        return self

    def digest(self):
        return struct.pack("<8I", *_tree(bytes(self.data), 0, ROOT))
