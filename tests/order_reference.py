"""The order of samples once more, one position at a time in Python's integers, from the docstrings alone."""

from fractions import Fraction

M32, M64 = 2**32 - 1, 2**64 - 1


def mix64(value):
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & M64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & M64
    return value ^ value >> 31


def mix32(value):
    value = (value ^ value >> 16) * 0x85EBCA6B & M32
    value = (value ^ value >> 13) * 0xC2B2AE35 & M32
    return value ^ value >> 16


def hashed(*parts):
    state = 0x243F6A8885A308D3
    for part in parts:
        state = mix64((part ^ state) + 0x9E3779B97F4A7C15 & M64)
    return state


def permuted(index, size, key):
    """Eight Feistel rounds, repeated until the result is below `size`."""
    bits = max(4, (size - 1).bit_length())
    high_bits, low_bits = bits // 2, bits - bits // 2
    keys = []
    for number in range(4):
        both = mix64(key + (number + 1) * 0x9E3779B97F4A7C15 & M64)
        keys += [both >> 32, both & M32]
    while True:
        high, low = index >> low_bits, index % 2**low_bits
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            high = (high + mix32(low + first & M32)) % 2**high_bits
            low = (low + mix32(high + second & M32)) % 2**low_bits
        index = high << low_bits | low
        if index < size:
            return index


def dealt(position, segments, seed, lanes):
    """(corpus, draw number) of a position; `segments` are (first position, quotas) in ascending order."""
    base = [0] * len(segments[0][1])
    for (first, quotas), (following, _) in zip(segments, [*segments[1:], (position + 1, None)], strict=True):
        slots = sum(quotas)
        if position < following:
            break
        base = [b + (following - first) // slots * quota for b, quota in zip(base, quotas, strict=True)]
    turn, lane = divmod(position - first, lanes)
    superblock = turn // slots
    table = sorted((Fraction(2 * d + 1, 2 * quota), c, d) for c, quota in enumerate(quotas) for d in range(quota))
    rotation = hashed(seed, 1, first + superblock * lanes * slots) % slots
    _, corpus, d = table[(turn + lane * slots // lanes + rotation) % slots]
    return corpus, base[corpus] + (superblock * quotas[corpus] + d) * lanes + lane


def shuffled(corpus, draw, rows, seed, lanes, block_rows, window_blocks):
    """(epoch, row) of a draw from a corpus of `rows` rows."""
    epoch, index = divmod(draw, rows)
    blocks = rows // block_rows
    lane_blocks = blocks // lanes
    block_key, in_lanes = hashed(seed, 2, corpus, epoch), lane_blocks * lanes * block_rows
    if index >= in_lanes:
        at = in_lanes + permuted(index - in_lanes, rows - in_lanes, hashed(seed, 4, corpus, epoch))
        block, row = divmod(at, block_rows)
        return epoch, permuted(block, blocks, block_key) * block_rows + row if block < blocks else at
    place, lane = divmod(index, lanes)
    window, first = 0, 0
    while place // block_rows >= first + min(2**window, window_blocks):
        first, window = first + min(2**window, window_blocks), window + 1
    width = min(2**window, window_blocks, lane_blocks - first)
    key = hashed(seed, 3, corpus, epoch, lane, window)
    block, row = divmod(permuted(place - first * block_rows, width * block_rows, key), block_rows)
    return epoch, permuted(lane * lane_blocks + first + block, blocks, block_key) * block_rows + row
