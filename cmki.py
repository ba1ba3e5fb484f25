"""Cross-Modal Knowledge Interaction (CMKI), the core of BrgSA (arXiv 2501.03565).

One learnable bank D (K, d) is shared by images and texts. Each embedding x (..., d) of either
modality is re-expressed from it, and both forms are trained to agree:

    x_hat = softmax(x D^T) D
    loss  = alpha (mse(v_hat, v) + mse(t_hat, t)) + beta InfoNCE(v, t) + gamma InfoNCE(v_hat, t_hat)

The method comes first; what makes its attention fast follows in a section of its own. This file
needs torch alone, so copy it.

Example:

    import torch, cmki
    torch.manual_seed(0)
    cases = torch.randn(256, 8)                       # what a scan and its report have in common
    scans = cases @ torch.randn(8, 32) + 1
    reports = cases @ torch.randn(8, 32) - 1
    image, text, bank = torch.nn.Linear(32, 16), torch.nn.Linear(32, 16), cmki.KnowledgeBank(64, 16)
    weights = [*image.parameters(), *text.parameters(), *bank.parameters()]
    optimizer, losses = torch.optim.Adam(weights, lr=1e-2), []
    for step in range(100):
        v, t = image(scans), text(reports)
        loss, parts = cmki.alignment_loss(v, t, bank(v), bank(t))
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2

    python -m pytest tests/test_cmki.py
    python bench.py attention
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


# ---- 1. The method ------------------------------------------------------------------------------

def reference_attention(x, bank, scale=1.0):
    """x_hat of x (..., d) and a bank (K, d), as the paper writes it; what bank_attention computes."""
    probabilities = torch.softmax(scale * x @ bank.mT, dim=-1)  # (..., K)
    return probabilities @ bank                                 # (..., d)


class KnowledgeBank(nn.Module):
    """The cross-modal knowledge bank D: x (..., dim) of either modality -> x_hat (..., dim).

    `.weight` is D (size, dim). init: "orthogonal" (the authors'), "gaussian", "xavier", "uniform",
    or the entries themselves (size, dim), such as kmeans(embeddings, size). scale multiplies the
    logits (the authors' 1). frozen: the entries are not trained.
    """

    def __init__(self, size=2048, dim=768, init="orthogonal", scale=1.0, frozen=False):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(size, dim), requires_grad=not frozen)
        self.reset(init)

    @torch.no_grad()
    def reset(self, init):
        """Overwrite the entries; `init` as for the class. ValueError for another name or shape."""
        size, dim = self.weight.shape
        if isinstance(init, torch.Tensor):
            if init.shape != self.weight.shape:
                shapes = f"{(size, dim)}, the entries given for it {tuple(init.shape)}"
                raise ValueError(f"the bank has shape {shapes}")
            self.weight.copy_(init)
        elif init == "orthogonal":
            nn.init.orthogonal_(self.weight)
        elif init == "gaussian":
            nn.init.normal_(self.weight, std=dim ** -0.5)  # length about 1, as orthogonal entries
        elif init == "xavier":
            nn.init.xavier_uniform_(self.weight)
        elif init == "uniform":
            bound = (3 / dim) ** 0.5  # length about 1 again
            nn.init.uniform_(self.weight, -bound, bound)
        else:
            names = "orthogonal, gaussian, xavier, uniform or a tensor of entries"
            raise ValueError(f"init is {names}, not {init!r}")

    def forward(self, x):
        return bank_attention(x, self.weight, self.scale)

    def extra_repr(self):
        size, dim = self.weight.shape
        return f"{size}, {dim}, scale={self.scale}"


def info_nce(a, b, scale=10.0):
    """Symmetric InfoNCE of paired embeddings a, b (B, d): the mean of its two directions.

    Row i of a belongs to row i of b; all other rows are negatives. Both are L2-normalised here.
    scale is the inverse temperature, a number or a tensor. For the negatives of other processes
    pass the gathered embeddings. Raises ValueError where the shapes differ.
    """
    if a.shape != b.shape or a.ndim != 2:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"info_nce takes paired embeddings (B, d) of one shape, got {shapes}")
    logits = scale * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT  # (B, B)
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.mT, pairs)) / 2


def alignment_loss(v, t, v_hat, t_hat, alpha=0.5, beta=1.0, gamma=1.0, scale=10.0):
    """BrgSA's training loss of a batch of pairs, each (B, d) -> (total, its parts as tensors).

    total = alpha mse + beta info_nce + gamma info_nce_hat; mse = mse(v_hat, v) + mse(t_hat, t).
    """
    parts = {
        "mse": F.mse_loss(v_hat, v) + F.mse_loss(t_hat, t),
        "info_nce": info_nce(v, t, scale),
        "info_nce_hat": info_nce(v_hat, t_hat, scale),
    }
    total = alpha * parts["mse"] + beta * parts["info_nce"] + gamma * parts["info_nce_hat"]
    return total, parts


# ---- 2. The same attention without the N x K matrix ---------------------------------------------
#
# reference_attention holds the probabilities P (N, K) of all N inputs until the backward pass.
# Below they are never whole: one operator walks over chunks of rows, small enough to stay in the
# cache, and recomputes P where it is needed again. Plain matrix products do the work, at the
# library's speed; only for narrow embeddings in half precision on CUDA does a Triton kernel pair
# (section 3) do better, which keeps P in registers.
#
# Backward, with g the gradient of the output:
#     dP = g D^T                          dx = scale dS D
#     dS = P * (dP - rowsum(P * dP))      dD = P^T g + scale dS^T x

AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")


def bank_attention(x, bank, scale=1.0):
    """softmax(scale x bank^T) bank of x (..., d) and bank (K, d): x's shape and dtype.

    Differentiable any number of times in x and bank (not in scale, a number); a second derivative
    takes N x K memory, all else memory linear in N + K. Under autocast both are cast to its dtype.
    Raises ValueError where width, dtype or device don't match.
    """
    device = x.device.type
    autocast = device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
    if autocast and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, bank = x.to(dtype), bank.to(dtype)
    ranks_match = bank.ndim == 2 and x.ndim >= 1
    widths_match = ranks_match and 0 not in bank.shape and x.shape[-1] == bank.shape[1]
    kinds_match = x.is_floating_point() and x.dtype == bank.dtype and x.device == bank.device
    if not (widths_match and kinds_match):
        raise ValueError(
            "bank_attention takes x (..., d) and a bank (K, d) of one floating dtype on one device, "
            f"K and d at least 1; got x {tuple(x.shape)} {x.dtype} on {x.device} "
            f"and a bank {tuple(bank.shape)} {bank.dtype} on {bank.device}"
        )
    grad = torch.is_grad_enabled() and (x.requires_grad or bank.requires_grad)
    out, _, _ = _attend(x.reshape(-1, x.shape[-1]), bank, float(scale), grad)
    return out.reshape(x.shape)


@torch.library.custom_op("cmki::bank_attention", mutates_args=())
def _attend(
    x: torch.Tensor, bank: torch.Tensor, scale: float, grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (N, d), bank (K, d) -> out (N, d), and the two tensors that _saved describes."""
    if _on_triton(x):
        return _triton_forward(x, bank, scale, grad)
    return _chunked_forward(x, bank, scale, grad)


@torch.library.custom_op("cmki::bank_attention_backward", mutates_args=())
def _attend_backward(
    g: torch.Tensor, x: torch.Tensor, bank: torch.Tensor, stats: torch.Tensor, kept: torch.Tensor,
    scale: float, need_x: bool, need_bank: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and bank from g (N, d), chunk by chunk of rows; an unneeded one is empty."""
    (N, d), K, chunk, on_triton = x.shape, len(bank), _chunk_rows(x, bank), _on_triton(x)
    whole_p = not on_triton and N <= len(kept)
    p_buffer, ds_buffer = x.new_empty(0 if whole_p else chunk, K), x.new_empty(chunk, K)
    dx, dbank = x.new_empty(N if need_x else 0, d), x.new_zeros(K if need_bank else 0, d)
    # A half-precision sum over many chunks would lose digits: every fourth moves it into fp32.
    in_fp32 = x.itemsize < 4 and N > chunk
    total = torch.zeros_like(dbank, dtype=torch.float32) if in_fp32 else None

    for i, start in enumerate(range(0, N, chunk)):
        rows = slice(start, min(start + chunk, N))
        n = rows.stop - start
        x_rows, g_rows, p, ds = x[rows], g[rows], p_buffer[:n], ds_buffer[:n]
        if on_triton:
            delta = (g_rows * kept[rows]).sum(-1)  # rowsum(P * dP) = rowsum(g * out)
            _triton_p_and_ds(x_rows, g_rows, bank, stats[rows], delta, scale, p, ds)
        elif start < len(kept):
            p = kept[rows]
            _chunk_p_and_ds(x_rows, g_rows, bank, scale, p, ds, stats[i].item(), p_is_known=True)
        else:
            _chunk_p_and_ds(x_rows, g_rows, bank, scale, p, ds, stats[i].item())
        if need_x:
            dx[rows].addmm_(ds, bank, beta=0, alpha=scale)
        if need_bank:
            begins_sum = i % 4 == 0 if in_fp32 else start == 0
            dbank.addmm_(p.mT, g_rows, beta=float(not begins_sum))
            dbank.addmm_(ds.mT, x_rows, alpha=scale)
            if in_fp32 and (i % 4 == 3 or rows.stop == N):
                # In parts, since adding across dtypes makes a copy.
                for part, new in zip(total.split(128), dbank.split(128)):
                    part += new
    return dx, dbank.copy_(total) if in_fp32 else dbank


def _saved(x, bank, grad):
    """(stats, kept): what the forward pass leaves for the backward pass, still to be filled.

    On Triton: the log-sum-exp (N,) of the logits and out (N, d) in fp32; with the digits that half
    precision drops, the gradient of a nearly one-hot row would be rounding alone.
    By chunks: the largest |logit| of each chunk, and the first rows of P, as many as a fixed number
    of entries holds (all, for a usual batch), which spares recomputing them.
    """
    (N, d), K, chunk = x.shape, bank.shape[0], _chunk_rows(x, bank)
    if _on_triton(x):
        out_rows = N if grad else 0
        lse = x.new_empty(N, dtype=torch.float32)
        return lse, x.new_empty(out_rows, d, dtype=torch.float32)
    kept_rows = N if chunk >= N else KEPT_ENTRIES[x.itemsize] // K // chunk * chunk
    peaks = x.new_empty((N + chunk - 1) // chunk, dtype=torch.float32)
    return peaks, x.new_empty(kept_rows if grad else 0, K)


@_attend.register_fake
def _(x, bank, scale, grad):
    return x.new_empty(x.shape), *_saved(x, bank, grad)


@_attend_backward.register_fake
def _(g, x, bank, stats, kept, scale, need_x, need_bank):
    dx = x.new_empty(x.shape[0] if need_x else 0, x.shape[1])
    return dx, bank.new_empty(bank.shape[0] if need_bank else 0, bank.shape[1])


def _setup_context(ctx, inputs, output):
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
    if torch.is_grad_enabled():  # create_graph=True: in operations that can be differentiated again
        p = torch.softmax(ctx.scale * x @ bank.mT, dim=-1)
        dp = g @ bank.mT
        ds = ctx.scale * p * (dp - (p * dp).sum(-1, keepdim=True))
        return ds @ bank, p.mT @ g + ds.mT @ x, None, None
    dx, dbank = _attend_backward(g, x, bank, stats, kept, ctx.scale, need_x, need_bank)
    return dx if need_x else None, dbank if need_bank else None, None, None


_attend.register_autograd(_derivative, setup_context=_setup_context)

# Entries of P by bytes per entry: saved for the backward pass, and in one chunk (large enough for
# the matrix product, small enough for the cache). Together they stay under a quarter of what
# reference_attention holds at N = 10976, K = 2048.
KEPT_ENTRIES = {2: 11 << 19, 4: 10 << 20, 8: 5 << 20}
CHUNK_ENTRIES = {2: 1 << 21, 4: 1 << 21, 8: 1 << 20}
CHUNK_ENTRIES_ON_DEVICE = 1 << 23

# On the CPU, rounding moves a logit by up to |logit| times the dtype's epsilon, and its probability
# by that factor. A chunk with larger logits than these is computed in the next wider dtype.
WIDER = {
    torch.bfloat16: (8, torch.float32),
    torch.float16: (8, torch.float32),
    torch.float32: (16, torch.float64),
}


def _chunk_rows(x, bank):
    """Rows of x in a chunk: all of them where P is kept whole."""
    N, K = x.shape[0], bank.shape[0]
    if N * K <= KEPT_ENTRIES[x.itemsize]:
        return max(1, N)
    on_cpu = x.device.type == "cpu"
    entries = CHUNK_ENTRIES[x.itemsize] if on_cpu else CHUNK_ENTRIES_ON_DEVICE
    return min(N, max(64, entries // K))


def _widening(x):
    """(largest |logit| for x's own dtype, the next wider dtype)."""
    return WIDER.get(x.dtype, (math.inf, None)) if x.device.type == "cpu" else (math.inf, None)


def _softmax(x, bank, scale, out, limit=math.inf):
    """softmax(scale x bank^T) into out (n, K) -> largest |logit|; beyond limit it is left undone."""
    torch.addmm(out, x, bank.mT, beta=0, alpha=scale, out=out)
    peak = 0.0
    if limit < math.inf:
        low, high = torch.aminmax(out)
        peak = max(-low.item(), high.item())
    if not peak > limit:  # so written, a NaN goes through
        torch.softmax(out, -1, out=out)
    return peak


def _chunked_forward(x, bank, scale, grad):
    (N, _), K, chunk, (limit, wider) = x.shape, len(bank), _chunk_rows(x, bank), _widening(x)
    out, (stats, kept) = x.new_empty(x.shape), _saved(x, bank, grad)
    buffer = x.new_empty(chunk if N > len(kept) else 0, K)
    for i, start in enumerate(range(0, N, chunk)):
        rows = slice(start, min(start + chunk, N))
        p = kept[rows] if start < len(kept) else buffer[:rows.stop - start]
        stats[i] = peak = _softmax(x[rows], bank, scale, p, limit)
        if peak > limit:
            wide_p = torch.empty_like(p, dtype=wider)
            _softmax(x[rows].to(wider), bank.to(wider), scale, wide_p)
            p.copy_(wide_p)
        torch.mm(p, bank, out=out[rows])
    return out, stats, kept


def _chunk_p_and_ds(x, g, bank, scale, p, ds, peak=0.0, p_is_known=False):
    """P and dS of a chunk into p and ds (n, K); peak is the chunk's largest |logit|."""
    limit, wider = _widening(x)
    if peak > limit:  # in its own dtype, 1 - p of a nearly one-hot row would be lost
        wide_p, wide_ds = torch.empty_like(p, dtype=wider), torch.empty_like(ds, dtype=wider)
        _chunk_p_and_ds(x.to(wider), g.to(wider), bank.to(wider), scale, wide_p, wide_ds)
        p.copy_(wide_p)
        ds.copy_(wide_ds)
        return
    if not p_is_known:
        _softmax(x, bank, scale, p)
    torch.mm(g, bank.mT, out=ds)
    torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)


# ---- 3. Triton: d up to 256 in half precision on CUDA -------------------------------------------
#
# Forward, as in FlashAttention (Dao et al. 2022): a program holds 64 inputs and their outputs over
# the whole width and walks over the bank by online softmax. With few inputs the bank is split over
# programs as well, and the partial results are merged by their log-sum-exp.
#
# Backward: one kernel, shaped like a matrix product, recomputes P from the log-sum-exp and turns dP
# into dS; the three remaining products are plain ones, so the result repeats bit for bit.
#
# The blocks are fixed. Compiled for sm_80, sm_89, sm_90 and sm_100 they spill no register, take at
# most 99 KiB of shared memory, and on Blackwell 512 columns of tensor memory (tests/test_cmki.py).
# Wider, the outputs no longer fit the registers: there the chunked products are the faster.

FORWARD_BLOCKS = dict(BLOCK_N=64, BLOCK_K=32)
BACKWARD_BLOCKS = dict(BLOCK_N=128, BLOCK_K=64, BLOCK_D=64)
LAUNCH = dict(num_warps=8, num_stages=2)
_refused = set()  # devices that have refused a launch: not asked again


def _on_triton(x):
    narrow_half = x.dtype in (torch.bfloat16, torch.float16) and x.shape[1] <= 256
    return triton is not None and x.is_cuda and narrow_half


def _launched(kernel, grid, x, *arguments, **constants):
    """Launch a kernel on x's device; False where it can't be, so that torch has to do the work."""
    if x.device in _refused:
        return False
    try:
        with torch.cuda.device_of(x):
            kernel[grid](x, *arguments, **constants, **LAUNCH)
    except Exception:  # out of resources, no compiler, an unknown card: each raises its own
        _refused.add(x.device)
        return False
    return True


def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count


def _triton_forward(x, bank, scale, grad):
    x, bank, (N, d), K = x.contiguous(), bank.contiguous(), x.shape, len(bank)
    out, (lse, kept) = x.new_empty(x.shape), _saved(x, bank, grad)
    if N == 0:
        return out, lse, kept
    programs = triton.cdiv(N, FORWARD_BLOCKS["BLOCK_N"])
    tiles = triton.cdiv(K, FORWARD_BLOCKS["BLOCK_K"])
    idle = _multiprocessors(x.device) // programs
    tiles_per_split = triton.cdiv(tiles, max(1, min(tiles, idle)))
    splits = triton.cdiv(tiles, tiles_per_split)
    part = x.new_empty(splits, N, d, dtype=torch.float32)
    part_lse = x.new_empty(splits, N, dtype=torch.float32)
    width = max(16, triton.next_power_of_2(d))  # tl.dot wants powers of two from 16 up
    span = tiles_per_split * FORWARD_BLOCKS["BLOCK_K"]
    if not _launched(
        _forward_kernel, (programs, splits), x, bank, part, part_lse, N, K, d, scale, span,
        WIDTH=width, **FORWARD_BLOCKS,
    ):
        logits = scale * x.float() @ bank.float().mT
        part = (torch.softmax(logits, -1) @ bank.float())[None]
        part_lse = logits.logsumexp(-1)[None]
    torch.logsumexp(part_lse, 0, out=lse)
    merged = (part * torch.softmax(part_lse, 0)[..., None]).sum(0)  # (N, d)
    kept.copy_(merged[:len(kept)])
    return out.copy_(merged), lse, kept


def _triton_p_and_ds(x, g, bank, lse, delta, scale, p, ds):
    x, g, bank, (n, d), K = x.contiguous(), g.contiguous(), bank.contiguous(), x.shape, len(bank)
    blocks = BACKWARD_BLOCKS
    grid = triton.cdiv(n, blocks["BLOCK_N"]), triton.cdiv(K, blocks["BLOCK_K"])
    arguments = x, g, bank, lse, delta, p, ds, n, K, d, scale
    if not _launched(_p_and_ds_kernel, grid, *arguments, **blocks):
        _chunk_p_and_ds(x, g, bank, scale, p, ds)


if triton is not None:
    LOG2E = tl.constexpr(math.log2(math.e))

    @triton.jit
    def _forward_kernel(
        x, bank, part, lse, N, K, d, scale, span,
        WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):
        """Inputs [BLOCK_N * program 0, ...) against the bank's entries [span * program 1, ...)."""
        rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        columns = tl.arange(0, WIDTH)[None, :]
        inside = (rows[:, None] < N) & (columns < d)
        x_rows = tl.load(x + rows[:, None] * d + columns, inside, 0.0)  # (BLOCK_N, WIDTH)
        total = tl.zeros((BLOCK_N, WIDTH), tl.float32)
        top = tl.full((BLOCK_N,), float("-inf"), tl.float32)  # largest logit so far, in log2
        mass = tl.zeros((BLOCK_N,), tl.float32)               # sum of exp2(logit - top) so far
        first = tl.program_id(1) * span
        for start in range(first, tl.minimum(first + span, K), BLOCK_K):
            entries = start + tl.arange(0, BLOCK_K)
            real = (entries[:, None] < K) & (columns < d)
            tile = tl.load(bank + entries[:, None] * d + columns, real, 0.0)  # (BLOCK_K, WIDTH)
            logits = tl.dot(x_rows, tl.trans(tile)) * (scale * LOG2E)
            logits = tl.where(entries[None, :] < K, logits, float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, 1))
            shrink = tl.exp2(top - new_top)
            p = tl.exp2(logits - new_top[:, None])
            mass = mass * shrink + tl.sum(p, 1)
            total = tl.dot(p.to(tile.dtype), tile, total * shrink[:, None])
            top = new_top
        part += tl.program_id(1).to(tl.int64) * N * d
        tl.store(part + rows[:, None] * d + columns, total / mass[:, None], inside)
        tl.store(lse + tl.program_id(1) * N + rows, (top + tl.log2(mass)) / LOG2E, rows < N)

    @triton.jit
    def _p_and_ds_kernel(
        x, g, bank, lse, delta, p, ds, n, K, d, scale,
        BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    ):
        """A tile of P = exp(scale x bank^T - lse) and of dS = P * (g bank^T - delta)."""
        rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        entries = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        logits = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        dp = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in range(0, d, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)[None, :]
            row_mask = (rows[:, None] < n) & (columns < d)
            bank_mask = (entries[:, None] < K) & (columns < d)
            tile = tl.trans(tl.load(bank + entries[:, None] * d + columns, bank_mask, 0.0))
            logits = tl.dot(tl.load(x + rows[:, None] * d + columns, row_mask, 0.0), tile, logits)
            dp = tl.dot(tl.load(g + rows[:, None] * d + columns, row_mask, 0.0), tile, dp)
        lse_rows = tl.load(lse + rows, rows < n, 0.0)[:, None]
        delta_rows = tl.load(delta + rows, rows < n, 0.0)[:, None]
        probability = tl.exp2((logits * scale - lse_rows) * LOG2E)
        cells = rows[:, None] * K + entries[None, :]
        inside = (rows[:, None] < n) & (entries[None, :] < K)
        tl.store(p + cells, probability.to(p.dtype.element_ty), inside)
        tl.store(ds + cells, (probability * (dp - delta_rows)).to(ds.dtype.element_ty), inside)


# ---- 4. Around the bank: a start from embeddings, and what its entries stand for ----------------

@torch.no_grad()
def bank_usage(bank, x):
    """How a KnowledgeBank is used over all of x (..., dim): a dict.

    "weight" (size,): each entry's mean share; "perplexity": exp of its entropy, the number of
    entries in use (1 to size); "perplexity_of_one": the same of a single input, on average; "dead":
    entries with less than a tenth of an equal share.
    """
    entries = bank.weight
    shares = torch.softmax(bank.scale * x.to(entries) @ entries.mT, dim=-1)  # (..., size)
    shares = shares.reshape(-1, len(entries))
    weight = shares.mean(0)
    entropy_of_one = torch.special.entr(shares).sum(-1)
    return {
        "weight": weight,
        "perplexity": torch.special.entr(weight).sum().exp().item(),
        "perplexity_of_one": entropy_of_one.exp().mean().item(),
        "dead": int((weight < 0.1 / len(weight)).sum()),
    }


@torch.no_grad()
def nearest_prompts(bank, embeddings, prompts, k=3):
    """Per entry of a KnowledgeBank the k prompts nearest to it by cosine: [(prompt, cosine), ...].

    embeddings (M, dim) are those of the M prompts.
    """
    entries = F.normalize(bank.weight, dim=-1)
    cosines = entries @ F.normalize(embeddings.to(entries), dim=-1).mT  # (size, M)
    nearest = cosines.topk(min(k, len(prompts)), dim=-1)
    out = []
    for indices, values in zip(nearest.indices.tolist(), nearest.values.tolist()):
        out.append([(prompts[i], value) for i, value in zip(indices, values)])
    return out


@torch.no_grad()
def kmeans(features, k, iterations=25, seed=0):
    """k-means centres (k, d) of features (M, d), M at least k, to start a bank from.

    k-means++ seeding (Arthur and Vassilvitskii 2007), then Lloyd's steps until nothing moves; a
    cluster that runs empty restarts at the feature farthest from its centre. The seed fixes all.
    """
    if features.ndim != 2 or len(features) < k:
        wanted = f"k-means of {k} entries needs features (M, d) with M at least {k}"
        raise ValueError(f"{wanted}, got {tuple(features.shape)}")
    features = features.float()
    norms = features.square().sum(-1)
    generator = torch.Generator().manual_seed(seed)

    def nearest_centre(centres):
        """(squared distance (M,), index (M,)), in chunks so that no (M, k) matrix is held."""
        distances, indices = [], []
        for chunk in features.split(4096):
            squares = centres.square().sum(-1)
            distance, index = torch.addmm(squares, chunk, centres.mT, alpha=-2).min(-1)
            distances.append(distance)
            indices.append(index)
        return (torch.cat(distances) + norms).clamp_min(0), torch.cat(indices)

    # Seeding: the first centre is any feature, each further one likely to be far from those before.
    centres = torch.empty(k, features.shape[1], device=features.device)
    distance, closest = torch.ones_like(norms), norms + math.inf
    for i in range(k):
        heap = distance.double().cumsum(0).cpu()
        draw = heap[-1:] * torch.rand(1, generator=generator).double()
        pick = torch.searchsorted(heap, draw, right=True).item()
        centres[i] = features[min(pick, len(features) - 1)]
        closest = torch.minimum(closest, nearest_centre(centres[i:i + 1])[0])
        distance = closest

    assignment = None
    for _ in range(iterations):
        distance, nearest = nearest_centre(centres)
        if assignment is not None and torch.equal(nearest, assignment):
            break
        assignment, counts = nearest, torch.bincount(nearest, minlength=k)
        sums = torch.zeros_like(centres).index_add_(0, assignment, features)
        centres = sums / counts.clamp_min(1)[:, None]
        empty = (counts == 0).nonzero()[:, 0]
        centres[empty] = features[distance.topk(len(empty)).indices]
    return centres
