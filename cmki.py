"""Cross-Modal Knowledge Interaction (CMKI) of BrgSA: one learnable knowledge bank, shared by images and texts (arXiv 2501.03565).

    x_hat = softmax(x D^T) D                                          D: bank (K, d), x: embeddings (..., d) of either modality
    loss  = alpha (mse(v_hat, v) + mse(t_hat, t)) + beta InfoNCE(v, t) + gamma InfoNCE(v_hat, t_hat)

The attention is one operator with a Triton kernel pair for CUDA and tiled torch for everything else; neither ever holds the N x K
matrix of probabilities whole. This file needs torch alone. Copy it; these ten lines train a toy:

    import torch, cmki
    torch.manual_seed(0)
    cases = torch.randn(256, 8)                                             # what a scan and its report have in common
    scans, reports = cases @ torch.randn(8, 32) + 1, cases @ torch.randn(8, 32) - 1
    image, text, bank = torch.nn.Linear(32, 16), torch.nn.Linear(32, 16), cmki.KnowledgeBank(64, 16)
    optimiser = torch.optim.Adam([*image.parameters(), *text.parameters(), *bank.parameters()], lr=1e-2)
    for step in range(100):
        v, t = image(scans), text(reports)
        loss, parts = cmki.alignment_loss(v, t, bank(v), bank(t))
        optimiser.zero_grad(); loss.backward(); optimiser.step()

    python -m pytest tests/test_cmki.py                                     python bench.py attention
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch bring none
    triton = None


# ---- 1. Attention over the bank ----------------------------------------------------------------------------------------------------

def reference_attention(x, bank, scale=1.0):
    """What bank_attention computes, in two lines: the tests' and the benchmark's reference."""
    probabilities = torch.softmax(scale * x @ bank.mT, dim=-1)
    return probabilities @ bank


def bank_attention(x, bank, scale=1.0):
    """Re-express x (..., d) from the bank (K, d): softmax(scale x bank^T) bank, of x's shape and dtype (paper, the CMKI module).

    Differentiable any number of times in x and bank (not in scale, a number); the second derivative takes N x K memory, all else memory
    linear in N + K. Under autocast both are cast to its dtype. Raises ValueError on a mismatch of width, dtype or device."""
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x, bank = (a.to(torch.get_autocast_dtype(a.device.type)) for a in (x, bank))
    if (bank.ndim != 2 or x.ndim < 1 or x.shape[-1] != bank.shape[1] or 0 in bank.shape
            or x.dtype != bank.dtype or not x.is_floating_point() or x.device != bank.device):
        raise ValueError("bank_attention takes x (..., d) and a bank (K, d) of one floating dtype on one device, K and d at least 1; got x "
                         f"{tuple(x.shape)} {x.dtype} on {x.device} and a bank {tuple(bank.shape)} {bank.dtype} on {bank.device}")
    grad = torch.is_grad_enabled() and (x.requires_grad or bank.requires_grad)
    return _attend(x.reshape(-1, x.shape[-1]), bank, float(scale), grad)[0].reshape(x.shape)


@torch.library.custom_op("cmki::bank_attention", mutates_args=())
def _attend(x: torch.Tensor, bank: torch.Tensor, scale: float, grad: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (N, d), bank (K, d) -> out (N, d) and, for the backward pass if `grad`, the two tensors that _for_backward describes."""
    return (_triton_forward if _on_triton(x) else _tiled_forward)(x, bank, scale, grad)


