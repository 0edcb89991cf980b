"""The three operations in Triton's language; imported by `pallas_kernels.triton_gpu` alone, and only when used.

Line by line the same algorithm as the Pallas kernels (`forward`, `input_gradient`, `weight_gradient`), whose docstrings
explain it. Sizes are compile-time constants in capitals:

    CHANNELS, HEIGHT, PHASES, LENGTH      the input as rows [CHANNELS * HEIGHT * PHASES, LENGTH]
    OUT, OUT_H, OUT_LENGTH                   the output as rows [OUT * OUT_H, OUT_LENGTH]
    KERNEL_W, STRIDE_H, STRIDE_W, TOP, LEFT, BATCH, SPLIT    see `pallas_kernels.rows.ImageRows.decode`
    R, PADDED_R, COLS                     rows of a group, the power of two above, columns of a block
    NUM_GROUPS, NUM_BLOCKS, NUM_ENTRIES   of the layer; NUM_ENTRIES = NUM_BLOCKS * COLS panel columns
    WHOLE_BATCH                           the padded batch of the arrays, of which BATCH examples are computed

Whatever index comes from memory is clamped: a wrong one gives a wrong number, never foreign memory.
"""

import triton
import triton.language as tl


@triton.jit
def _clamped(index, LENGTH: tl.constexpr):
    """An index of any integer dtype as int32 within 0 and LENGTH - 1."""
    return tl.minimum(tl.maximum(index.to(tl.int32), 0), LENGTH - 1)


