"""The kernels of the state-space scan; `state_space.py` says what each is for and launches them.

Axes as there: positions i (that read the state) and j <= i (that wrote to it) of one chunk, channels of a head, numbers of
the state. `decay` holds the sum of dt A since the chunk's begin, position included, so exp(decay_i - decay_j) is what
remains at i of what was written at j; the difference is masked before exp, which would overflow for the future.
Every matrix product takes operands of type OPERAND and sums in fp32; everything else is fp32.
"""

# mypy: allow-untyped-defs
# (arguments of kernels are pointers and numbers of Triton's own language)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of(
    source, rows, stride, cols, there, COUNT: tl.constexpr, PADDED: tl.constexpr, OPERAND: tl.constexpr
):
    """source[rows, cols] with zeros where not `there` and behind COUNT of PADDED columns, as OPERAND."""
    inside = there[:, None]
    if COUNT != PADDED:
        inside &= (cols < COUNT)[None, :]
    return tl.load(source + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0).to(OPERAND)


@triton.jit
def chunk_decay(
    dt, rates, steps, decay, length, heads, chunk, dt_b, dt_s, dt_h, HEADS: tl.constexpr, BLOCK: tl.constexpr
):
    """dt [b, s, np] and A [np] -> dt and its decay as fp32 [b, np, s]."""
    b = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    local = tl.arange(0, BLOCK)
    place = tl.program_id(0).to(tl.int64) * chunk + local
    inside = ((local < chunk) & (place < length))[:, None] & (head < heads)[None, :]
    source = dt + b * dt_b + place[:, None] * dt_s + head[None, :] * dt_h
    step = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    rate = tl.load(rates + head, mask=head < heads, other=0.0).to(tl.float32)
    target = (b * heads + head[None, :]) * length + place[:, None]
    tl.store(steps + target, step, mask=inside)
    tl.store(decay + target, tl.cumsum(step * rate[None, :], 0), mask=inside)