@torch.library.custom_op("cmki::bank_attention_backward", mutates_args=())
def _attend_backward(g: torch.Tensor, x: torch.Tensor, bank: torch.Tensor, stats: torch.Tensor, kept: torch.Tensor, scale: float,
                     need_x: bool, need_bank: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and bank from out's gradient g (N, d), tile by tile of rows; an unneeded one is empty.

    dS = P * (dP - rowsum(P * dP)) with dP = g bank^T;  dx = scale dS bank;  dbank = P^T g + scale dS^T x."""
    (N, d), K, tile = x.shape, len(bank), _tile(x, bank)
    scratch_p, scratch_ds = x.new_empty(tile if N > len(kept) or _on_triton(x) else 0, K), x.new_empty(tile, K)
    dx, dbank = x.new_empty(N if need_x else 0, d), (x.new_empty if N else x.new_zeros)(K if need_bank else 0, d)
    # A half-precision sum over many tiles would lose digits: every fourth tile it moves into one of fp32.
    total = torch.zeros_like(dbank, dtype=torch.float32) if x.itemsize < 4 and N > tile else None
    for i, start in enumerate(range(0, N, tile)):
        rows = slice(start, min(start + tile, N))
        x_rows, g_rows, p, ds = x[rows], g[rows], scratch_p[:rows.stop - start], scratch_ds[:rows.stop - start]
        if _on_triton(x):
            _triton_p_and_ds(x_rows, g_rows, bank, stats[rows], (g_rows * kept[rows]).sum(-1), scale, p, ds)
        else:
            known = start < len(kept)
            p = kept[rows] if known else p
            _tiled_p_and_ds(x_rows, g_rows, bank, stats[i].item(), known, scale, p, ds)
        if need_x:
            dx[rows].addmm_(ds, bank, beta=0, alpha=scale)
        if need_bank:
            fresh = start == 0 if total is None else i % 4 == 0
            dbank.addmm_(p.mT, g_rows, beta=float(not fresh)).addmm_(ds.mT, x_rows, alpha=scale)
            if total is not None and (i % 4 == 3 or rows.stop == N):
                for part, new in zip(total.split(128), dbank.split(128)):  # in parts, since adding across dtypes makes a copy
                    part += new
    return dx, dbank if total is None else dbank.copy_(total)


def _for_backward(x, bank, grad):
    """What the forward pass leaves for the backward pass, to be filled: (stats, kept), in torch's sense of empty.

    Triton: the log-sum-exp (N,) of the logits and out (N, d) in fp32, since rowsum(P * dP) = rowsum(g * out): with the digits that half
    precision drops, the gradient of a nearly one-hot row would be rounding alone. Tiled: the largest |logit| of each tile and the first
    rows of P, as many as a fixed number of entries holds (all, for a usual batch), which spares recomputing them."""
    (N, d), K, tile = x.shape, bank.shape[0], _tile(x, bank)
    if _on_triton(x):
        return x.new_empty(N, dtype=torch.float32), x.new_empty(N if grad else 0, d, dtype=torch.float32)
    kept = N if tile >= N else KEPT_ENTRIES[x.itemsize] // K // tile * tile
    return x.new_empty((N + tile - 1) // tile, dtype=torch.float32), x.new_empty(kept if grad else 0, K)


@_attend.register_fake
def _(x, bank, scale, grad):
    return x.new_empty(x.shape), *_for_backward(x, bank, grad)


@_attend_backward.register_fake
def _(g, x, bank, stats, kept, scale, need_x, need_bank):
    return x.new_empty(x.shape[0] if need_x else 0, x.shape[1]), bank.new_empty(bank.shape[0] if need_bank else 0, bank.shape[1])


def _save(ctx, inputs, output):
    x, bank, ctx.scale, _ = inputs
    _, stats, kept = output
    ctx.mark_non_differentiable(stats, kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, bank, stats, kept)


def _derivative(ctx, g, *_):
    x, bank, stats, kept = ctx.saved_tensors
    need_x, need_bank = ctx.needs_input_grad[:2]
    if g is None:
        return None, None, None, None
    if torch.is_grad_enabled():  # create_graph=True: the same formulas in operations that autograd can differentiate again
        p = torch.softmax(ctx.scale * x @ bank.mT, dim=-1)
        dp = g @ bank.mT
        ds = ctx.scale * p * (dp - (p * dp).sum(-1, keepdim=True))
        return ds @ bank, p.mT @ g + ds.mT @ x, None, None
    dx, dbank = _attend_backward(g, x, bank, stats, kept, ctx.scale, need_x, need_bank)
    return dx if need_x else None, dbank if need_bank else None, None, None


_attend.register_autograd(_derivative, setup_context=_save)


# ---- 2. Tiled torch: CPU, other devices, and what the kernels leave ------------------------------------------------------------------

# Entries of P, by bytes per entry: kept for the backward pass, and in one tile (large enough for the matrix product, small enough for the
# cache). Together they stay under a quarter of what eager torch holds at N = 10976, K = 2048.
KEPT_ENTRIES = {2: 11 << 19, 4: 10 << 20, 8: 5 << 20}
TILE_ENTRIES = {2: 1 << 21, 4: 1 << 21, 8: 1 << 20}
# CPU: rounding moves a logit by up to |logit| x the dtype's epsilon, and its probability by that factor. A tile with logits beyond these
# magnitudes, where it would show, is computed in the next wider dtype.
WIDER = {torch.bfloat16: (8, torch.float32), torch.float16: (8, torch.float32), torch.float32: (16, torch.float64)}


def _tile(x, bank):
    """Rows of x per tile: all of them where P is kept whole."""
    N, K = x.shape[0], bank.shape[0]
    if N * K <= KEPT_ENTRIES[x.itemsize]:
        return max(1, N)
    return min(N, max(64, (TILE_ENTRIES[x.itemsize] if x.device.type == "cpu" else 1 << 23) // K))


def _wider(x):
    """(limit, wider dtype) for x."""
    return WIDER.get(x.dtype, (math.inf, None)) if x.device.type == "cpu" else (math.inf, None)


def _softmax(x, bank, scale, out, limit=math.inf):
    """softmax(scale x bank^T) into out (n, K), the largest |logit| returned; beyond limit out is left undone."""
    torch.addmm(out, x, bank.mT, beta=0, alpha=scale, out=out)
    peak = 0.0
    if limit < math.inf:
        low, high = torch.aminmax(out)
        peak = max(-low.item(), high.item())
    if not peak > limit:  # so written, a NaN goes through
        torch.softmax(out, -1, out=out)
    return peak


def _tiled_forward(x, bank, scale, grad):
    (N, _), K, tile, (limit, wider) = x.shape, len(bank), _tile(x, bank), _wider(x)
    out, (stats, kept) = x.new_empty(x.shape), _for_backward(x, bank, grad)
    scratch = x.new_empty(tile if N > len(kept) else 0, K)
    for i, start in enumerate(range(0, N, tile)):
        rows = slice(start, min(start + tile, N))
        p = kept[rows] if start < len(kept) else scratch[:rows.stop - start]
        stats[i] = peak = _softmax(x[rows], bank, scale, p, limit)
        if peak > limit:
            wide = torch.empty_like(p, dtype=wider)
            _softmax(x[rows].to(wider), bank.to(wider), scale, wide)
            p.copy_(wide)
        torch.mm(p, bank, out=out[rows])
    return out, stats, kept


def _tiled_p_and_ds(x, g, bank, peak, known, scale, p, ds):
    """P and dS into p and ds (n, K); a known p holds P already; peak is the largest |logit|."""
    limit, wider = _wider(x)
    if peak > limit:  # P in its own dtype won't do: 1 - p of a nearly one-hot row is lost in it
        wide_p, wide_ds = torch.empty_like(p, dtype=wider), torch.empty_like(ds, dtype=wider)
        _tiled_p_and_ds(x.to(wider), g.to(wider), bank.to(wider), 0, False, scale, wide_p, wide_ds)
        return p.copy_(wide_p), ds.copy_(wide_ds)
    if not known:
        _softmax(x, bank, scale, p)
    torch.mm(g, bank.mT, out=ds)
    torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)


# ---- 3. Triton: CUDA ---------------------------------------------------------------------------------------------------------------
#
# Forward: a program holds BLOCK_N queries (shared memory) and their outputs (registers, fp32) over the whole width d and walks over the
# bank; each tile of BLOCK_K entries is loaded once and serves both products. tl.dot wants powers of two, so d is covered by two pieces,
# LO + HI >= d: 768 = 512 + 256, 1000 -> 512 + 512, 192 = 128 + 64. Budget of an H100 multiprocessor (227 KiB shared, 256 KiB of registers) at
# d 768 in bf16: 64 queries 96 KiB + 2 stages of 32 entries x 48 KiB = 192 KiB shared; outputs 64 x 768 x 4 = 192 KiB of registers over 8 warps.
# Few queries: the bank is split over programs as well and the partial results are merged by their log-sum-exp.
#
# Backward: holding dx and dbank beside each other would need more registers than there are, and adding either up in memory needs atomics.
# So one kernel, shaped like a matrix product, recomputes P from the log-sum-exp and turns dP into dS for a tile of rows (four products in
# two), and the three remaining products are plain matrix products, at the vendor's speed and with a result that repeats bit for bit.

def _device_limits(device):
    """(multiprocessors, bytes of shared memory that one program can have) of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 48 << 10)


