"""The two Triton kernels of `index.gpu_scan`: int8 or fp16 products against a bar, and float32 scores of what came through.

Importing this module imports triton where it is installed; where it is not, the module is empty and `index.gpu_code.gpu_reason`
says so. With TRITON_INTERPRET=1 set before, the kernels run on CPU tensors, one program at a time.
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    NONE: tl.constexpr = tl.constexpr(-(2**63))
    """The key of a slot that holds no row: below every score."""

    @triton.jit
    def permitted(above: tl.tensor, row: tl.tensor, own: tl.tensor, bits: tl.tensor, set_bytes: tl.tensor) -> tl.tensor:
        """Whether the set of each query (`own`, -1: every row) holds each row; read where `above` only."""
        byte = own.to(tl.int64)[None, :] * set_bytes + (row >> 3)[:, None]
        packed = tl.load(bits + byte, mask=above & (own >= 0)[None, :], other=255)
        return ((packed.to(tl.int32) >> (row & 7)[:, None]) & 1) > 0

    @triton.jit
    def note(
        above: tl.tensor, row: tl.tensor, asking: tl.tensor, found: tl.tensor, counts: tl.tensor, capacity: tl.tensor
    ) -> None:
        """The rows that are `above` are counted, and appended to their queries' lists while there is room."""
        none = tl.zeros(above.shape, tl.int32)
        slots = tl.atomic_add(counts + asking[None, :] + none, 1, mask=above, sem="relaxed")
        place = found + asking.to(tl.int64)[None, :] * capacity + slots
        tl.store(place, row[:, None] + none, mask=above & (slots < capacity))

    @triton.jit
    def scan(
        codes: tl.tensor,  # int8 or float16 [blocks * BLOCK, DIMS]
        rows: tl.tensor,  # int32 [blocks * BLOCK], the row of each code
        queries: tl.tensor,  # as codes [groups * ASKED, DIMS]
        wishes: tl.tensor,  # float64 [3, groups * ASKED]: score wanted, what lengths and losses take from it; in query steps
        facts: tl.tensor,  # float64 [3, blocks]: step, longest vector, largest loss
        bits: tl.tensor,  # uint8 [sets, set_bytes], row r in bit r % 8 of byte r // 8
        which: tl.tensor,  # int32 [groups * ASKED], the set of each query, -1: every row
        found: tl.tensor,  # int32 [Q, capacity], written up to counts or capacity; queries from Q on want too much to be written
        counts: tl.tensor,  # int32 [groups * ASKED], from 0: all that came through, also what found no room
        count: int,
        blocks: int,
        groups: int,
        capacity: int,
        set_bytes: int,
        DIMS: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK: tl.constexpr,
        TILE: tl.constexpr,
        ASKED: tl.constexpr,
        WHOLE: tl.constexpr,
        FILTERED: tl.constexpr,
    ) -> None:
        """Every permitted row whose product reaches its query's bar is noted; a program has one block and ASKED queries.

        Programs of one block are neighbours: what the first reads from memory the others find in the second-level cache.
        """
        block = tl.program_id(0) // groups
        asking = (tl.program_id(0) % groups) * ASKED + tl.arange(0, ASKED)
        wide = groups * ASKED
        wanted, by_length, by_loss = (
            tl.load(wishes + asking),
            tl.load(wishes + wide + asking),
            tl.load(wishes + 2 * wide + asking),
        )
        step, length, loss = tl.load(facts + block), tl.load(facts + blocks + block), tl.load(facts + 2 * blocks + block)
        bar = (wanted - by_length * length - by_loss * loss) / step
        bar = tl.minimum(tl.maximum(bar, -1073741824.0), 1073741824.0)  # no product is as large
        if WHOLE:  # noqa: SIM108 (the compiler takes one branch and never sees the other)
            # One less than the last product that is surely too small, and one more for the rounding of the line above.
            bars = (tl.ceil(bar) - 2).to(tl.int32)
        else:
            bars = (bar - tl.abs(bar) * 1e-6 - 1e-30).to(tl.float32)
        across = tl.arange(0, CHUNK)
        question = tl.load(queries + asking[None, :] * DIMS + across[:, None])
        for tile in range(0, BLOCK, TILE):
            here = block.to(tl.int64) * BLOCK + tile + tl.arange(0, TILE)
            part = tl.load(codes + here[:, None] * DIMS + across[None, :])
            products = tl.dot(part, question, out_dtype=tl.int32 if WHOLE else tl.float32)
            for chunk in tl.static_range(CHUNK, DIMS, CHUNK):
                part = tl.load(codes + here[:, None] * DIMS + (chunk + across)[None, :])
                rest = tl.load(queries + asking[None, :] * DIMS + (chunk + across)[:, None])
                products = tl.dot(part, rest, products, out_dtype=tl.int32 if WHOLE else tl.float32)
            above = (products > bars[None, :]) & (here < count)[:, None]
            # Few tiles hold a survivor; the rest is spared the atomics, which cost more than the products.
            if tl.max(tl.max(above.to(tl.int32), axis=1), axis=0) > 0:
                row = tl.load(rows + here)
                if FILTERED:
                    above = above & permitted(above, row, tl.load(which + asking), bits, set_bytes)
                note(above, row, asking, found, counts, capacity)

    @triton.jit
    def score(
        vectors: tl.tensor,  # float32 [n, DIMS]
        places: tl.tensor,  # int32 [Q, width], where in `vectors` each row stands
        rows: tl.tensor,  # int32 [Q, width], -1: an empty slot
        queries: tl.tensor,  # float32 [Q, DIMS]
        keys: tl.tensor,  # int64 [Q, width]
        width: int,
        groups: int,
        DIMS: tl.constexpr,
        ROWS: tl.constexpr,
    ) -> None:
        """The key of every slot is written: it rises with the float32 score and, at equal score, falls with the row.

        Products are summed in float64 in the order of the dims, then rounded once. A product of two float32 is exact in
        float64, so a fused multiply-add rounds as the two steps do: every machine, and numpy, gets the same bits.
        """
        query = (tl.program_id(0) // groups).to(tl.int64)
        slots = (tl.program_id(0) % groups) * ROWS + tl.arange(0, ROWS)
        inside = slots < width
        row = tl.load(rows + query * width + slots, mask=inside, other=-1)
        real = row >= 0
        start = vectors + tl.load(places + query * width + slots, mask=real, other=0).to(tl.int64) * DIMS
        total = tl.zeros([ROWS], tl.float64)
        for dim in range(DIMS):
            number = tl.load(start + dim, mask=real, other=0.0)
            total += number.to(tl.float64) * tl.load(queries + query * DIMS + dim).to(tl.float64)
        result = total.to(tl.float32)
        turned = tl.where(result == 0, 0.0, result).to(tl.int32, bitcast=True)  # -0 is 0
        turned = turned ^ ((turned >> 31) & 0x7FFFFFFF)
        key = (turned.to(tl.int64) << 32) | (0x7FFFFFFF - row).to(tl.int64)
        tl.store(keys + query * width + slots, tl.where(real, key, NONE), mask=inside)
