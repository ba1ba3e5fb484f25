"""The promises of cmki.py, each held against the two-line reference in float64."""
import itertools
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import cmki

ROOT = Path(cmki.__file__).parent
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
CASES = [  # N, K, d
    (1, 37, 48), (63, 2048, 768), (65, 37, 1000), (65, 1, 32), (1, 2048, 192), (0, 37, 48),
    (1700, 1000, 32),
]


def sample(n, k, d, dtype=torch.float32, seed=0):
    """Inputs whose logits have unit variance: (x, bank, gradient of out)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    bank = torch.randn(k, d, generator=generator) * d ** -0.5
    g = torch.randn(n, d, generator=generator)
    return x.to(dtype), bank.to(dtype), g.to(dtype)


def out_and_gradients(attention, x, bank, g, scale):
    x, bank = x.detach().requires_grad_(), bank.detach().requires_grad_()
    out = attention(x, bank, scale)
    return [out.detach(), *torch.autograd.grad(out, (x, bank), g)]


def distances(x, bank, g, scale=1.0):
    """Relative distances of out, dx and dbank to the reference in float64.

    With a bank of one entry dx vanishes: there, relative to the size of the terms that cancel."""
    results = out_and_gradients(cmki.bank_attention, x, bank, g, scale)
    wide = x.double(), bank.double(), g.double()
    references = out_and_gradients(cmki.reference_attention, *wide, scale)
    floors = [1e-30, 1e-30, 1e-30]
    if len(bank) == 1:
        floors[1] += 1e-2 * abs(scale) * wide[2].norm() * wide[1].norm() ** 2
    for result, reference in zip(results, references):
        assert result.dtype == x.dtype and result.shape == reference.shape
    return [
        ((result.double() - reference).norm() / reference.norm().clamp_min(floor)).item()
        for result, reference, floor in zip(results, references, floors)
    ]


def run_python(script, **environment):
    """Run a script in a process of its own; its error fails the test."""
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


# ---- The attention is the reference, on any input ------------------------------------------------

@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_the_references(case, dtype):
    assert max(distances(*sample(*case, dtype))) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("unit", (False, True))
def test_large_logits_neither_overflow_nor_lose_digits(dtype, unit):
    """At scale 100, logits of hundreds (of up to 100 with unit vectors): rows from nearly one-hot
    to contested."""
    x, bank, g = sample(300, 500, 192, dtype)
    if unit:
        bank = F.normalize(bank.float(), dim=-1).to(dtype)
        x = F.normalize(bank[:300].float() + bank[200:].float(), dim=-1).to(dtype)
    assert max(distances(x, bank, g, 100.0)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_rows_beyond_the_kept_probabilities_are_recomputed(dtype, monkeypatch):
    monkeypatch.setattr(cmki, "KEPT_ENTRIES", dict.fromkeys((2, 4), 200 * 2048))
    monkeypatch.setattr(cmki, "CHUNK_ENTRIES", dict.fromkeys((2, 4), 64 * 2048))
    x, bank, g = sample(300, 2048, 48, dtype)
    x[250:260] *= 50  # large logits in a recomputed chunk and in a kept one, small ones elsewhere
    x[70:80] *= 50
    assert max(distances(x, bank, g)) < TOLERANCE[dtype]


def test_any_leading_shape_and_strides():
    x, bank, _ = sample(24, 37, 48)
    expected = cmki.bank_attention(x, bank)
    assert torch.equal(cmki.bank_attention(x.reshape(2, 3, 4, 48), bank).reshape(24, 48), expected)
    assert torch.equal(cmki.bank_attention(x[0], bank), cmki.bank_attention(x[:1], bank)[0])
    strided_x, strided_bank = x.T.contiguous().T, torch.stack([bank, bank], -1)[..., 0]
    assert not strided_x.is_contiguous() and not strided_bank.is_contiguous()
    torch.testing.assert_close(cmki.bank_attention(strided_x, strided_bank), expected)
    strided_x, strided_bank = strided_x.requires_grad_(), strided_bank.requires_grad_()
    cmki.bank_attention(strided_x, strided_bank).sum().backward()  # an expanded gradient
    ones = torch.ones(24, 48)
    _, dx, dbank = out_and_gradients(cmki.reference_attention, x, bank, ones, 1.0)
    torch.testing.assert_close(strided_x.grad, dx, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(strided_bank.grad, dbank, rtol=1e-4, atol=1e-5)
    assert cmki.bank_attention(torch.empty(2, 0, 48), bank).shape == (2, 0, 48)


@pytest.mark.parametrize("x, bank", [
    (torch.zeros(3, 8), torch.zeros(5, 9)),
    (torch.zeros(3, 8), torch.zeros(5, 8, dtype=torch.bfloat16)),
    (torch.zeros(3, 8), torch.zeros(8)),
    (torch.zeros(3, 8), torch.zeros(0, 8)),
    (torch.zeros(()), torch.zeros(5, 8)),
    (torch.zeros(3, 8).int(), torch.zeros(5, 8).int()),
    (torch.zeros(3, 8), torch.zeros(5, 8, device="meta")),
])
def test_what_does_not_match_is_refused_by_name(x, bank):
    with pytest.raises(ValueError, match="bank_attention takes x .* got x .* and a bank"):
        cmki.bank_attention(x, bank)


def test_a_nan_stays_in_its_row():
    x, bank, _ = sample(9, 37, 48)
    expected = cmki.bank_attention(x, bank)
    x[4] = torch.nan
    out = cmki.bank_attention(x, bank)
    others = torch.arange(9) != 4
    assert out[4].isnan().all() and torch.equal(out[others], expected[others])


# ---- torch takes it as one operator --------------------------------------------------------------

def test_gradients_pass_gradcheck_once_and_twice():
    x, bank, _ = sample(5, 7, 6, torch.float64)
    inputs = x.requires_grad_(), bank.requires_grad_(), 0.7
    assert torch.autograd.gradcheck(cmki.bank_attention, inputs)
    assert torch.autograd.gradgradcheck(cmki.bank_attention, inputs)


def test_a_frozen_side_gets_no_gradient_and_the_other_the_same():
    x, bank, g = sample(65, 37, 48)
    _, dx, dbank = out_and_gradients(cmki.bank_attention, x, bank, g, 1.0)
    only_x, only_bank = x.clone().requires_grad_(), bank.clone().requires_grad_()
    cmki.bank_attention(only_x, bank).backward(g)
    cmki.bank_attention(x, only_bank).backward(g)
    assert torch.equal(only_x.grad, dx) and torch.equal(only_bank.grad, dbank)
    assert bank.grad is None and x.grad is None


@pytest.mark.parametrize("factor", (1, 30))
def test_a_retained_graph_gives_the_same_gradients_again(factor):
    """With large logits, too, whose chunks are computed in a wider dtype."""
    x, bank, g = sample(65, 37, 48)
    x, bank = (factor * x).requires_grad_(), bank.requires_grad_()
    out = cmki.bank_attention(x, bank)
    once = torch.autograd.grad(out, (x, bank), g, retain_graph=True)
    again = torch.autograd.grad(out, (x, bank), g)
    assert all(map(torch.equal, once, again))


def test_torch_takes_it_as_one_well_formed_operator():
    x, bank, g = sample(65, 37, 48)
    operator = torch.ops.cmki.bank_attention.default
    torch.library.opcheck(operator, (x.requires_grad_(), bank.requires_grad_(), 1.0))
    torch._dynamo.reset()
    options = dict(backend="aot_eager", fullgraph=True, dynamic=True)
    compiled = torch.compile(cmki.bank_attention, **options)
    for n in (65, 30):
        expected = out_and_gradients(cmki.bank_attention, x[:n], bank, g[:n], 1.0)
        results = out_and_gradients(compiled, x[:n], bank, g[:n], 1.0)
        assert all(map(torch.equal, results, expected))


def test_autocast_casts_both_and_gradients_come_back_in_their_own_dtype():
    x, bank, g = sample(65, 37, 48)
    x *= 30  # large logits: inside, fp32 must stay fp32
    half = x.bfloat16(), bank.bfloat16()
    expected = cmki.bank_attention(*half)
    x.requires_grad_()
    bank.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = cmki.bank_attention(x, bank)
        assert torch.equal(out, expected)
        out.backward(g.bfloat16())
    assert x.grad.dtype == bank.grad.dtype == torch.float32
    wide = half[0].double(), half[1].double(), g.double()
    _, dx, dbank = out_and_gradients(cmki.reference_attention, *wide, 1.0)
    assert (x.grad - dx).norm() < 1e-2 * dx.norm()
    assert (bank.grad - dbank).norm() < 1e-2 * dbank.norm()


# ---- CUDA, as far as it shows without a card -----------------------------------------------------

def test_half_precision_that_always_goes_wider_keeps_the_digits(monkeypatch):
    """What CUDA does with chunks in half precision, on the CPU: no P is kept, all is in fp32."""
    monkeypatch.setattr(cmki, "WIDER", {("cpu", 2): (0, torch.float32)})
    monkeypatch.setattr(cmki, "KEPT_ENTRIES", dict.fromkeys((2, 4), 64 * 500))
    monkeypatch.setattr(cmki, "CHUNK_ENTRIES", dict.fromkeys((2, 4), 64 * 500))
    x, bank, g = sample(300, 500, 192, torch.bfloat16)
    for scale in (1.0, 100.0):
        assert max(distances(x, bank, g, scale)) < TOLERANCE[torch.bfloat16]
    _, _, kept = torch.ops.cmki.bank_attention(x, bank, 1.0)
    assert kept.shape == (0, 500)


def test_logits_of_half_precision_on_cuda_are_a_product_with_fp32_output():
    with FakeTensorMode():
        x = torch.empty(3, 8, dtype=torch.bfloat16, device="cuda")
        bank = torch.empty(5, 8, dtype=torch.bfloat16, device="cuda")
        out = torch.empty(3, 5, device="cuda")
        assert cmki._logits(x, bank, 2.0, out) is out


@pytest.mark.parametrize("n, d, dtype, device, expected", [
    (10976, 256, torch.bfloat16, "cuda", True),
    (8192, 16, torch.float16, "cuda", True),
    (10976, 272, torch.bfloat16, "cuda", False),
    (10976, 100, torch.bfloat16, "cuda", False),
    (64, 256, torch.bfloat16, "cuda", False),
    (10976, 256, torch.float32, "cuda", False),
    (10976, 256, torch.bfloat16, "cpu", False),
])
def test_the_kernels_are_for_many_narrow_rows_of_half_precision(n, d, dtype, device, expected):
    pytest.importorskip("triton")
    with FakeTensorMode():
        assert cmki._on_triton(torch.empty(n, d, dtype=dtype, device=device)) == expected


class Refusing:
    """A kernel that no card takes; it counts how often it is tried."""
    tries = 0

    def __getitem__(self, grid):
        self.tries += 1
        raise RuntimeError("out of resource: shared memory")


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_launch_that_the_card_refuses_falls_back_to_chunks_for_good(dtype, monkeypatch):
    pytest.importorskip("triton")
    kernel = Refusing()
    monkeypatch.setattr(cmki, "_on_triton", lambda x: x.dtype != torch.float64)
    monkeypatch.setattr(cmki, "_forward_kernel", kernel)
    monkeypatch.setattr(cmki, "_p_and_ds_kernel", kernel)
    monkeypatch.setattr(cmki, "_refused", set())
    x, bank, g = sample(65, 37, 48, dtype)
    with pytest.warns(UserWarning, match="without its Triton kernels .*shared memory"):
        assert max(distances(x, bank, g)) < TOLERANCE[dtype]
    with warnings.catch_warnings(action="error"):
        assert max(distances(x, bank, g)) < TOLERANCE[dtype]
    assert kernel.tries == 1 and cmki._refused == {(x.device, dtype, 48)}
    with pytest.warns(UserWarning, match="32"):  # another width is tried
        distances(*sample(65, 37, 32, dtype))


INTERPRETER = """
import sys
import numpy, torch, triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