def _pieces(d):
    """The two powers of two (the second may be 0) that cover width d, from 16 up, as tl.dot wants."""
    lo = max(16, 1 << d.bit_length() - 1)
    return lo, 0 if lo >= d else max(16, 1 << (d - lo - 1).bit_length())


def _forward_blocks(x):
    """(BLOCK_N, BLOCK_K, stages) of the forward kernel: the first that fits the shared memory and 200 KiB of registers; None if none does,
    nor for wide fp32, whose TF32 pieces would spill the registers: cuBLAS by tiles serves it better."""
    width, shared = sum(_pieces(int(x.shape[1]))), _device_limits(x.device)[1]
    if x.dtype == torch.float32 and width > 256:
        return None
    for block_n, block_k, stages in ((128, 64, 2), (64, 64, 2), (64, 32, 2), (32, 16, 2), (16, 16, 2))[3 * (x.itemsize == 4):]:
        if (block_n + stages * block_k) * width * x.itemsize + 4096 <= shared and block_n * width * 4 <= 200 << 10:
            return block_n, block_k, stages


def _on_triton(x):
    return (triton is not None and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32) and x.shape[1] <= 1024
            and _forward_blocks(x) is not None)


def _precision():
    """How tl.dot multiplies fp32: three TF32 products keep its digits on NVIDIA's tensor cores."""
    return "ieee" if torch.version.hip else "tf32x3"