@triton.jit
def chunk_states(
    value, shared, steps, decay, out, length, chunk, heads, share, v_b, v_s, v_h, m_b, m_s, m_g,
    BACKWARD: tl.constexpr, WIDTH: tl.constexpr, STATE: tl.constexpr, BW: tl.constexpr, BS: tl.constexpr,
    BK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A chunk's sum over positions of w value shared^T -> [b, c, np, hn, n].

    Forward what it adds to the state behind it: w = dt exp(decay_end - decay_j), of x and B. Backward what its outputs
    add to the gradient of the state before it: w = exp(decay_i), of the gradient of y and of C.
    """
    pair = tl.program_id(0)
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    c = tl.program_id(2)
    first = c.to(tl.int64) * chunk
    size = tl.minimum(chunk, length - c * chunk)
    tiles = (STATE + BS - 1) // BS
    channel = tl.program_id(1) // tiles * BW + tl.arange(0, BW)
    number = tl.program_id(1) % tiles * BS + tl.arange(0, BS)
    value += b * v_b + h * v_h + first * v_s
    shared += b * m_b + h // share * m_g + first * m_s
    steps += pair.to(tl.int64) * length + first
    decay += pair.to(tl.int64) * length + first
    last = tl.load(decay + size - 1)
    acc = tl.zeros([BW, BS], dtype=tl.float32)
    for start in range(0, size, BK):
        place = start + tl.arange(0, BK)
        there = place < size
        since = tl.load(decay + place, mask=there, other=0.0)
        if BACKWARD:
            weight = tl.exp(since)
        else:
            weight = tl.exp(last - since) * tl.load(steps + place, mask=there, other=0.0)
        values = tl.load(
            value + place[None, :] * v_s + channel[:, None],
            mask=there[None, :] & (channel < WIDTH)[:, None],
            other=0.0,
        )
        factors = tl.load(
            shared + place[:, None] * m_s + number[None, :],
            mask=there[:, None] & (number < STATE)[None, :],
            other=0.0,
        )
        weighted = (values.to(tl.float32) * weight[None, :]).to(OPERAND)
        acc = tl.dot(weighted, factors.to(OPERAND), acc, input_precision=PRECISION)
    out += ((b * tl.num_programs(2) + c) * heads + h) * (WIDTH * STATE)
    tl.store(
        out + channel[:, None] * STATE + number[None, :],
        acc,
        mask=(channel < WIDTH)[:, None] & (number < STATE)[None, :],
    )


@triton.jit
def pass_states(
    begin, states, end, decay, entering, crossing, length, chunk, chunks, heads, size,
    HAS_FIRST: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From chunk to chunk: `states` [b, c, np, size] holds what chunks add and receives what reaches them.

    It begins with `begin` (HAS_FIRST) or zeros and leaves what follows the last chunk in `end`, both [b, np, size]. Backward
    goes from the last chunk to the first, and writes the products of `entering`, the states before each chunk, with the
    gradient that the chunk hands on to them: crossing [b, c, np, programs].
    """
    pair = tl.program_id(0)
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < size
    decay += pair.to(tl.int64) * length
    edge = pair.to(tl.int64) * size + cols
    state = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_FIRST:
        state = tl.load(begin + edge, mask=inside, other=0.0).to(tl.float32)
    for step in range(chunks):
        c = step
        if BACKWARD:
            c = chunks - 1 - step
        kept = tl.exp(tl.load(decay + tl.minimum((c + 1) * chunk, length) - 1))
        index = (b * chunks + c) * heads + h
        added = tl.load(states + index * size + cols, mask=inside, other=0.0)
        if BACKWARD:
            before = tl.load(entering + index * size + cols, mask=inside, other=0.0)
            common = tl.sum(state * before, 0) * kept
            tl.store(crossing + index * tl.num_programs(1) + tl.program_id(1), common)
        tl.store(states + index * size + cols, state, mask=inside)
        state = kept * state + added
    tl.store(end + edge, state, mask=inside)


@triton.jit
def remains(rows, cols, size, since, until, BACKWARD: tl.constexpr):
    """[rows, cols]: what is left at the later of two positions of what was written at the earlier one; 0 the other way.

    Rows are the later ones, backward the earlier ones.
    """
    if BACKWARD:
        seen = (cols[None, :] >= rows[:, None]) & (cols[None, :] < size)
        between = until[None, :] - since[:, None]
    else:
        seen = (cols[None, :] <= rows[:, None]) & (rows[:, None] < size)
        between = since[:, None] - until[None, :]
    return tl.exp(tl.where(seen, between, float("-inf")))


@triton.jit
def chunk_products(
    own, other, value, x, states, steps, decay, out, step_grad, length, chunk, chunks, heads, share,
    o_b, o_s, o_g, r_b, r_s, r_g, v_b, v_s, v_h, x_b, x_s, x_h,
    BACKWARD: tl.constexpr, WIDTH: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of y, or of the gradient of x: both are a product with a state and a masked one within the chunk.

    Forward y_i = exp(decay_i) S C_i + sum over j of (C_i B_j) exp(decay_i - decay_j) dt_j x_j, with own C, other B,
    value x. Backward u_j = exp(decay_end - decay_j) G B_j + sum over i of the same weights times the gradient of y_i,
    with own B, other C, value that gradient and G that of the state behind the chunk; the gradient of x_j is dt_j u_j,
    that of dt_j beside decays is x_j u_j.
    """
    pair = tl.program_id(0)
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    c = tl.program_id(2)
    first = c.to(tl.int64) * chunk
    size = tl.minimum(chunk, length - c * chunk)
    begin = tl.program_id(1) * BM
    rows = begin + tl.arange(0, BM)
    channel = tl.arange(0, WIDE)
    number = tl.arange(0, DEEP)
    valid = rows < size
    steps += pair.to(tl.int64) * length + first
    decay += pair.to(tl.int64) * length + first
    own += b * o_b + h // share * o_g + first * o_s
    other += b * r_b + h // share * r_g + first * r_s
    value += b * v_b + h * v_h + first * v_s
    states += ((b * chunks + c) * heads + h) * (WIDTH * STATE)
    since = tl.load(decay + rows, mask=valid, other=0.0)
    mine = rows_of(own, rows, o_s, number, valid, STATE, DEEP, OPERAND)
    state = rows_of(states, channel, STATE, number, channel < WIDTH, STATE, DEEP, OPERAND)
    if BACKWARD:
        weight = tl.exp(tl.where(valid, tl.load(decay + size - 1) - since, 0.0))
        low, high = begin // BN * BN, size
    else:
        weight = tl.exp(since)
        low, high = 0, tl.minimum(begin + BM, size)
    acc = tl.dot(mine, tl.trans(state), input_precision=PRECISION) * weight[:, None]
    for start in range(low, high, BN):
        cols = start + tl.arange(0, BN)
        there = cols < size
        theirs = rows_of(other, cols, r_s, number, there, STATE, DEEP, OPERAND)
        values = rows_of(value, cols, v_s, channel, there, WIDTH, WIDE, OPERAND)
        until = tl.load(decay + cols, mask=there, other=0.0)
        score = tl.dot(mine, tl.trans(theirs), input_precision=PRECISION)
        score *= remains(rows, cols, size, since, until, BACKWARD)
        if not BACKWARD:
            score *= tl.load(steps + cols, mask=there, other=0.0)[None, :]
        acc = tl.dot(score.to(OPERAND), values, acc, input_precision=PRECISION)
    tile = valid[:, None] & (channel < WIDTH)[None, :]
    if BACKWARD:
        x += b * x_b + h * x_h + first * x_s
        entered = rows_of(x, rows, x_s, channel, valid, WIDTH, WIDE, tl.float32)
        tl.store(step_grad + pair.to(tl.int64) * length + first + rows, tl.sum(entered * acc, 1), mask=valid)
        acc *= tl.load(steps + rows, mask=valid, other=0.0)[:, None]
    out += ((b * length + first) * heads + h) * WIDTH
    place = rows[:, None] * (heads * WIDTH) + channel[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=tile)


@triton.jit
def shared_grads(
    own, other, factor, shared, states, steps, decay, out, within, beyond, length, chunk, chunks, heads, groups, share,
    parts, o_b, o_s, o_h, r_b, r_s, r_h, f_b, f_s, f_g, m_b, m_s, m_g,
    OF_B: tl.constexpr, WIDTH: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of the gradient of C, or of B, summed over heads of a group that are divided into `parts`.

    Of C: the sum over heads of exp(decay_i) S^T g_i, and that over heads and j of W_ij B_j with
    W_ij = (g_i x_j) exp(decay_i - decay_j) dt_j, where g is the gradient of y; own g, other x, factor B, shared C. Of B: of
    exp(decay_end - decay_j) dt_j G^T x_j, and of W_ij C_i; own x, other g, factor C, shared B. The heads' W are summed up
    before they are multiplied. `beyond` and `within` [b, np, s] receive each head's share in the product of this gradient
    with `shared`: the gradients of decays. W of a position with itself passes no decay and is left out of `within`, where
    it would only be subtracted again.
    """
    index = tl.program_id(0)
    part, group, b = index % parts, index // parts % groups, (index // (parts * groups)).to(tl.int64)
    c = tl.program_id(2)
    first = c.to(tl.int64) * chunk
    size = tl.minimum(chunk, length - c * chunk)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BN)
    channel = tl.arange(0, WIDE)
    number = tl.arange(0, DEEP)
    valid = rows < size
    there = cols < size
    mine = rows_of(
        shared + (b * m_b + group * m_g + first * m_s), rows, m_s, number, valid, STATE, DEEP, OPERAND
    )
    factors = rows_of(
        factor + (b * f_b + group * f_g + first * f_s), cols, f_s, number, there, STATE, DEEP, OPERAND
    )
    score = tl.dot(mine, tl.trans(factors), input_precision=PRECISION)
    score = tl.where(rows[:, None] == cols[None, :], 0.0, score)
    weights = tl.zeros([BM, BN], dtype=tl.float32)
    members = share // parts
    head = (group * share + part * members).to(tl.int64)
    for member in range(members):
        h = head + member
        line = (b * heads + h) * length + first
        since = tl.load(decay + line + rows, mask=valid, other=0.0)
        until = tl.load(decay + line + cols, mask=there, other=0.0)
        source = own + (b * o_b + h * o_h + first * o_s)
        values = rows_of(source, rows, o_s, channel, valid, WIDTH, WIDE, OPERAND)
        source = other + (b * r_b + h * r_h + first * r_s)
        theirs = rows_of(source, cols, r_s, channel, there, WIDTH, WIDE, OPERAND)
        weight = tl.dot(values, tl.trans(theirs), input_precision=PRECISION)
        weight *= remains(rows, cols, size, since, until, OF_B)
        if OF_B:
            weight *= tl.load(steps + line + rows, mask=valid, other=0.0)[:, None]
        else:
            weight *= tl.load(steps + line + cols, mask=there, other=0.0)[None, :]
        tl.store(within + line + rows, tl.sum(weight * score, 1), mask=valid)
        weights += weight
    total = tl.dot(weights.to(OPERAND), factors, input_precision=PRECISION)
    # a loop of its own: both at once would not fit the registers
    for member in range(members):
        h = head + member
        line = (b * heads + h) * length + first
        since = tl.load(decay + line + rows, mask=valid, other=0.0)
        if OF_B:
            reach = tl.exp(tl.where(valid, tl.load(decay + line + size - 1) - since, 0.0))
            reach *= tl.load(steps + line + rows, mask=valid, other=0.0)
        else:
            reach = tl.exp(since)
        source = own + (b * o_b + h * o_h + first * o_s)
        values = rows_of(source, rows, o_s, channel, valid, WIDTH, WIDE, OPERAND)
        source = states + ((b * chunks + c) * heads + h) * (WIDTH * STATE)
        state = rows_of(source, channel, STATE, number, channel < WIDTH, STATE, DEEP, OPERAND)
        acc = tl.dot(values, state, input_precision=PRECISION) * reach[:, None]
        tl.store(beyond + line + rows, tl.sum(acc * mine.to(tl.float32), 1), mask=valid)
        total += acc
    out += ((b * length + first) * groups + group) * parts * STATE + part * STATE
    place = rows[:, None] * (groups * parts * STATE) + number[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=valid[:, None] & (number < STATE)[None, :])


@triton.jit
def decay_grads(
    reads, reads_before, writes, writes_beyond, crossing, step_grad, steps, rates, dt_grad, rate_grad,
    length, chunk, heads, programs, HEADS: tl.constexpr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The sum of all that passes a position's decay -> the gradient of dt [b, s, np] and, per chunk, of A [b, c, np].

    The decay at k lies between every i >= k and j < k. Within the chunk that is what i reads less what j >= k writes for
    them; besides what i reads of states before the chunk, what j < k writes for those behind it, and what crosses it.
    """
    b = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    local = tl.arange(0, BLOCK)
    place = c.to(tl.int64) * chunk + local
    known = head < heads
    inside = ((local < chunk) & (place < length))[None, :] & known[:, None]
    line = (b * heads + head[:, None]) * length + place[None, :]
    later = tl.load(reads + line, mask=inside, other=0.0) - tl.load(writes + line, mask=inside, other=0.0)
    later += tl.load(reads_before + line, mask=inside, other=0.0)
    earlier = tl.load(writes_beyond + line - 1, mask=inside & (local > 0)[None, :], other=0.0)
    index = (b * tl.num_programs(0) + c) * heads + head
    program = tl.arange(0, PROGRAMS)
    through = tl.load(
        crossing + index[:, None] * programs + program[None, :],
        mask=known[:, None] & (program < programs)[None, :],
        other=0.0,
    )
    passing = tl.cumsum(later, 1, reverse=True) + tl.cumsum(earlier, 1) + tl.sum(through, 1)[:, None]
    # zero behind the chunk's end, where `passing` is not
    step = tl.load(steps + line, mask=inside, other=0.0)
    rate = tl.load(rates + head, mask=known, other=0.0).to(tl.float32)
    grad = tl.load(step_grad + line, mask=inside, other=0.0) + passing * rate[:, None]
    target = (b * length + place[None, :]) * heads + head[:, None]
    tl.store(dt_grad + target, grad.to(dt_grad.dtype.element_ty), mask=inside)
    tl.store(rate_grad + index, tl.sum(passing * step, 1), mask=known)