def widened(a):  # the interpreter holds bf16 as uint16 and multiplies these bits as integers
    if a.dtype.scalar != tl.bfloat16:
        return a
    return TensorHandle((a.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

def dot(self, a, b, *rest):
    return plain_dot(self, widened(a), widened(b), *rest)

plain_dot, InterpreterBuilder.create_dot = InterpreterBuilder.create_dot, dot
sys.path[:0] = [".", "tests"]
import cmki
import test_cmki as t
cmki._on_triton = lambda x: x.dtype != torch.float64

def hold(dtype, case, scale=1.0):
    worst = max(t.distances(*t.sample(*case, dtype), scale))
    assert worst < t.TOLERANCE[dtype], (dtype, case, scale, worst)

"""


def needs_interpreter():
    triton = pytest.importorskip("triton")
    major, minor = map(int, triton.__version__.split(".")[:2])
    if (major, minor) < (3, 7):
        pytest.skip("triton's interpreter before 3.7 can't loop with NumPy 2.4")


def test_triton_kernels_are_the_reference_in_the_interpreter():
    """The same promises on small sizes, with remainders everywhere."""
    needs_interpreter()
    shapes = [
        (1, 37, 32), (63, 130, 48), (65, 1, 192), (65, 37, 40), (3, 100, 256), (130, 64, 64),
        (0, 37, 48),
    ]
    calls = [f"hold({dtype}, {case})" for dtype, case in itertools.product(TOLERANCE, shapes)]
    calls.append("hold(torch.bfloat16, (65, 130, 192), 100.0)")
    calls.append("assert not cmki._refused")
    run_python(INTERPRETER + "\n".join(calls), TRITON_INTERPRET="1")


def test_a_backward_pass_that_is_refused_follows_a_forward_pass_that_was_not():
    needs_interpreter()
    calls = """
cmki._p_and_ds_kernel = t.Refusing()
hold(torch.float32, (65, 37, 48))
assert cmki._p_and_ds_kernel.tries == 1 and len(cmki._refused) == 1
"""
    run_python(INTERPRETER + calls, TRITON_INTERPRET="1")


# Shared memory in KiB that one program can have.
CARDS = {"A100": (80, 163), "4090": (89, 99), "H100": (90, 227), "B200": (100, 227)}


def compile_offline(kernel, sizes, arch, half):
    """A kernel compiled for an architecture as a launch would do it; this takes no card."""
    import triton
    from triton.backends.compiler import GPUTarget
    fixed = dict.fromkeys(("N", "n", "K", "d"), "i32") | dict.fromkeys(("lse", "delta"), "*fp32")
    fixed |= dict.fromkeys(sizes, "constexpr") | {"scale": "fp32"}
    if kernel is cmki._forward_kernel:
        fixed["out"] = "*fp32"
    types = {name: fixed.get(name, f"*{half}") for name in kernel.arg_names}
    constants = {(i,): sizes[name] for i, name in enumerate(types) if name in sizes}
    # Pointers, K and d are multiples of 16 in use, and a launch compiles the kernel for that.
    hints = {}
    for i, (name, kind) in enumerate(types.items()):
        if kind.startswith("*") or name in ("K", "d"):
            hints[i,] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, types, constants, hints)
    options = {key: sizes[key] for key in ("num_warps", "num_stages")}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def bytes_spilled(ptx, arch, folder):
    """Bytes of registers that the assembler stores to memory and loads from there."""
    import triton
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    blackwell = arch >= 100 and (tools / "ptxas-blackwell").exists()
    assembler = tools / ("ptxas-blackwell" if blackwell else "ptxas")
    (folder / "kernel.ptx").write_text(ptx)
    name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    command = [assembler, "-v", "-arch", name, folder / "kernel.ptx", "-o", folder / "kernel.o"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stores_and_loads = re.findall(r"(\d+) bytes spill", report)
    assert len(stores_and_loads) == 2, report
    return sum(map(int, stores_and_loads))


def holds_offline(kernel, sizes, card, folder, half="bf16"):
    arch, shared = CARDS[card]
    binary = compile_offline(kernel, sizes, arch, half)
    assert binary.metadata.shared <= shared << 10
    tensor_memory = getattr(binary.metadata, "tmem_size", None) or 0  # Blackwell's, in columns
    assert tensor_memory <= 512
    assert bytes_spilled(binary.asm["ptx"], arch, folder) == 0


@pytest.mark.parametrize("card", CARDS)
def test_both_kernels_compile_fit_and_spill_nothing(card, tmp_path):
    pytest.importorskip("triton")
    holds_offline(cmki._p_and_ds_kernel, cmki.BACKWARD_BLOCKS, card, tmp_path)
    for d in (64, 128, 256):
        holds_offline(cmki._forward_kernel, cmki._forward_blocks(d), card, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("half", ("bf16", "fp16"))
@pytest.mark.parametrize("card", CARDS)
def test_both_kernels_compile_fit_and_spill_nothing_at_any_width(card, half, tmp_path):
    pytest.importorskip("triton")
    holds_offline(cmki._p_and_ds_kernel, cmki.BACKWARD_BLOCKS, card, tmp_path, half)
    for d in range(16, 257, 16):
        holds_offline(cmki._forward_kernel, cmki._forward_blocks(d), card, tmp_path, half)


# ---- The bank, k-means, the losses ---------------------------------------------------------------

@pytest.mark.parametrize("init", ("orthogonal", "gaussian", "xavier", "uniform"))
def test_every_initialisation_gives_finite_entries_of_its_kind(init):
    torch.manual_seed(0)
    weight = cmki.KnowledgeBank(96, 64, init).weight.detach()
    assert weight.shape == (96, 64) and weight.isfinite().all()
    if init == "orthogonal":
        torch.testing.assert_close(weight.T @ weight, torch.eye(64), atol=1e-4, rtol=0)
    elif init != "xavier":
        assert 0.8 < weight.norm(dim=-1).mean() < 1.2
    assert (weight.abs().max() < 0.3) == (init in ("xavier", "uniform"))


def test_a_bank_takes_given_entries_and_can_be_frozen():
    entries = torch.randn(5, 8)
    bank = cmki.KnowledgeBank(5, 8, entries, frozen=True)
    assert torch.equal(bank.weight, entries) and not bank.weight.requires_grad
    assert [*bank.state_dict()] == ["weight"]
    with pytest.raises(ValueError, match=r"\(5, 8\).*\(4, 8\)"):
        bank.reset(entries[:4])
    with pytest.raises(ValueError, match="not 'zeros'"):
        cmki.KnowledgeBank(5, 8, "zeros")


def test_usage_and_prompts_show_what_an_input_draws():
    bank = cmki.KnowledgeBank(4, 4, 10 * torch.eye(4))
    usage = cmki.bank_usage(bank, torch.eye(4)[[0, 0, 1, 1]] * 3)
    assert usage["perplexity"] == pytest.approx(2, abs=1e-3)
    assert usage["perplexity_of_one"] == pytest.approx(1, abs=1e-3) and usage["dead"] == 2
    torch.testing.assert_close(usage["weight"], torch.tensor([0.5, 0.5, 0, 0]), atol=1e-6, rtol=0)
    embeddings = torch.eye(4)[[3, 1, 0, 2]] + 0.1
    nearest = cmki.nearest_prompts(bank, embeddings, ["d", "b", "a", "c"], k=2)
    assert [entry[0][0] for entry in nearest] == ["a", "b", "c", "d"]
    assert all(entry[0][1] > entry[1][1] for entry in nearest)


def test_kmeans_finds_clusters_repeats_itself_and_survives_repeated_features():
    generator = torch.Generator().manual_seed(1)
    truth = 10 * torch.randn(6, 16, generator=generator)
    noise = 0.1 * torch.randn(6, 50, 16, generator=generator)
    features = (truth[:, None] + noise).reshape(-1, 16)
    centres = cmki.kmeans(features, 6)
    assert torch.cdist(truth, centres).min(-1).values.max() < 0.2
    assert torch.equal(centres, cmki.kmeans(features, 6))
    assert cmki.kmeans(torch.ones(9, 4), 5).isfinite().all()
    with pytest.raises(ValueError, match="at least 301"):
        cmki.kmeans(features, 301)


def test_losses_are_the_papers_and_every_part_is_returned():
    generator = torch.Generator().manual_seed(0)
    v, t, v_hat, t_hat = torch.randn(4, 6, 8, generator=generator)
    total, parts = cmki.alignment_loss(v, t, v_hat, t_hat)
    a, b = F.normalize(v, dim=-1).double(), F.normalize(t, dim=-1).double()
    info_nce = 0.0
    for i in range(6):
        pair = torch.exp(10 * a[i] @ b[i])
        info_nce -= torch.log(pair / torch.exp(10 * b @ a[i]).sum()) / 12
        info_nce -= torch.log(pair / torch.exp(10 * a @ b[i]).sum()) / 12
    mse = ((v_hat - v) ** 2).mean() + ((t_hat - t) ** 2).mean()
    # half of the authors' loss: 0.5 mse + the sum of both directions of either InfoNCE
    weighted = (0.5 * mse + 2 * parts["info_nce"] + 2 * parts["info_nce_hat"]) / 2
    assert parts["info_nce"].item() == pytest.approx(info_nce.item(), rel=1e-5)
    assert parts["mse"].item() == pytest.approx(mse.item(), rel=1e-6)
    assert total.item() == pytest.approx(weighted.item(), rel=1e-6)
    scale = torch.tensor(10.0, requires_grad=True)
    cmki.info_nce(v, t, scale).backward()
    assert scale.grad != 0
    with pytest.raises(ValueError, match="one shape"):
        cmki.info_nce(v, t[:5])
