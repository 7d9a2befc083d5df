"""The mathematics of one row of logits as Triton device functions, each defined once and shared by every kernel.

    z = softcap·tanh(scale·x/softcap) / T        the policy's logits
    M = max z,  S = sum exp(z - M),  E = sum exp(z - M)·(z - M)
    log p_v = z_v - M - log S,      H = log S - E / S

Accumulators are fp32 (fp64 for fp64 logits). A row is walked in tiles of (TILE, LANES / NEAR, NEAR) columns: a thread
reduces its NEAR neighbours, which it loads at once, and TILE of such groups, and keeps its own (M, S, E) until the row
ends, so the walk needs no barrier. The order of every sum depends on V and the tile only, never on the other rows.
"""

import triton
import triton.language as tl

# exp and 2 to the power of -2000 are 0 in fp32 and fp64. Distances from the maximum stop there: no 0·(-inf).
FLOOR = tl.constexpr(-2000.0)
# The running maximum starts at the lowest finite fp32 rather than -inf: its differences are never inf - inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)


LOG2E = tl.constexpr(1.4426950408889634)
# The interpreter runs no machine instructions.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def floored(x):
    """max(x, FLOOR) that keeps NaN."""
    return tl.maximum(x, FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def fast_exp2(x):
    """2^x in one instruction for fp32, whose results below 2^-126 are 0; tl.exp2 takes four to keep them."""
    if INTERPRETED or x.dtype != tl.float32:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def fast_exp(x):
    """e^x; for fp32 as fast_exp2."""
    if INTERPRETED or x.dtype != tl.float32:
        return tl.exp(x)
    return fast_exp2(x * LOG2E)


@triton.jit
def reciprocal(x):
    """1/x, to within one ulp in fp32; of what is below 2^-126 or above 2^126, inf or 0."""
    if INTERPRETED or x.dtype != tl.float32:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def times(a, x):
    """a·x with 0·inf = 0, the convention of `objective.py`; NaN stays NaN."""
    return tl.where((a == 0.0) & (tl.abs(x) == float("inf")), 0.0, a * x)


@triton.jit
def row_pointer(base, row, tokens, stride_batch, stride_token, VEC: tl.constexpr):
    """Address of row `row` of a (B, tokens, V) tensor with any row strides, in 64-bit arithmetic."""
    pointer = base + (row // tokens * stride_batch + row % tokens * stride_token)
    if VEC > 1:  # the launcher checked that every row starts on 16 bytes
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def tempered(inner, outer, temperatures_ptr, row, DTYPE: tl.constexpr, SOFTCAP: tl.constexpr):
    """(inner, outer) of a row in the compute dtype; its own temperature comes last: it divides z."""
    inner = tl.full((), inner, DTYPE)
    outer = tl.full((), outer, DTYPE)
    if temperatures_ptr is not None:
        if SOFTCAP:
            outer = outer / tl.load(temperatures_ptr + row)
        else:
            inner = inner / tl.load(temperatures_ptr + row)
    return inner, outer


@triton.jit
def policy_logits(x, inner, outer, SOFTCAP: tl.constexpr):
    """z and dz/dx. Without a cap z = inner·x; with one z = outer·tanh(inner·x)."""
    if SOFTCAP:  # tanh(y) = 1 - 2r and its derivative 4(r - r²), r = 1 / (1 + e^2y)
        r = reciprocal(1.0 + fast_exp(x * (2.0 * inner)))
        z = outer - (2.0 * outer) * r
        slope = (4.0 * inner * outer) * (r - r * r)
    else:
        z = x * inner
        slope = inner
    return z, slope


@triton.jit
def within(x, SUM: tl.constexpr):
    """Sum or maximum of a (TILE, GROUPS, NEAR) tile for each group: of what one thread holds."""
    if SUM:
        return tl.sum(tl.sum(x, axis=2), axis=0)
    return tl.max(tl.max(x, axis=2), axis=0)


@triton.jit
def add_tile(z, m, s, e):
    """The running M, S and E of every group with a tile's logits."""
    m_new = tl.maximum(m, within(z, False))
    d = floored(z - m_new[None, :, None])
    p = fast_exp(d)
    shift = floored(m - m_new)
    decay = fast_exp(shift)
    e = decay * (e + shift * s) + within(p * d, True)
    return m_new, decay * s + within(p, True), e


@triton.jit
def row_statistics(
    row_ptr,
    V,
    inner,
    outer,
    DTYPE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
    NEAR: tl.constexpr,
):
    """M, S and E of one row of V columns; V = 0 reads nothing."""
    GROUPS: tl.constexpr = LANES // NEAR
    tile = tl.arange(0, TILE)[:, None, None] * LANES + tl.arange(0, GROUPS)[None, :, None] * NEAR
    tile += tl.arange(0, NEAR)[None, None, :]
    m = tl.full((GROUPS,), LOWEST, DTYPE)
    s = tl.zeros((GROUPS,), DTYPE)
    e = tl.zeros((GROUPS,), DTYPE)
    full = V // (TILE * LANES) * (TILE * LANES)
    for start in range(0, full, TILE * LANES):
        x = tl.load(row_ptr + start + tile).to(DTYPE)
        z, _ = policy_logits(x, inner, outer, SOFTCAP)
        m, s, e = add_tile(z, m, s, e)
    for start in range(full, V, TILE * LANES):  # what fills no whole tile
        column = start + tile
        x = tl.load(row_ptr + column, mask=column < V, other=0.0).to(DTYPE)
        z, _ = policy_logits(x, inner, outer, SOFTCAP)
        m, s, e = add_tile(tl.where(column < V, z, float("-inf")), m, s, e)
    row_max = tl.max(m, axis=0)
    shift = floored(m - row_max)
    decay = fast_exp(shift)
    return row_max, tl.sum(decay * s, axis=0), tl.sum(decay * (e + shift * s), axis=0)


@triton.jit
def target_log_prob(row_ptr, target, V, inner, outer, row_max, log_sum, DTYPE: tl.constexpr, SOFTCAP: tl.constexpr):
    """log p of the target column, NaN if it lies outside [0, V)."""
    valid = (target >= 0) & (target < V)
    x = tl.load(row_ptr + tl.where(valid, target, 0), mask=valid, other=0.0).to(DTYPE)
    z, _ = policy_logits(x, inner, outer, SOFTCAP)
    return tl.where(valid, z - row_max - log_sum, float("nan"))


@triton.jit
def grad_factors(row_max, log_sum, entropy, grad_logp, grad_entropy, inner, SOFTCAP: tl.constexpr):
    """(scale, shift, a, b) of `grad_logits`."""
    weight = -tl.exp(-log_sum)
    # Beyond 1e38 the products could overflow; there logits differ by so much that a part of it is as good.
    scale = tl.full((), LOG2E, row_max.dtype)
    scale = tl.where(tl.abs(row_max) < 1e38, scale, scale / 1024)
    shift = row_max * scale
    if not SOFTCAP:
        weight = weight * inner
        scale = scale * inner
    return scale, shift, weight * (grad_logp + grad_entropy * (entropy - log_sum)), weight * (grad_entropy / LOG2E)


@triton.jit
def grad_logits(x, inner, outer, scale, shift, a, b, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr):
    """dloss/dx without the target's +g_l: 2^d·(a + b·d), d = (z - M)/ln 2, times the slope of a softcap.

    `a` and `b` hold 1/S and, uncapped, the slope.
    """
    if SOFTCAP:
        x, slope = policy_logits(x, inner, outer, SOFTCAP)
    d = x * scale - shift
    if ENTROPY:
        d = floored(d)
        grad = fast_exp2(d) * (a + b * d)
    else:
        grad = fast_exp2(d) * a
    if SOFTCAP:
        grad = grad * slope
    return grad


@triton.jit
def grad_at_target(x, inner, outer, row_max, log_sum, entropy, grad_logp, grad_entropy, SOFTCAP: tl.constexpr):
    """(g_l·(1 - p) - g_H·p·(log p + H))·dz/dx."""
    z, slope = policy_logits(x, inner, outer, SOFTCAP)
    log_p = floored(z - row_max - log_sum)
    return slope * (grad_logp - tl.exp(log_p) * (grad_logp + grad_entropy * (log_p + entropy)))


@triton.jit
def write_gradient(
    row_ptr,  # logits of one row
    grad_ptr,  # its gradient; may be row_ptr
    target,
    V,
    inner,
    outer,
    row_max,
    log_sum,
    entropy,
    grad_logp,
    grad_entropy,
    wanted,  # whether the row has a gradient; else it is not read, and zeros are written
    DTYPE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dloss/dx of one row, from its end, which is still in L2, back to its start."""
    out_type: tl.constexpr = grad_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK)
    full = V // BLOCK * BLOCK
    rest = full + column < V
    if wanted:
        scale, shift, a, b = grad_factors(row_max, log_sum, entropy, grad_logp, grad_entropy, inner, SOFTCAP)
        in_vocab = (target >= 0) & (target < V)
        x_target = tl.load(row_ptr + tl.where(in_vocab, target, 0), mask=in_vocab, other=0.0).to(DTYPE)
        tl.debug_barrier()  # in place, it is read before its block is stored
        x = tl.load(row_ptr + full + column, mask=rest, other=0.0).to(DTYPE)
        grad = grad_logits(x, inner, outer, scale, shift, a, b, ENTROPY, SOFTCAP)
        tl.store(grad_ptr + full + column, grad.to(out_type), mask=rest)
        for back in range(BLOCK, full + BLOCK, BLOCK):
            x = tl.load(row_ptr + (full - back) + column).to(DTYPE)
            grad = grad_logits(x, inner, outer, scale, shift, a, b, ENTROPY, SOFTCAP)
            tl.store(grad_ptr + (full - back) + column, grad.to(out_type))
        tl.debug_barrier()  # the target's own value replaces what its block stored
        at_target = grad_at_target(x_target, inner, outer, row_max, log_sum, entropy, grad_logp, grad_entropy, SOFTCAP)
        tl.store(grad_ptr + tl.where(in_vocab, target, 0), at_target.to(out_type), mask=in_vocab)
    else:
        zeros = tl.zeros((BLOCK,), out_type)
        for start in range(0, full, BLOCK):
            tl.store(grad_ptr + start + column, zeros)
        tl.store(grad_ptr + full + column, zeros, mask=rest)


@triton.jit
def surrogate_slope(w, advantage, clip_low, clip_high, delta, dual_clip):
    """d/dw of min(min(w, delta)·A, clip(w)·A), floored for A < 0 at dual_clip·A; a tie takes half of each side."""
    bounded = times(advantage, tl.minimum(w, delta))
    clipped = advantage * tl.minimum(tl.maximum(w, clip_low), clip_high)
    bounded_slope = tl.where(w <= delta, advantage, 0.0)
    clipped_slope = tl.where((w >= clip_low) & (w <= clip_high), advantage, 0.0)
    tie = 0.5 * (bounded_slope + clipped_slope)
    slope = tl.where(bounded < clipped, bounded_slope, tl.where(bounded > clipped, clipped_slope, tie))
    floor = dual_clip * advantage
    surrogate = tl.minimum(bounded, clipped)
    kept = tl.where(surrogate > floor, 1.0, tl.where(surrogate < floor, 0.0, 0.5))
    return tl.where(advantage < 0.0, kept * slope, slope)


@triton.jit
def sapo_slope(w, advantage, temperature_pos, temperature_neg):
    """d/dw of (4/t)·sigmoid(t·(w - 1))·A."""
    t = tl.where(advantage > 0.0, temperature_pos, temperature_neg)
    gate = 1.0 / (1.0 + tl.exp(-t * (w - 1.0)))
    return 4.0 * (1.0 - gate) * gate * advantage


@triton.jit
def dppo_leaves(logp, old, advantage, low, high, TERM: tl.constexpr):
    """Whether the token's probability has moved too far the way its advantage pushes it."""
    p = tl.exp(logp)
    mu = tl.exp(old)
    if TERM == "dppo_tv":
        up = p - mu > high
        down = p - mu < low
    else:
        rest = tl.maximum(1.0 - mu, 0.0)
        kl = mu * (old - logp) + rest * tl.log((rest + 1e-8) / (tl.maximum(1.0 - p, 0.0) + 1e-8))
        up = (p > mu) & (kl > high)
        down = (p < mu) & (kl > -low)
    return ((advantage > 0.0) & up) | ((advantage < 0.0) & down)


@triton.jit
def policy_slopes(
    logp,
    old,
    w,
    advantage,
    clip_low,
    clip_high,
    delta,
    dual_clip,
    sapo_temperature_pos,
    sapo_temperature_neg,
    TERM: tl.constexpr,
):
    """dL/dw, the part of the slope that goes through the ratio, and the part of dL/dlogp that does not."""
    through_w = tl.zeros_like(w)
    direct = tl.zeros_like(w)
    if TERM == "clipped" or TERM == "clip_cov":
        through_w = -surrogate_slope(w, advantage, clip_low, clip_high, delta, dual_clip)
    elif TERM == "cispo":
        direct = -tl.minimum(tl.maximum(w, clip_low), clip_high) * advantage
    elif TERM == "sapo":
        through_w = -sapo_slope(w, advantage, sapo_temperature_pos, sapo_temperature_neg)
    elif TERM == "dppo_tv" or TERM == "dppo_kl":
        leaves = dppo_leaves(logp, old, advantage, clip_low, clip_high, TERM)
        direct = tl.where(leaves, 0.0, -times(advantage, tl.minimum(w, delta)))
    elif TERM == "topr":
        direct = -tl.where(advantage > 0.0, 1.0, tl.minimum(w, 1.0)) * advantage
    elif TERM == "dro":  # its squared log-ratio: token_coefficient
        direct = -advantage
    elif TERM == "kl_cov":  # its penalty: triton_objective_terms.py
        through_w = -advantage
    elif TERM == "vespo" or TERM == "gmpo":  # through the whole sequence: triton_objective_terms.py
        pass
    else:
        tl.static_assert(False, "triton_math.policy_slopes does not know this policy term of losses.py")
    return through_w, direct


@triton.jit
def sampler_correction(log_ratio, low, high, MASK: tl.constexpr):
    """Ratio old / sampler of one token, truncated to [low, high], or zeroed outside it; 1 where unknown (NaN).

    Finite, as in `objective.py`.
    """
    LARGEST: tl.constexpr = 3.4028234663852886e38 if log_ratio.dtype == tl.float32 else 1.7976931348623157e308
    ratio = tl.minimum(tl.exp(tl.where(log_ratio != log_ratio, 0.0, log_ratio)), LARGEST)
    inside = (ratio >= low) & (ratio <= high)
    truncated = tl.minimum(tl.maximum(ratio, low), high)
    return tl.where(inside, ratio, 0.0 if MASK else truncated)


@triton.jit
def kl_and_slope(x, KL: tl.constexpr):
    """KL estimate k1, k2 or k3 of x = reference - logp, and its derivative in logp."""
    if KL == 1:
        kl = -x
        slope = tl.zeros_like(x) + 1.0  # of an infinite x too
    elif KL == 2:
        kl = 0.5 * x * x
        slope = -x
    else:
        tl.static_assert(KL == 3, "triton_math.kl_and_slope does not know this estimator")
        kl = tl.exp(x) - x - 1.0
        slope = 1.0 - tl.exp(x)
    return kl, slope
