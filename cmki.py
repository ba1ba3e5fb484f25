"""Cross-Modal Knowledge Interaction (CMKI), the core of BrgSA (arXiv 2501.03565).

One learnable bank D (K, d) is shared by images and texts. Each embedding x (..., d) of either
modality is re-expressed from it, as a weighted mean of its entries, and both forms are trained to
agree:

    x_hat = softmax(x D^T) D
    loss  = alpha (mse(v_hat, v) + mse(t_hat, t)) + beta InfoNCE(v, t) + gamma InfoNCE(v_hat, t_hat)

Section 1 is the whole method. What makes its attention fast follows in sections of its own. This
file needs torch alone, so copy it.

    python -m pytest tests/test_cmki.py
    python bench.py attention

Example:

    import torch, cmki
    torch.manual_seed(0)
    cases = torch.randn(256, 8)                       # what a scan and its report have in common
    scans = cases @ torch.randn(8, 32) + 1
    reports = cases @ torch.randn(8, 32) - 1
    image, text, bank = torch.nn.Linear(32, 16), torch.nn.Linear(32, 16), cmki.KnowledgeBank(64, 16)
    weights = [*image.parameters(), *text.parameters(), *bank.parameters()]
    optimizer = torch.optim.Adam(weights, lr=1e-2)
    losses = []
    for step in range(100):
        v, t = image(scans), text(reports)
        loss, parts = cmki.alignment_loss(v, t, bank(v), bank(t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
"""
import math
import warnings
from functools import partial

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
    """x_hat of x (..., d) and a bank (K, d), as the paper has it: what bank_attention computes."""
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
                raise ValueError(
                    f"the bank is {(size, dim)}, the entries for it are {tuple(init.shape)}"
                )
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
            raise ValueError(
                "init is orthogonal, gaussian, xavier, uniform or a tensor of entries, "
                f"not {init!r}"
            )

    def forward(self, x):
        return bank_attention(x, self.weight, self.scale)


