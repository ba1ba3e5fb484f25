"""The promises of cmki.py, each held against the two-line reference in float64."""
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import cmki

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
CASES = [(1, 37, 48), (63, 2048, 768), (65, 37, 1000), (65, 1, 32), (1, 2048, 192), (0, 37, 48), (1700, 1000, 32)]


def sample(n, k, d, dtype=torch.float32, seed=0):
    """Inputs whose logits have unit variance: (x, bank, gradient of out)."""
    generator = torch.Generator().manual_seed(seed)
    x, bank, g = torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator) * d ** -0.5, torch.randn(n, d, generator=generator)
    return x.to(dtype), bank.to(dtype), g.to(dtype)


def out_and_gradients(attention, x, bank, g, scale):
    x, bank = x.detach().requires_grad_(), bank.detach().requires_grad_()
    out = attention(x, bank, scale)
    return [out.detach(), *torch.autograd.grad(out, (x, bank), g)]


def distances(x, bank, g, scale=1.0):
    """Relative distance of out, dx, dbank to the reference in float64; for a vanishing gradient, relative to what its terms measure."""
    ours = out_and_gradients(cmki.bank_attention, x, bank, g, scale)
    reference = out_and_gradients(cmki.reference_attention, x.double(), bank.double(), g.double(), scale)
    floor = [1e-30, 1e-2 * abs(scale) * g.double().norm() * bank.double().norm() ** 2 / len(bank) * (len(bank) == 1) + 1e-30, 1e-30]
    assert all(a.dtype == x.dtype and a.shape == b.shape for a, b in zip(ours, reference))
    return [((a.double() - b).norm() / b.norm().clamp_min(f)).item() for a, b, f in zip(ours, reference, floor)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_the_references(case, dtype):
    assert max(distances(*sample(*case, dtype))) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("unit", (False, True))
def test_large_logits_neither_overflow_nor_lose_digits(dtype, unit):
    """At scale 100, logits of hundreds (and of up to 100, unit vectors): rows from nearly one-hot to contested."""
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
    x[250:260] *= 50  # large logits in a recomputed tile and in a kept one, small ones elsewhere
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
    reference = out_and_gradients(cmki.reference_attention, x, bank, torch.ones(24, 48), 1.0)
    torch.testing.assert_close([strided_x.grad, strided_bank.grad], reference[1:], rtol=1e-4, atol=1e-5)
    assert cmki.bank_attention(torch.empty(2, 0, 48), bank).shape == (2, 0, 48)


@pytest.mark.parametrize("x, bank", [
    (torch.zeros(3, 8), torch.zeros(5, 9)), (torch.zeros(3, 8), torch.zeros(5, 8, dtype=torch.bfloat16)), (torch.zeros(3, 8), torch.zeros(8)),
    (torch.zeros(3, 8), torch.zeros(0, 8)), (torch.zeros(()), torch.zeros(5, 8)), (torch.zeros(3, 8).int(), torch.zeros(5, 8).int()),
    (torch.zeros(3, 8), torch.zeros(5, 8, device="meta"))])
def test_what_does_not_match_is_refused_by_name(x, bank):
    with pytest.raises(ValueError, match="bank_attention takes x .* got x .* and a bank"):
        cmki.bank_attention(x, bank)


def test_gradients_pass_gradcheck_once_and_twice():
    x, bank, _ = (a.requires_grad_() for a in sample(5, 7, 6, torch.float64))
    attend = lambda x, bank: cmki.bank_attention(x, bank, 0.7)
    assert torch.autograd.gradcheck(attend, (x, bank)) and torch.autograd.gradgradcheck(attend, (x, bank))


def test_a_frozen_side_gets_no_gradient_and_the_other_the_same():
    x, bank, g = sample(65, 37, 48)
    _, dx, dbank = out_and_gradients(cmki.bank_attention, x, bank, g, 1.0)
    only_x, only_bank = x.clone().requires_grad_(), bank.clone().requires_grad_()
    cmki.bank_attention(only_x, bank).backward(g)
    cmki.bank_attention(x, only_bank).backward(g)
    assert torch.equal(only_x.grad, dx) and torch.equal(only_bank.grad, dbank) and bank.grad is None and x.grad is None


def test_torch_takes_it_as_one_well_formed_operator():
    x, bank, g = sample(65, 37, 48)
    torch.library.opcheck(torch.ops.cmki.bank_attention.default, (x.requires_grad_(), bank.requires_grad_(), 1.0, True))
    torch._dynamo.reset()
    compiled = torch.compile(cmki.bank_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (65, 30):
        expected = out_and_gradients(cmki.bank_attention, x[:n], bank, g[:n], 1.0)
        assert all(map(torch.equal, out_and_gradients(compiled, x[:n], bank, g[:n], 1.0), expected))


def test_autocast_casts_both_and_gradients_come_back_in_their_own_dtype():
    x, bank, g = sample(65, 37, 48)
    x *= 30  # large logits: inside, fp32 must stay fp32
    half = cmki.bank_attention(x.bfloat16(), bank.bfloat16())
    x.requires_grad_(), bank.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = cmki.bank_attention(x, bank)
        assert torch.equal(out, half)
        out.backward(g.bfloat16())
    assert x.grad.dtype == bank.grad.dtype == torch.float32
    reference = out_and_gradients(cmki.reference_attention, x.bfloat16().double(), bank.bfloat16().double(), g.double(), 1.0)
    assert (x.grad - reference[1]).norm() < 1e-2 * reference[1].norm() and (bank.grad - reference[2]).norm() < 1e-2 * reference[2].norm()


def test_a_nan_stays_in_its_row():
    x, bank, _ = sample(9, 37, 48)
    expected = cmki.bank_attention(x, bank)
    x[4] = torch.nan
    out = cmki.bank_attention(x, bank)
    assert out[4].isnan().all() and torch.equal(out[torch.arange(9) != 4], expected[torch.arange(9) != 4])


TRITON = """
import sys, numpy, torch, triton.language as tl, cmki
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

def widened(a):  # the interpreter holds bf16 as uint16 and multiplies these bits as integers
    return TensorHandle((a.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32) if a.dtype.scalar == tl.bfloat16 else a

plain_dot = InterpreterBuilder.create_dot
InterpreterBuilder.create_dot = lambda self, a, b, *rest: plain_dot(self, widened(a), widened(b), *rest)
sys.path.insert(0, "tests")
import test_cmki as t
cmki._multiprocessors = lambda device: multiprocessors
cmki._on_triton = lambda x: x.dtype != torch.float64
for multiprocessors, dtype, case, scale in cases:
    x, bank, g = t.sample(*case, dtype)
    worst = max(t.distances(x, bank, g, scale))
    assert worst < t.TOLERANCE[dtype], (multiprocessors, dtype, case, scale, worst)
"""


def test_triton_kernels_are_the_reference_in_the_interpreter():
    """The same promises on small sizes: remainders everywhere, the bank whole and split."""
    triton = pytest.importorskip("triton")
    shapes = [(1, 37, 32), (63, 130, 48), (65, 1, 192), (65, 37, 40), (3, 100, 256), (130, 64, 64), (0, 37, 48)]
    kinds = itertools.product((torch.float32, torch.bfloat16, torch.float16), shapes)
    cases = [(many, dtype, case, 1.0) for (dtype, case), many in zip(kinds, itertools.cycle([1, 16, 16]))]
    if triton.__version__ >= "3.7":  # 3.6 loses digits of bf16 here
        cases += [(many, torch.bfloat16, (65, 130, 192), 100.0) for many in (1, 16)]
    run = subprocess.run([sys.executable, "-c", "import torch\ncases = " + repr(cases) + TRITON], cwd=Path(cmki.__file__).parent,
                         env={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


REFUSED = """
import sys, torch, cmki
sys.path.insert(0, "tests")
import test_cmki as t
cmki._multiprocessors = lambda device: 16
cmki._on_triton = lambda x: x.dtype != torch.float64
x, bank, g = t.sample(65, 37, 48)
class Refusing:
    def __getitem__(self, grid):
        raise RuntimeError("out of resource: shared memory")
forward = cmki._forward_kernel
cmki._p_and_ds_kernel = Refusing()
for cmki._forward_kernel in refusing:
    cmki._refused.clear()
    assert max(t.distances(x, bank, g)) < t.TOLERANCE[x.dtype]
    assert cmki._refused == {x.device}
    assert max(t.distances(x, bank, g)) < t.TOLERANCE[x.dtype]
"""


def test_a_launch_that_the_card_refuses_falls_back_to_torch():
    """Refused at once, and after a forward pass that the kernel did."""
    pytest.importorskip("triton")
    script = REFUSED.replace("in refusing", "in (forward, Refusing())")
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    run = subprocess.run([sys.executable, "-c", script], cwd=Path(cmki.__file__).parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227}  # KiB that one program can have: A100, 4090, H100, B200
FORWARD = ("*bf16", "*bf16", "*fp32", "*fp32", "i32", "i32", "i32", "fp32", "i32")
BACKWARD = ("*bf16", "*bf16", "*bf16", "*fp32", "*fp32", "*bf16", "*bf16", "i32", "i32", "i32", "fp32")


def compiled_offline(kernel, signature, constants, arch, folder):
    """(metadata, bytes spilled) of a kernel compiled for an architecture without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    names = kernel.arg_names
    types = dict(zip(names, signature)) | dict.fromkeys(constants, "constexpr")
    # Pointers, and d and K, are multiples of 16 in use; so specialised is what is launched.
    aligned = [i for i, name in enumerate(names) if types[name][0] == "*" or name in ("d", "K")]
    source = triton.compiler.ASTSource(
        kernel, types, {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = dict(cmki.LAUNCH)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    (folder / "kernel.ptx").write_text(binary.asm["ptx"])
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptxas = tools / ("ptxas-blackwell" if arch >= 100 and (tools / "ptxas-blackwell").exists() else "ptxas")
    name = f"sm_{arch}{'a' if arch >= 90 else ''}"
    command = [ptxas, "-v", f"--gpu-name={name}", folder / "kernel.ptx", "-o", folder / "kernel.o"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return binary.metadata, sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_the_kernels_compile_for_real_cards_fit_them_and_spill_nothing(arch, tmp_path):
    pytest.importorskip("triton")
    jobs = [(cmki._p_and_ds_kernel, BACKWARD, cmki.BACKWARD_BLOCKS)]
    jobs += [(cmki._forward_kernel, FORWARD, cmki.FORWARD_BLOCKS | {"WIDTH": d}) for d in (64, 128, 256)]
    for kernel, signature, constants in jobs:
        metadata, spilled = compiled_offline(kernel, signature, constants, arch, tmp_path)
        assert spilled == 0
        assert metadata.shared <= SHARED_MEMORY[arch] << 10
        assert (getattr(metadata, "tmem_size", None) or 0) <= 512


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
    assert torch.equal(bank.weight, entries) and not bank.weight.requires_grad and [*bank.state_dict()] == ["weight"]
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
    nearest = cmki.nearest_prompts(bank, torch.eye(4)[[3, 1, 0, 2]] + 0.1, ["d", "b", "a", "c"], k=2)
    assert [entry[0][0] for entry in nearest] == ["a", "b", "c", "d"]
    assert all(entry[0][1] > entry[1][1] for entry in nearest)


def test_kmeans_finds_clusters_repeats_itself_and_survives_repeated_features():
    generator = torch.Generator().manual_seed(1)
    truth = 10 * torch.randn(6, 16, generator=generator)
    features = (truth[:, None] + 0.1 * torch.randn(6, 50, 16, generator=generator)).reshape(-1, 16)
    centres = cmki.kmeans(features, 6)
    assert torch.cdist(truth, centres).min(-1).values.max() < 0.2 and torch.equal(centres, cmki.kmeans(features, 6))
    assert cmki.kmeans(torch.ones(9, 4), 5).isfinite().all()
    with pytest.raises(ValueError, match="at least 301"):
        cmki.kmeans(features, 301)


def test_losses_are_the_papers_and_every_part_is_returned():
    generator = torch.Generator().manual_seed(0)
    v, t, v_hat, t_hat = torch.randn(4, 6, 8, generator=generator)
    total, parts = cmki.alignment_loss(v, t, v_hat, t_hat)
    a, b = F.normalize(v, dim=-1).double(), F.normalize(t, dim=-1).double()
    by_hand = 0.0
    for i in range(6):
        by_hand -= torch.log(torch.exp(10 * a[i] @ b[i]) / torch.exp(10 * b @ a[i]).sum()) / 12
        by_hand -= torch.log(torch.exp(10 * a[i] @ b[i]) / torch.exp(10 * a @ b[i]).sum()) / 12
    assert parts["info_nce"].item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert parts["mse"].item() == pytest.approx((((v_hat - v) ** 2).mean() + ((t_hat - t) ** 2).mean()).item(), rel=1e-6)
    assert total.item() == pytest.approx((0.5 * parts["mse"] + parts["info_nce"] + parts["info_nce_hat"]).item(), rel=1e-6)
    scale = torch.tensor(10.0, requires_grad=True)
    cmki.info_nce(v, t, scale).backward()
    assert scale.grad != 0
    with pytest.raises(ValueError, match="one shape"):
        cmki.info_nce(v, t[:5])
