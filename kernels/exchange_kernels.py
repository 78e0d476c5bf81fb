"""The Triton side of kernels/exchange.py.

Programs of the same number on all ranks talk to each other. Each counts its messages, in a counter on the device that is
the same on all ranks, so that a replayed graph goes on where the last one stopped. A program writes to its peers first
and waits then, and the GPU starts programs in their order: so it does not matter how many run at a time.
"""

import triton
import triton.language as tl


@triton.jit
def _memory(boxes, rank, kind: tl.constexpr):
    """Where rank's memory begins."""
    return tl.multiple_of(tl.load(boxes + rank).to(tl.pointer_type(kind)), 16)


@triton.jit
def _stopped(stop, halted, looks, PATIENCE: tl.constexpr):
    """Whether to wait no longer: somebody has said so, or it took too long, which is then said to all. Once it is so,
    `halted`, on this device, says so to later kernels. `stop` is memory of the host, and is seldom to be looked at: hundreds
    of programs that do so at a time take a millisecond, in which other ranks' programs would come to look at theirs, and so
    on. Warps may find out one after the other, as there is no barrier where they wait."""
    late = looks > PATIENCE
    if late:
        tl.store(stop, 1)
    over = late | (tl.max(tl.load(stop + tl.zeros([32], tl.int32), volatile=True), 0) != 0)
    if over:
        tl.store(halted, 1)
    return over


@triton.jit
def _next(turn):
    """The number of the next message: odd and even ones in turn, and never 0, which is in memory at first."""
    return tl.where(turn == -1, 2, turn + 1)


@triton.jit
def _part(x, weights, start, lane, count, width, TERMS: tl.constexpr, EVEN: tl.constexpr):
    """What this rank gives to values start + lane: those of x or, TERMS: of so many rows of x, `width` long, the weighted sum,
    the first first. EVEN: width is a multiple of the number of lanes."""
    i = start + lane
    mask = i < count
    if TERMS == 0:
        total = tl.load(x + i, mask=mask, other=0)
    else:
        total = tl.zeros(i.shape, tl.float32)
        m, n = i // width, i % width
        if EVEN:
            m, n = start // width, tl.multiple_of(start % width, 16) + lane
        for term in tl.static_range(TERMS):
            row = m * TERMS + term
            value = tl.load(x + row.to(tl.int64) * width + n, mask=mask, other=0.0)
            if EVEN:  # past the end it is a weight of nothing, and must not be read
                weight = tl.load(weights + row, mask=start < count, other=0.0)
            else:
                weight = tl.load(weights + row, mask=mask, other=0.0)
            # said to be fused: the compiler must not fuse it with what comes then, on one rank and not on others
            total = tl.fma(tl.zeros(i.shape, tl.float32) + weight, value, total)
    return total