def info_nce(a, b, scale=10.0):
    """Symmetric InfoNCE of paired embeddings a, b (B, d): the mean of its two directions.

    Row i of a belongs to row i of b; all other rows are negatives. Both are L2-normalised here.
    scale is the inverse temperature, a number or a tensor. For the negatives of other processes
    pass the gathered embeddings. Raises ValueError where the shapes differ.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(
            "info_nce takes paired embeddings (B, d) of one shape, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    logits = scale * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT  # (B, B)
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.mT, pairs)) / 2


def alignment_loss(v, t, v_hat, t_hat, alpha=0.25, beta=1.0, gamma=1.0, scale=10.0):
    """BrgSA's training loss of a batch of pairs, each (B, d) -> (total, its parts as tensors).

    total = alpha mse + beta info_nce + gamma info_nce_hat; mse = mse(v_hat, v) + mse(t_hat, t).
    The authors sum the two directions of InfoNCE, where info_nce is their mean: their weights 0.5,
    1 and 1 are 0.25, 1 and 1 here, at twice the learning rate (which Adam doesn't see).
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
# reference_attention holds several N x K matrices until the backward pass: the logits, their
# softmax P, and the gradients of both. Below none of them is ever whole. One operator walks over
# chunks of rows, small enough to stay in the cache, and computes P again where it is needed again.
# Plain matrix products do the work, at the library's speed. Only for many narrow embeddings in half
# precision on CUDA does a pair of Triton kernels (section 3) do better, which hold P in registers.
#
# Backward, with g the gradient of the output:
#     dP = g D^T                          dx = scale dS D
#     dS = P * (dP - rowsum(P * dP))      dD = P^T g + scale dS^T x

def bank_attention(x, bank, scale=1.0):
    """softmax(scale x bank^T) bank of x (..., d) and bank (K, d): x's shape and dtype.

    Differentiable any number of times in x and bank (not in scale, a number); a second derivative
    takes N x K memory, all else memory linear in N + K. Under autocast both are cast to its dtype.
    Raises ValueError where width, dtype or device don't match.
    """
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    if autocast and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, bank = x.to(dtype), bank.to(dtype)
    widths_match = bank.ndim == 2 and x.shape[-1:] == bank.shape[1:]
    kinds_match = x.is_floating_point() and x.dtype == bank.dtype and x.device == bank.device
    if not (widths_match and kinds_match) or 0 in bank.shape:
        raise ValueError(
            "bank_attention takes x (..., d) and a bank (K, d) of one floating dtype on one device,"
            f" K and d at least 1; got x {tuple(x.shape)} {x.dtype} on {x.device} "
            f"and a bank {tuple(bank.shape)} {bank.dtype} on {bank.device}"
        )
    out, _, _ = _attend(x.reshape(-1, x.shape[-1]), bank, float(scale))  # (N, d)
    return out.reshape(x.shape)


FORWARD = "(Tensor x, Tensor bank, float scale) -> (Tensor, Tensor, Tensor)"
BACKWARD = (
    "(Tensor g, Tensor x, Tensor bank, Tensor stats, Tensor kept, float scale) -> (Tensor, Tensor)"
)


@torch.library.custom_op("cmki::bank_attention", mutates_args=(), schema=FORWARD)
def _attend(x, bank, scale):
    """x (N, d), bank (K, d) -> out (N, d), and the two tensors that _outputs describes."""
    out, stats, kept = _outputs(x, bank, scale)
    if _on_triton(x) and _triton_forward(x, bank, stats, kept, scale):
        return out.copy_(kept), stats, kept
    limit, wider = _widening(x)
    for rows, p, _ in _chunks(x, bank, kept):
        peak = _softmax(x[rows], bank, scale, p, limit) if limit else math.inf
        if peak > limit:
            wide_p = torch.empty_like(p, dtype=wider)
            _softmax(x[rows], bank, scale, wide_p)
            p.copy_(wide_p)
        stats[rows.start] = peak
        torch.mm(p, bank, out=out[rows])
    return out, stats, kept


@torch.library.custom_op("cmki::bank_attention_backward", mutates_args=(), schema=BACKWARD)
def _attend_backward(g, x, bank, stats, kept, scale):
    """Gradients of x and bank from g (N, d), chunk by chunk of rows."""
    dx, dbank = x.new_empty(x.shape), bank.new_zeros(bank.shape)
    # A half-precision sum over many chunks would lose digits: every fourth moves it into fp32.
    in_fp32 = x.itemsize == 2 and len(x) > _chunk_rows(x, bank)
    total = torch.zeros_like(dbank, dtype=torch.float32) if in_fp32 else None
    for i, (rows, p, ds) in enumerate(_p_and_ds(g, x, bank, stats, kept, scale)):
        dx[rows].addmm_(ds, bank, beta=0, alpha=scale)
        dbank.addmm_(p.mT, g[rows])
        dbank.addmm_(ds.mT, x[rows], alpha=scale)
        if in_fp32 and (i % 4 == 3 or rows.stop == len(x)):
            for part, new in zip(total.split(128), dbank.split(128)):  # a mixed sum makes a copy
                part += new
            dbank.zero_()
    return dx, dbank.copy_(total) if in_fp32 else dbank


@_attend.register_fake
def _outputs(x, bank, scale):
    """(out, stats, kept) to be filled; the last two are for the backward pass.

    On Triton: the log-sum-exp (N,) of the logits and out (N, d) in fp32; without the digits that
    half precision drops, the gradient of a nearly one-hot row would be rounding alone.
    By chunks: the largest |logit| of each chunk, at its first row, and the first rows of P, as many
    as a fixed number of entries holds (all, for a usual batch), which spares computing them again;
    none if a wider dtype is the rule, since P in x's own won't do.
    """
    (N, d), K, chunk = x.shape, bank.shape[0], _chunk_rows(x, bank)
    out, stats = x.new_empty(N, d), x.new_zeros(N, dtype=torch.float32)
    if _on_triton(x):
        return out, stats, x.new_empty(N, d, dtype=torch.float32)
    kept_rows = N if chunk >= N else KEPT_ENTRIES[x.itemsize] // K // chunk * chunk
    limit, _ = _widening(x)
    return out, stats, x.new_empty(kept_rows if limit else 0, K)


@_attend_backward.register_fake
def _(g, x, bank, stats, kept, scale):
    return x.new_empty(x.shape), bank.new_empty(bank.shape)


def _setup_context(ctx, inputs, output):
    x, bank, ctx.scale = inputs
    _, stats, kept = output
    ctx.mark_non_differentiable(stats, kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, bank, stats, kept)


def _derivative(ctx, g, *_):
    x, bank, stats, kept = ctx.saved_tensors
    if g is None:
        return None, None, None
    if torch.is_grad_enabled():  # create_graph=True: in operations that can be differentiated again
        attention = partial(reference_attention, scale=ctx.scale)
        _, gradients = torch.func.vjp(attention, x, bank)
        return *gradients(g), None
    return *_attend_backward(g, x, bank, stats, kept, ctx.scale), None


_attend.register_autograd(_derivative, setup_context=_setup_context)

# Entries of P by bytes per entry: saved for the backward pass, and in one chunk (large enough for
# the matrix product, small enough for the cache). Together they stay under a quarter of what
# reference_attention holds at N = 10976, K = 2048.
KEPT_ENTRIES = {2: 11 << 19, 4: 10 << 20, 8: 5 << 20}
CHUNK_ENTRIES = {2: 1 << 21, 4: 1 << 21, 8: 1 << 20}
CHUNK_ENTRIES_ON_DEVICE = 1 << 22

# Rounding moves a logit by up to |logit| times the dtype's epsilon, and its probability by that
# factor. A chunk with larger logits than these is computed in the next wider dtype. On CUDA that is
# every chunk in half precision: its matrix units add up in fp32 anyway, and to look would stall.
WIDER = {  # by device and bytes per entry: the largest |logit|, the wider dtype
    ("cpu", 2): (8, torch.float32),
    ("cpu", 4): (16, torch.float64),
    ("cuda", 2): (0, torch.float32),
}


def _widening(x):
    return WIDER.get((x.device.type, x.itemsize), (math.inf, None))


def _chunk_rows(x, bank):
    """Rows of x in a chunk: all of them where P is kept whole."""
    N, K = x.shape[0], bank.shape[0]
    if N * K <= KEPT_ENTRIES[x.itemsize]:
        return max(1, N)
    on_cpu = x.device.type == "cpu"
    entries = CHUNK_ENTRIES[x.itemsize] if on_cpu else CHUNK_ENTRIES_ON_DEVICE
    return min(N, max(64, entries // K))


def _chunks(x, bank, kept):
    """Yield (rows, P, known) of each chunk, where P (n, K) is in kept if it is known."""
    N, chunk = len(x), _chunk_rows(x, bank)
    kept_rows = 0 if _on_triton(x) else len(kept)
    buffer = x.new_empty(chunk if kept_rows < N else 0, len(bank))
    for start in range(0, N, chunk):
        rows = slice(start, min(start + chunk, N))
        known = start < kept_rows
        yield rows, kept[rows] if known else buffer[:rows.stop - start], known


def _logits(x, bank, scale, out):
    """scale x bank^T into out (n, K), in out's dtype."""
    if x.is_cuda and x.dtype != out.dtype:
        return torch.mm(x, bank.mT, out_dtype=out.dtype, out=out).mul_(scale)
    x, bank = x.to(out.dtype), bank.to(out.dtype)
    return torch.addmm(out, x, bank.mT, beta=0, alpha=scale, out=out)


def _softmax(x, bank, scale, out, limit=math.inf):
    """softmax(scale x bank^T) into out (n, K) -> largest |logit|; beyond limit it is not done."""
    _logits(x, bank, scale, out)
    peak = 0.0
    if limit < math.inf:
        low, high = torch.aminmax(out)
        peak = max(-low.item(), high.item())
    if not peak > limit:  # so written, a NaN goes through
        torch.softmax(out, -1, out=out)
    return peak


def _p_and_ds(g, x, bank, stats, kept, scale):
    """Yield (rows, P, dS) of each chunk, P and dS (n, K) in x's dtype."""
    limit, wider = _widening(x)
    buffer = x.new_empty(_chunk_rows(x, bank), len(bank))
    for rows, p, known in _chunks(x, bank, kept):
        x_rows, g_rows, ds = x[rows], g[rows], buffer[:len(p)]
        if _on_triton(x) and _triton_p_and_ds(
            x_rows, g_rows, bank, stats[rows], kept[rows], scale, p, ds
        ):
            yield rows, p, ds
            continue
        if limit == 0 or (wider and stats[rows.start].item() > limit):
            # In its own dtype, 1 - p of a nearly one-hot row would be lost.
            known = False
            p, ds = torch.empty_like(p, dtype=wider), torch.empty_like(ds, dtype=wider)
        if not known:
            _softmax(x_rows, bank, scale, p)
        dp = _logits(g_rows, bank, 1.0, ds)
        torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=ds)
        yield rows, p.to(x.dtype), ds.to(x.dtype)


# ---- 3. Triton: many narrow embeddings in half precision on CUDA --------------------------------
#
# Forward, as in FlashAttention (Dao et al. 2022): a program holds BLOCK_N inputs and their outputs
# over the whole width and walks over the bank by online softmax.
#
# Backward: one kernel, shaped like a matrix product, computes P again from the log-sum-exp and
# turns dP into dS; the three remaining products are plain ones, so the result repeats bit for bit.
#
# Compiled for A100, 4090, H100 and B200, neither kernel spills a register (tests/test_cmki.py).
# Wider embeddings would spill, and fp32 (three TF32 products for one), and widths that 16 does not
# divide; few rows leave most of a card idle. Chunks serve these better.

_refused = set()  # (device, dtype, width) of the launches that failed: not tried again


def _on_triton(x):
    N, d = x.shape
    many_and_narrow = N >= 8192 and d <= 256 and d % 16 == 0
    return triton is not None and x.is_cuda and x.itemsize == 2 and many_and_narrow


def _forward_blocks(d):
    width = triton.next_power_of_2(d)  # tl.dot wants powers of two
    rows = 128 if d <= 128 else 64  # whose outputs fill a quarter of the registers in fp32
    return dict(WIDTH=width, BLOCK_N=rows, BLOCK_K=64, num_warps=8, num_stages=2)


BACKWARD_BLOCKS = dict(BLOCK_N=128, BLOCK_K=128, BLOCK_D=32, num_warps=8, num_stages=3)


def _launched(kernel, grid, scale, x, bank, *tensors, **blocks):
    """Launch a kernel on x's device; False where it can't be, so that the chunks have to do."""
    key = x.device, x.dtype, x.shape[1]
    if key in _refused:
        return False
    sizes = len(x), *bank.shape  # N, K, d
    try:
        with torch.cuda.device_of(x):
            kernel[grid](x.contiguous(), bank.contiguous(), *tensors, *sizes, scale, **blocks)
    except Exception as error:  # too little shared memory, no compiler, an unknown card, ...
        _refused.add(key)
        warnings.warn(f"bank_attention does without its Triton kernels for {key}: {error!r}")
        return False
    return True


def _triton_forward(x, bank, lse, exact, scale):
    """Log-sum-exp and output in fp32; False where the kernel can't be launched."""
    blocks = _forward_blocks(x.shape[1])
    grid = (triton.cdiv(len(x), blocks["BLOCK_N"]),)
    return _launched(_forward_kernel, grid, scale, x, bank, exact, lse, **blocks)


def _triton_p_and_ds(x, g, bank, lse, exact, scale, p, ds):
    """P and dS of a chunk into p and ds (n, K); False where the kernel can't be launched."""
    delta = (g * exact).sum(-1)  # rowsum(P * dP) = rowsum(g * out)
    blocks = BACKWARD_BLOCKS
    grid = triton.cdiv(len(x), blocks["BLOCK_N"]), triton.cdiv(len(bank), blocks["BLOCK_K"])
    tensors = x, bank, g.contiguous(), lse, delta, p, ds
    return _launched(_p_and_ds_kernel, grid, scale, *tensors, **blocks)


if triton is not None:
    @triton.jit
    def _cells(rows, columns, N, d):
        """Offsets of the cells [rows, columns] of a matrix (N, d), and which are inside it."""
        rows, columns = rows[:, None], columns[None, :]
        return rows * d + columns, (rows < N) & (columns < d)

    @triton.jit
    def _forward_kernel(
        x, bank, out, lse, N, K, d, scale,
        WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):
        """Inputs [BLOCK_N * program, ...) against the whole bank, by online softmax."""
        rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        columns = tl.arange(0, WIDTH)
        cells, inside = _cells(rows, columns, N, d)
        queries = tl.load(x + cells, inside, 0.0)              # (BLOCK_N, WIDTH)
        total = tl.zeros([BLOCK_N, WIDTH], tl.float32)         # sum of exp(logit - top) entry
        mass = tl.zeros([BLOCK_N], tl.float32)                # sum of exp(logit - top)
        top = tl.full([BLOCK_N], float("-inf"), tl.float32)   # largest logit so far
        for start in range(0, K, BLOCK_K):
            entries = start + tl.arange(0, BLOCK_K)
            bank_cells, real = _cells(entries, columns, K, d)
            tile = tl.load(bank + bank_cells, real, 0.0)        # (BLOCK_K, WIDTH)
            logits = tl.dot(queries, tl.trans(tile)) * scale    # (BLOCK_N, BLOCK_K)
            logits = tl.where(entries[None, :] < K, logits, float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, 1))
            shrink = tl.exp(top - new_top)
            p = tl.exp(logits - new_top[:, None])
            mass = mass * shrink + tl.sum(p, 1)
            total = tl.dot(p.to(tile.dtype), tile, total * shrink[:, None])
            top = new_top
        tl.store(out + cells, total / mass[:, None], inside)
        tl.store(lse + rows, top + tl.log(mass), rows < N)

    @triton.jit
    def _p_and_ds_kernel(
        x, bank, g, lse, delta, p, ds, n, K, d, scale,
        BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    ):
        """A tile of P = exp(scale x bank^T - lse) and of dS = P * (g bank^T - delta)."""
        rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        entries = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        logits = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        dp = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for start in range(0, d, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            cells, inside = _cells(rows, columns, n, d)
            bank_cells, real = _cells(entries, columns, K, d)
            tile = tl.trans(tl.load(bank + bank_cells, real, 0.0))  # (BLOCK_D, BLOCK_K)
            logits = tl.dot(tl.load(x + cells, inside, 0.0), tile, logits)
            dp = tl.dot(tl.load(g + cells, inside, 0.0), tile, dp)
        lse_rows = tl.load(lse + rows, rows < n, 0.0)[:, None]
        delta_rows = tl.load(delta + rows, rows < n, 0.0)[:, None]
        probability = tl.exp(logits * scale - lse_rows)
        cells, inside = _cells(rows, entries, n, K)
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
    return {
        "weight": weight,
        "perplexity": torch.special.entr(weight).sum().exp().item(),
        "perplexity_of_one": torch.special.entr(shares).sum(-1).exp().mean().item(),
        "dead": int((weight < 0.1 / len(weight)).sum()),
    }


@torch.no_grad()
def nearest_prompts(bank, embeddings, prompts, k=3):
    """Per entry of a KnowledgeBank the k prompts nearest to it by cosine: [(prompt, cosine), ...].

    embeddings (M, dim) are those of the M prompts.
    """
    entries = F.normalize(bank.weight, dim=-1)
    cosines = entries @ F.normalize(embeddings.to(entries), dim=-1).mT  # (size, M)
    nearest = []
    for values, indices in zip(*cosines.topk(min(k, len(prompts)))):
        names = [prompts[i] for i in indices]
        nearest.append([*zip(names, values.tolist())])
    return nearest


@torch.no_grad()
def kmeans(features, k, iterations=25, seed=0):
    """k-means centres (k, d) of features (M, d), M at least k, to start a bank from.

    k-means++ seeding (Arthur and Vassilvitskii 2007: each further centre is likely to be far from
    those before), then Lloyd's steps; a cluster that runs empty keeps its centre. The seed fixes
    all. (M, k) distances are held.
    """
    if features.ndim != 2 or len(features) < k:
        raise ValueError(
            f"k-means of {k} entries needs features (M, d) with M at least {k}, "
            f"got {tuple(features.shape)}"
        )
    features, generator = features.float(), torch.Generator().manual_seed(seed)
    weight, picks = torch.ones(len(features)), []
    for i in range(k):
        picks.append(torch.multinomial(weight, 1, generator=generator).item())
        squares = (features - features[picks[-1]]).square().sum(-1).cpu() + 1e-12
        weight = torch.minimum(weight, squares) if i else squares
    centres = features[picks]
    for _ in range(iterations):
        nearest = torch.cdist(features, centres).argmin(-1)
        counts = torch.bincount(nearest, minlength=k)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, features)
        centres = torch.where(counts > 0, sums / counts, centres)
    return centres