def _triton_forward(x, bank, scale, grad):
    x, bank, (N, d), K = x.contiguous(), bank.contiguous(), x.shape, len(bank)
    out, (stats, kept) = x.new_empty(x.shape), _for_backward(x, bank, grad)
    (block_n, block_k, stages), (lo, hi) = _forward_blocks(x), _pieces(d)
    programs, blocks = triton.cdiv(N, block_n), triton.cdiv(K, block_k)
    if N == 0:
        return out, stats, kept
    per_split = triton.cdiv(blocks, max(1, min(blocks, _device_limits(x.device)[0] // programs)))
    splits = triton.cdiv(blocks, per_split)
    part = kept if splits == 1 else x.new_empty(splits, N, d, dtype=torch.float32)
    part_lse = stats if splits == 1 else x.new_empty(splits, N, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _forward_kernel[programs, splits](x, bank, out, part, part_lse, N, K, d, scale, per_split * block_k, lo, hi, block_n, block_k,
                                          splits == 1, splits > 1 or grad, _precision(), num_warps=8, num_stages=stages)
    if splits > 1:
        torch.logsumexp(part_lse, 0, out=stats)
        merged = (part * torch.softmax(part_lse, 0)[..., None]).sum(0)
        out.copy_(merged)
        kept.copy_(merged[:len(kept)])
    return out, stats, kept


def _triton_p_and_ds(x, g, bank, lse, delta, scale, p, ds):
    x, g, bank, (n, d), K = x.contiguous(), g.contiguous(), bank.contiguous(), x.shape, len(bank)
    block, block_d = (128, 64) if x.itemsize == 2 else (64, 32)
    stages = 3 if _device_limits(x.device)[1] > 150 << 10 else 1
    with torch.cuda.device_of(x):
        _p_and_ds_kernel[triton.cdiv(n, block), triton.cdiv(K, block)](x, g, bank, lse, delta, p, ds, n, K, d, scale, block, block, block_d,
                                                                       _precision(), num_warps=8, num_stages=stages)


if triton is not None:
    LOG2E = tl.constexpr(math.log2(math.e))

    @triton.jit
    def _forward_kernel(x, bank, out, part, lse, N, K, d, scale, span, LO: tl.constexpr, HI: tl.constexpr, BLOCK_N: tl.constexpr,
                        BLOCK_K: tl.constexpr, STORE_OUT: tl.constexpr, STORE_PART: tl.constexpr, PRECISION: tl.constexpr):
        """Queries [BLOCK_N * program 0, ...) against the bank's entries [span * program 1, ...), by online softmax."""
        rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        first, real = tl.program_id(1) * span, rows[:, None] < N
        lo = tl.arange(0, LO)[None, :]
        x_lo = tl.load(x + rows[:, None] * d + lo, real & (lo < d), 0.0)
        out_lo = tl.zeros((BLOCK_N, LO), tl.float32)
        if HI > 0:
            hi = LO + tl.arange(0, HI)[None, :]
            x_hi = tl.load(x + rows[:, None] * d + hi, real & (hi < d), 0.0)
            out_hi = tl.zeros((BLOCK_N, HI), tl.float32)
        top = tl.full((BLOCK_N,), float("-inf"), tl.float32)  # the largest logit so far, in units of log 2
        mass = tl.zeros((BLOCK_N,), tl.float32)               # the sum of exp2(logit - top) so far
        for start in range(first, tl.minimum(first + span, K), BLOCK_K):
            entries = start + tl.arange(0, BLOCK_K)
            bank_lo = tl.load(bank + entries[:, None] * d + lo, (entries[:, None] < K) & (lo < d), 0.0)
            logits = tl.dot(x_lo, tl.trans(bank_lo), input_precision=PRECISION)
            if HI > 0:
                bank_hi = tl.load(bank + entries[:, None] * d + hi, (entries[:, None] < K) & (hi < d), 0.0)
                logits = tl.dot(x_hi, tl.trans(bank_hi), logits, input_precision=PRECISION)
            logits = tl.where(entries[None, :] < K, logits * (scale * LOG2E), float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, 1))
            shrink = tl.exp2(top - new_top)
            p = tl.exp2(logits - new_top[:, None])
            mass = mass * shrink + tl.sum(p, 1)
            p = p.to(bank_lo.dtype)
            out_lo = tl.dot(p, bank_lo, out_lo * shrink[:, None], input_precision=PRECISION)
            if HI > 0:
                out_hi = tl.dot(p, bank_hi, out_hi * shrink[:, None], input_precision=PRECISION)
            top = new_top
        part += tl.program_id(1).to(tl.int64) * N * d
        tl.store(lse + tl.program_id(1) * N + rows, (top + tl.log2(mass)) / LOG2E, rows < N)
        out_lo /= mass[:, None]
        if STORE_OUT:
            tl.store(out + rows[:, None] * d + lo, out_lo.to(out.dtype.element_ty), real & (lo < d))
        if STORE_PART:
            tl.store(part + rows[:, None] * d + lo, out_lo, real & (lo < d))
        if HI > 0:
            out_hi /= mass[:, None]
            if STORE_OUT:
                tl.store(out + rows[:, None] * d + hi, out_hi.to(out.dtype.element_ty), real & (hi < d))
            if STORE_PART:
                tl.store(part + rows[:, None] * d + hi, out_hi, real & (hi < d))

    @triton.jit
    def _p_and_ds_kernel(x, g, bank, lse, delta, p, ds, n, K, d, scale, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                         BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
        """One (BLOCK_N, BLOCK_K) tile of P = exp(scale x bank^T - lse) and of dS = P * (g bank^T - delta)."""
        rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        entries = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        logits = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        dp = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in range(0, d, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)[None, :]
            row_mask = (rows[:, None] < n) & (columns < d)
            bank_tile = tl.trans(tl.load(bank + entries[:, None] * d + columns, (entries[:, None] < K) & (columns < d), 0.0))
            logits = tl.dot(tl.load(x + rows[:, None] * d + columns, row_mask, 0.0), bank_tile, logits, input_precision=PRECISION)
            dp = tl.dot(tl.load(g + rows[:, None] * d + columns, row_mask, 0.0), bank_tile, dp, input_precision=PRECISION)
        probability = tl.exp2((logits * scale - tl.load(lse + rows, rows < n, 0.0)[:, None]) * LOG2E)
        dp = probability * (dp - tl.load(delta + rows, rows < n, 0.0)[:, None])
        cells, inside = rows[:, None] * K + entries[None, :], (rows[:, None] < n) & (entries[None, :] < K)
        tl.store(p + cells, probability.to(p.dtype.element_ty), inside)
        tl.store(ds + cells, dp.to(ds.dtype.element_ty), inside)


# ---- 4. The knowledge bank ---------------------------------------------------------------------------------------------------------

class KnowledgeBank(nn.Module):
    """The cross-modal knowledge bank D, `.weight` (size, dim); called on x (..., dim) of either modality it returns x_hat (..., dim).

    init: "orthogonal" (the authors'), "gaussian", "xavier", "uniform", or the entries themselves (size, dim), such as
    kmeans(embeddings, size). scale multiplies the logits (the authors' 1). frozen: the entries are not trained."""

    def __init__(self, size=2048, dim=768, init="orthogonal", scale=1.0, frozen=False):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(size, dim), requires_grad=not frozen)
        self.reset(init)

    @torch.no_grad()
    def reset(self, init):
        """Overwrite the entries in place: `init` as for the class. Raises ValueError for another name or shape."""
        if isinstance(init, torch.Tensor):
            if init.shape != self.weight.shape:
                raise ValueError(f"the bank has shape {tuple(self.weight.shape)}, the entries given for it {tuple(init.shape)}")
            self.weight.copy_(init)
        elif init == "orthogonal":
            nn.init.orthogonal_(self.weight)
        elif init == "gaussian":
            nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)  # entries of length about 1, as orthogonal ones have
        elif init == "xavier":
            nn.init.xavier_uniform_(self.weight)
        elif init == "uniform":
            nn.init.uniform_(self.weight, -(3 / self.weight.shape[1]) ** 0.5, (3 / self.weight.shape[1]) ** 0.5)  # length about 1 again
        else:
            raise ValueError(f"init is orthogonal, gaussian, xavier, uniform or a tensor of entries, not {init!r}")

    def forward(self, x):
        return bank_attention(x, self.weight, self.scale)

    def extra_repr(self):
        size, dim = self.weight.shape
        return f"{size}, {dim}, scale={self.scale}" + (", frozen" if not self.weight.requires_grad else "")

    @torch.no_grad()
    def probabilities(self, x):
        """How much of each entry x (..., dim) draws: (..., size), rows sum to 1."""
        return torch.softmax(self.scale * x.to(self.weight.dtype) @ self.weight.mT, dim=-1)

    def usage(self, x):
        """How the bank is used over all of x (..., dim): a dict of
        weight (size,): each entry's mean share;  perplexity: exp of its entropy, the number of entries in use (1 to size);
        perplexity_of_one: the same of a single input, on average;  dead: entries with less than a tenth of an equal share."""
        shares = self.probabilities(x).reshape(-1, len(self.weight))
        weight = shares.mean(0)
        return {"weight": weight, "perplexity": torch.special.entr(weight).sum().exp().item(),
                "perplexity_of_one": torch.special.entr(shares).sum(-1).exp().mean().item(),
                "dead": int((weight < 0.1 / len(weight)).sum())}

    def top(self, x, k=5):
        """The k entries that x (..., dim) draws most of: (shares (..., k), indices (..., k)), the largest first."""
        return self.probabilities(x).topk(k, dim=-1)

    @torch.no_grad()
    def nearest_prompts(self, embeddings, prompts, k=3):
        """For each entry the k prompts whose text embeddings (M, dim) are nearest to it by cosine: a list per entry of (prompt, cosine)."""
        cosines = F.normalize(self.weight, dim=-1) @ F.normalize(embeddings.to(self.weight.dtype), dim=-1).mT  # (size, M)
        values, indices = cosines.topk(min(k, len(prompts)), dim=-1)
        return [[(prompts[i], value) for i, value in zip(*row)] for row in zip(indices.tolist(), values.tolist())]


@torch.no_grad()
def kmeans(features, k, iterations=25, seed=0):
    """k-means centres (k, d) of features (M, d), M at least k, to start a bank from: k-means++ seeding, then Lloyd's steps until nothing
    moves; a cluster that runs empty restarts at the feature farthest from its centre. The seed fixes the result."""
    if features.ndim != 2 or len(features) < k:
        raise ValueError(f"k-means of {k} entries needs features (M, d) with M at least {k}, got {tuple(features.shape)}")
    features = features.float()
    generator = torch.Generator().manual_seed(seed)

    def nearest_centre(centres):  # (squared distance (M,), index (M,)), in chunks so that no (M, k) matrix is held
        parts = [torch.addmm(centres.square().sum(-1), chunk, centres.mT, alpha=-2).min(-1) for chunk in features.split(4096)]
        return (torch.cat([values for values, _ in parts]) + norms).clamp_min(0), torch.cat([indices for _, indices in parts])

    norms, centres = features.square().sum(-1), torch.empty(k, features.shape[1], device=features.device)
    distance = torch.ones_like(norms)  # the first centre is any feature, each further one likely to be far from those before
    for i in range(k):
        heap = distance.double().cumsum(0).cpu()
        pick = torch.searchsorted(heap, heap[-1:] * torch.rand(1, generator=generator).double(), right=True).item()
        centres[i] = features[min(pick, len(features) - 1)]
        distance = torch.minimum(distance if i else norms + math.inf, nearest_centre(centres[i:i + 1])[0])
    assignment = None
    for _ in range(iterations):
        distance, new = nearest_centre(centres)
        if assignment is not None and torch.equal(new, assignment):
            break
        assignment, counts = new, torch.bincount(new, minlength=k)
        centres = torch.zeros_like(centres).index_add_(0, assignment, features) / counts.clamp_min(1)[:, None]
        empty = (counts == 0).nonzero()[:, 0]
        centres[empty] = features[distance.topk(len(empty)).indices]
    return centres


# ---- 5. The losses -----------------------------------------------------------------------------------------------------------------

def info_nce(a, b, scale=10.0):
    """Symmetric InfoNCE of paired embeddings a, b (B, d), L2-normalised here: row i of a belongs to row i of b, all others are negatives.

    scale is the inverse temperature, a number or a tensor (learnable). For the negatives of other processes pass the gathered embeddings."""
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"info_nce takes paired embeddings (B, d) of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    logits = scale * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.mT, pairs)) / 2


def alignment_loss(v, t, v_hat, t_hat, alpha=0.5, beta=1.0, gamma=1.0, scale=10.0):
    """BrgSA's training loss of a batch of pairs, each (B, d), with the authors' weights; returns (total, its parts as a dict of tensors).

    total = alpha mse + beta info_nce + gamma info_nce_hat, where mse = mse(v_hat, v) + mse(t_hat, t)."""
    parts = {
        "mse": F.mse_loss(v_hat, v) + F.mse_loss(t_hat, t),
        "info_nce": info_nce(v, t, scale),
        "info_nce_hat": info_nce(v_hat, t_hat, scale),
    }
    return alpha * parts["mse"] + beta * parts["info_nce"] + gamma * parts["info_nce_hat"], parts