@triton.jit
def few_kernel(
    x, weights, residual, out, boxes, turns, stop, halted, count, width, TERMS: tl.constexpr, EVEN: tl.constexpr,
    RANK: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr, LOOKS: tl.constexpr, PATIENCE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """SUM: out = the sum of all ranks' x (fp32; see `_part`), plus residual if there is one. Else all ranks' x (int32), in
    rows of `width`, side by side: out [count / width, SIZE, width].

    A word travels in one packet with the message's number, so that who finds the number has the word. Memory of a program:
    two messages' packets of every rank. Message t + 2 takes the place of message t: who sends it has message t + 1 of its
    reader, which sent that after reading t.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    turn, patient = tl.load(turns + program), 1 - tl.load(halted)
    lane = tl.arange(0, BLOCK)
    mine = _memory(boxes, RANK, tl.int64)
    for start in range(program * BLOCK, count, tl.num_programs(0) * BLOCK):
        turn = _next(turn)
        i = start + lane
        mask = i < count
        own = _part(x, weights, start, lane, count, width, TERMS, EVEN)
        word = own.to(tl.int32, bitcast=True) if SUM else own
        packet = (turn.to(tl.int64) << 32) | (word.to(tl.int64) & 0xFFFFFFFF)
        here = (program * 2 + (turn & 1)) * (SIZE * BLOCK) + lane
        for r in tl.static_range(SIZE):
            if r != RANK:
                tl.store(_memory(boxes, r, tl.int64) + here + RANK * BLOCK, packet, mask=mask, cache_modifier=".wt")
        base = tl.zeros([BLOCK], tl.float32)
        if residual is not None:
            base = tl.load(residual + i, mask=mask, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        target = i // width * (SIZE * width) + i % width
        waits, looks = 1, 0
        while waits > 0:
            total = tl.zeros([BLOCK], tl.float32)
            there = tl.full([BLOCK], 1, tl.int32)
            for r in tl.static_range(SIZE):
                if r == RANK:
                    got = word
                else:
                    packet = tl.load(mine + here + r * BLOCK, mask=mask, other=0, volatile=True)
                    came = ((packet >> 32).to(tl.int32) == turn) | (i >= count)
                    there = there & came.to(tl.int32)
                    got = tl.where(came, packet.to(tl.int32), word)  # nothing that cannot be, if it never comes
                if SUM:
                    total += got.to(tl.float32, bitcast=True)
                else:
                    tl.store(out + target + r * width, got, mask=mask)
            waits = patient * (1 - tl.min(there, 0))
            looks += 1
            if (waits > 0) & (looks % LOOKS == 0):
                waits = 1 - _stopped(stop, halted, looks, PATIENCE).to(tl.int32)
        if SUM:
            tl.store(out + i, (total + base).to(out.dtype.element_ty), mask=mask)
    tl.store(turns + program, turn)


@triton.jit
def _flag(program, kind, rank, SIZE: tl.constexpr):
    return (program * 2 + kind) * SIZE + rank


@triton.jit
def _tell(boxes, program, kind: tl.constexpr, turn, RANK: tl.constexpr, SIZE: tl.constexpr):
    """All that this program has written to the others is to be seen by who sees this."""
    tl.debug_barrier()
    for r in tl.static_range(SIZE):
        if r != RANK:
            at = _memory(boxes, r, tl.int32) + _flag(program, kind, RANK, SIZE)
            tl.atomic_xchg(at, turn, sem="release", scope="sys")


@triton.jit
def _await(
    boxes, stop, halted, patient, program, kind: tl.constexpr, turn,
    RANK: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, LOOKS: tl.constexpr, PATIENCE: tl.constexpr,
):  # fmt: skip
    """Until all others have told `kind` of this turn."""
    r = tl.arange(0, PADDED)
    at = _memory(boxes, RANK, tl.int32) + _flag(program, kind, r, SIZE)
    waits, looks = 1, 0
    while waits > 0:
        seen = tl.load(at, mask=r < SIZE, other=0, volatile=True)
        waits = patient * (1 - tl.min(((seen == turn) | (r == RANK) | (r >= SIZE)).to(tl.int32), 0))
        looks += 1
        if (waits > 0) & (looks % LOOKS == 0):
            waits = 1 - _stopped(stop, halted, looks, PATIENCE).to(tl.int32)
    tl.debug_barrier()


@triton.jit
def many_kernel(
    x, weights, residual, out, boxes, turns, stop, halted, count, width, TERMS: tl.constexpr, EVEN: tl.constexpr,
    RANK: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
    ROOM: tl.constexpr, LOOKS: tl.constexpr, PATIENCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `few_kernel`'s sums, with less traffic: of SIZE blocks each rank sums one, and sends what comes of it to all.

    Memory, in words of 32 bits: the flags of PROGRAMS programs; of each two messages of ROOM words from every rank, to be
    summed; all programs' sums in the same way. A rank tells of its next message when it has all sums of this one, so nothing
    is overwritten, and no flag goes on, before it has been seen.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    turn, patient = tl.load(turns + program), 1 - tl.load(halted)
    lane = tl.arange(0, BLOCK)
    FLAGS: tl.constexpr = PROGRAMS * 2 * SIZE
    kind: tl.constexpr = out.dtype.element_ty
    PART: tl.constexpr = PROGRAMS * 2 * SIZE * ROOM
    for start in range(program * SIZE * BLOCK, count, tl.num_programs(0) * SIZE * BLOCK):
        turn = _next(turn)
        here = FLAGS + (program * 2 + (turn & 1)) * (SIZE * ROOM) + lane
        for r in tl.static_range(SIZE):
            if r != RANK:
                i = start + r * BLOCK + lane
                values = _part(x, weights, start + r * BLOCK, lane, count, width, TERMS, EVEN)
                tl.store(
                    _memory(boxes, r, tl.float32) + here + RANK * ROOM, values, mask=i < count, cache_modifier=".wt"
                )
        _tell(boxes, program, 0, turn, RANK, SIZE)
        i = start + RANK * BLOCK + lane
        mask = i < count
        own = _part(x, weights, start + RANK * BLOCK, lane, count, width, TERMS, EVEN)
        base = tl.zeros([BLOCK], tl.float32)
        if residual is not None:
            base = tl.load(residual + i, mask=mask, other=0.0).to(tl.float32)
        _await(boxes, stop, halted, patient, program, 0, turn, RANK, SIZE, PADDED, LOOKS, PATIENCE)
        total = tl.zeros([BLOCK], tl.float32)
        for r in tl.static_range(SIZE):
            if r == RANK:
                total += own
            else:
                total += tl.load(
                    _memory(boxes, RANK, tl.float32) + here + r * ROOM, mask=mask, other=0.0, volatile=True
                )
        total = (total + base).to(kind)
        tl.store(out + i, total, mask=mask)
        # sums take the room of words, whatever their type
        there = (FLAGS + PART + (program * 2 + (turn & 1)) * (SIZE * ROOM)) * (32 // kind.primitive_bitwidth) + lane
        step: tl.constexpr = ROOM * (32 // kind.primitive_bitwidth)
        for r in tl.static_range(SIZE):
            if r != RANK:
                tl.store(_memory(boxes, r, kind) + there + RANK * step, total, mask=mask, cache_modifier=".wt")
        _tell(boxes, program, 1, turn, RANK, SIZE)
        _await(boxes, stop, halted, patient, program, 1, turn, RANK, SIZE, PADDED, LOOKS, PATIENCE)
        for r in tl.static_range(SIZE):
            if r != RANK:
                i = start + r * BLOCK + lane
                sums = tl.load(_memory(boxes, RANK, kind) + there + r * step, mask=i < count, other=0.0, volatile=True)
                tl.store(out + i, sums, mask=i < count)
    tl.store(turns + program, turn)