@triton.jit
def _outer(positions, part, BATCH: tl.constexpr, WHOLE_BATCH: tl.constexpr):
    """Positions of a row of a part of the batch -> of the row of the whole batch; see `rows.outer_positions`."""
    if BATCH == WHOLE_BATCH:
        return positions
    return (positions // BATCH) * WHOLE_BATCH + tl.load(part) * 8 + positions % BATCH


@triton.jit
def _decode(column, CHANNELS: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_W: tl.constexpr, PHASES: tl.constexpr,
            TOP: tl.constexpr, LEFT: tl.constexpr, BATCH: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """Column j of the matrix -> channel and phase, row offset, shift within the row."""
    tap = column // CHANNELS
    channel = column - tap * CHANNELS
    kernel_row = tap // KERNEL_W
    kernel_col = tap - kernel_row * KERNEL_W
    if SPLIT:
        source = channel * PHASES + kernel_col % STRIDE_W
        shift = (kernel_col // STRIDE_W) * BATCH
    else:
        source = channel
        shift = (kernel_col - LEFT) * BATCH
    return source, kernel_row - TOP, shift


@triton.jit
def _inputs(x, in_idx, k, end, row, positions, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, PHASES: tl.constexpr,
            LENGTH: tl.constexpr, OUT_LENGTH: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
            STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
            BATCH: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """The inputs of panel columns `k` at positions of output row `row`: [k, positions]."""
    inside = k < end
    column = _clamped(tl.load(in_idx + k, mask=inside, other=0), KERNEL_H * KERNEL_W * CHANNELS)
    source, down, shift = _decode(column, CHANNELS, KERNEL_W, STRIDE_W, PHASES, TOP, LEFT, BATCH, SPLIT)
    height = row * STRIDE_H + down
    inside = inside & (height >= 0) & (height < HEIGHT)
    at = positions[None, :] + shift[:, None]
    mask = inside[:, None] & (positions < OUT_LENGTH)[None, :] & (at >= 0) & (at < LENGTH)
    rows = ((source // PHASES) * HEIGHT + height) * PHASES + source % PHASES
    return tl.load(x + rows[:, None] * LENGTH + at, mask=mask, other=0.0)


@triton.jit
def forward(start, out_idx, in_idx, entries, x, bias, y, NUM_GROUPS: tl.constexpr, NUM_BLOCKS: tl.constexpr,
            R: tl.constexpr, PADDED_R: tl.constexpr, COLS: tl.constexpr, OUT: tl.constexpr, OUT_H: tl.constexpr,
            OUT_LENGTH: tl.constexpr, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, PHASES: tl.constexpr,
            LENGTH: tl.constexpr, KERNEL_H: tl.constexpr,
            KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, TOP: tl.constexpr,
            LEFT: tl.constexpr, BATCH: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
            POSITIONS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """One row group, a tile of positions of one output row. Where `bias` is None, nothing of it is compiled."""
    program = tl.program_id(0)
    group = program % NUM_GROUPS
    tile = program // NUM_GROUPS
    PER_ROW: tl.constexpr = (OUT_LENGTH + POSITIONS - 1) // POSITIONS
    row = tile // PER_ROW
    positions = (tile % PER_ROW) * POSITIONS + tl.arange(0, POSITIONS)
    r = tl.arange(0, PADDED_R)
    end = _clamped(tl.load(start + group + 1), NUM_BLOCKS + 1) * COLS
    acc = tl.zeros((PADDED_R, POSITIONS), tl.float32)
    for first in range(_clamped(tl.load(start + group), NUM_BLOCKS + 1) * COLS, end, COLUMNS):
        k = first + tl.arange(0, COLUMNS)
        inputs = _inputs(x, in_idx, k, end, row, positions, CHANNELS, HEIGHT, PHASES, LENGTH, OUT_LENGTH, KERNEL_H,
                         KERNEL_W, STRIDE_H, STRIDE_W, TOP, LEFT, BATCH, SPLIT)  # fmt: skip
        weights = tl.load(entries + k[:, None] * R + r[None, :], mask=(k < end)[:, None] & (r < R)[None, :], other=0.0)
        acc = tl.dot(tl.trans(weights), inputs, acc, input_precision=PRECISION)
    target = tl.load(out_idx + group * R + r, mask=r < R, other=OUT)
    is_real = (target >= 0) & (target < OUT)
    if bias is not None:
        acc += tl.load(bias + target, mask=is_real, other=0.0).to(tl.float32)[:, None]
    mask = is_real[:, None] & (positions < OUT_LENGTH)[None, :]
    where = y + (target * OUT_H + row)[:, None] * OUT_LENGTH + positions[None, :]
    tl.store(where, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def scatter(start, out_idx, rank, entries, dy, part, p, NUM_GROUPS: tl.constexpr, NUM_BLOCKS: tl.constexpr,
            R: tl.constexpr, PADDED_R: tl.constexpr, COLS: tl.constexpr, OUT: tl.constexpr, OUT_H: tl.constexpr,
            OUT_LENGTH: tl.constexpr, BATCH: tl.constexpr, WHOLE_BATCH: tl.constexpr, WHOLE_LENGTH: tl.constexpr,
            PRECISION: tl.constexpr, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """P[rank of k, :] = entries[k, :] @ dY[rows of the group, :] for one group and a tile of positions."""
    program = tl.program_id(0)
    group = program % NUM_GROUPS
    tile = program // NUM_GROUPS
    PER_ROW: tl.constexpr = (OUT_LENGTH + POSITIONS - 1) // POSITIONS
    row = tile // PER_ROW
    positions = (tile % PER_ROW) * POSITIONS + tl.arange(0, POSITIONS)
    r = tl.arange(0, PADDED_R)
    source = tl.load(out_idx + group * R + r, mask=r < R, other=OUT)
    inside = positions < OUT_LENGTH
    where = dy + (source * OUT_H + row)[:, None] * WHOLE_LENGTH + _outer(positions, part, BATCH, WHOLE_BATCH)[None, :]
    d_rows = tl.load(where, mask=((source >= 0) & (source < OUT))[:, None] & inside[None, :], other=0.0)
    end = _clamped(tl.load(start + group + 1), NUM_BLOCKS + 1) * COLS
    for first in range(_clamped(tl.load(start + group), NUM_BLOCKS + 1) * COLS, end, COLUMNS):
        k = first + tl.arange(0, COLUMNS)
        weights = tl.load(entries + k[:, None] * R + r[None, :], mask=(k < end)[:, None] & (r < R)[None, :], other=0.0)
        at = _clamped(tl.load(rank + k, mask=k < end, other=0), NUM_BLOCKS * COLS)
        partial = tl.dot(weights, d_rows, input_precision=PRECISION)
        target = p + (at * OUT_H + row)[:, None] * OUT_LENGTH + positions[None, :]
        tl.store(target, partial.to(p.dtype.element_ty), mask=(k < end)[:, None] & inside[None, :])


@triton.jit
def collect(begin, p, part, into, dx, NUM_ENTRIES: tl.constexpr, OUT_H: tl.constexpr, OUT_LENGTH: tl.constexpr,
            CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, PHASES: tl.constexpr, LENGTH: tl.constexpr,
            WHOLE_LENGTH: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr,
            STRIDE_W: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, BATCH: tl.constexpr,
            WHOLE_BATCH: tl.constexpr, SPLIT: tl.constexpr, POSITIONS: tl.constexpr):  # fmt: skip
    """dX of one channel, phase and image row: the sum of P over the panel columns that read it, tap by tap.

    `into` is `dx` itself, whose other parts of the batch stay as they are, or None.
    """
    program = tl.program_id(0)
    PER_ROW: tl.constexpr = (LENGTH + POSITIONS - 1) // POSITIONS
    target = program // (HEIGHT * PER_ROW)
    tile = program % (HEIGHT * PER_ROW)
    row = tile // PER_ROW
    positions = (tile % PER_ROW) * POSITIONS + tl.arange(0, POSITIONS)
    channel = target // PHASES
    phase = target % PHASES
    TAPS_W: tl.constexpr = (KERNEL_W + STRIDE_W - 1) // STRIDE_W if SPLIT else KERNEL_W
    acc = tl.zeros((POSITIONS,), tl.float32)
    for t in range(KERNEL_H * TAPS_W):
        kh = t // TAPS_W
        i = t % TAPS_W
        if SPLIT:
            kw = phase + i * STRIDE_W
            shift = i
        else:
            kw = i
            shift = i - LEFT
        above = row + TOP - kh
        out_row = tl.maximum(above, 0) // STRIDE_H
        inside = (above >= 0) & (above - out_row * STRIDE_H == 0) & (out_row < OUT_H) & (kw < KERNEL_W)
        column = tl.minimum((kh * KERNEL_W + kw) * CHANNELS + channel, KERNEL_H * KERNEL_W * CHANNELS - 1)
        first = _clamped(tl.load(begin + column), NUM_ENTRIES + 1)
        last = tl.where(inside, _clamped(tl.load(begin + column + 1), NUM_ENTRIES + 1), first)
        source = positions - shift * BATCH
        mask = (source >= 0) & (source < OUT_LENGTH)
        for k in range(first, last):
            acc += tl.load(p + (k * OUT_H + out_row) * OUT_LENGTH + source, mask=mask, other=0.0).to(tl.float32)
    where = ((target // PHASES) * HEIGHT + row) * PHASES + target % PHASES
    at = where * WHOLE_LENGTH + _outer(positions, part, BATCH, WHOLE_BATCH)
    tl.store(dx + at, acc.to(dx.dtype.element_ty), mask=positions < LENGTH)


@triton.jit
def weight_gradient(chunks, out_idx, in_idx, x, dy, d, NUM_GROUPS: tl.constexpr, NUM_CHUNKS: tl.constexpr,
                    NUM_SPLITS: tl.constexpr, NUM_ENTRIES: tl.constexpr, R: tl.constexpr, PADDED_R: tl.constexpr,
                    OUT: tl.constexpr, OUT_H: tl.constexpr, OUT_LENGTH: tl.constexpr, CHANNELS: tl.constexpr,
                    HEIGHT: tl.constexpr, PHASES: tl.constexpr, LENGTH: tl.constexpr, KERNEL_H: tl.constexpr,
                    KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, TOP: tl.constexpr,
                    LEFT: tl.constexpr, BATCH: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
                    POSITIONS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """A chunk of panel columns of one group over a part of the positions."""
    program = tl.program_id(0)
    chunk = program % NUM_CHUNKS
    split = program // NUM_CHUNKS
    group = _clamped(tl.load(chunks + 3 * chunk), NUM_GROUPS)
    begin = _clamped(tl.load(chunks + 3 * chunk + 1), NUM_ENTRIES + 1)
    end = _clamped(tl.load(chunks + 3 * chunk + 2), NUM_ENTRIES + 1)
    k = begin + tl.arange(0, COLUMNS)
    r = tl.arange(0, PADDED_R)
    source = tl.load(out_idx + group * R + r, mask=r < R, other=OUT)
    PER_ROW: tl.constexpr = (OUT_LENGTH + POSITIONS - 1) // POSITIONS
    NUM_TILES: tl.constexpr = OUT_H * PER_ROW
    EACH: tl.constexpr = (NUM_TILES + NUM_SPLITS - 1) // NUM_SPLITS
    last = tl.where(end > begin, tl.minimum((split + 1) * EACH, NUM_TILES), 0)
    acc = tl.zeros((COLUMNS, PADDED_R), tl.float32)
    for tile in range(split * EACH, last):
        row = tile // PER_ROW
        positions = (tile % PER_ROW) * POSITIONS + tl.arange(0, POSITIONS)
        inputs = _inputs(x, in_idx, k, end, row, positions, CHANNELS, HEIGHT, PHASES, LENGTH, OUT_LENGTH, KERNEL_H,
                         KERNEL_W, STRIDE_H, STRIDE_W, TOP, LEFT, BATCH, SPLIT)  # fmt: skip
        mask = ((source >= 0) & (source < OUT))[:, None] & (positions < OUT_LENGTH)[None, :]
        where = dy + (source * OUT_H + row)[:, None] * OUT_LENGTH + positions[None, :]
        acc = tl.dot(inputs, tl.trans(tl.load(where, mask=mask, other=0.0)), acc, input_precision=PRECISION)
    target = d + (split * NUM_ENTRIES + k)[:, None] * R + r[None, :]
    tl.store(target, acc, mask=(k < end)[:, None] & (r < R)[None, :])


def autotuned(kernel, key: list[str], columns: tuple[int, ...]):
    """`kernel`, which times its tile sizes on the device at first use of each shape and keeps the best."""
    configs = [
        triton.Config({"POSITIONS": positions, "COLUMNS": width}, num_warps=warps, num_stages=stages)
        for positions in (64, 128, 256)
        for width in columns
        for warps, stages in ((4, 3), (4, 4), (8, 3))
    ]
    return triton.autotune(configs=configs, key=key)(kernel)
