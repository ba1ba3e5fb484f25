"""convert.py: the authors' checkpoint becomes a directory that loads and agrees with a plain
reading of their layout; nothing in it is run.
"""
import enum
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import nibabel
import numpy
import pytest
import torch
import torch.nn.functional as F

import evaluate
from convert import convert, main, run_command
from data import CT_RATE, write_csv
from model import BrgSA, train_tokenizer

ROOT = Path(__file__).parent.parent
SMALL = dict(width=128, depth=2, text_depth=5, vocabulary=90, positions=100, bank=12,
             patch=(4, 4, 2), side=3)
TEXTS = ["there is nodule", "there is no effusion"]
IMAGE, TEXT = "gloria.img_encoder.model", "gloria.text_encoder.model"


class Trap:
    """Unpickled, it makes a directory."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Outer:
    class Kind(enum.Enum):
        A = 1


class Settings(dict):
    """Stands for OmegaConf's classes: a container with a state of its own."""
    def __init__(self, **entries):
        super().__init__(entries)
        self.parent = self


def released(width, depth, text_depth, vocabulary, positions, bank, patch, side):
    """Random weights under the names of the released checkpoint."""
    shapes = {}

    def linear(name, n, m):
        shapes.update({f"{name}.weight": (n, m), f"{name}.bias": (n,)})

    def norm(name):
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    shapes[f"{IMAGE}.cls_token"] = 1, 1, width
    shapes[f"{IMAGE}.pos_embed"] = 1, 1 + side**3, width
    shapes[f"{IMAGE}.patch_embed.proj.weight"] = width, 1, *patch
    shapes[f"{IMAGE}.patch_embed.proj.bias"] = width,
    for i in range(depth):
        block = f"{IMAGE}.blocks.{i}"
        norm(f"{block}.norm1")
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2")
        linear(f"{block}.mlp.fc1", 4 * width, width)
        linear(f"{block}.mlp.fc2", width, 4 * width)
    norm(f"{IMAGE}.norm")
    linear("gloria.img_encoder.global_embedder", width, width)
    linear("gloria.img_encoder.local_embedder", width, width)

    for kind, n in (("word", vocabulary), ("position", positions), ("token_type", 2)):
        shapes[f"{TEXT}.embeddings.{kind}_embeddings.weight"] = n, width
    norm(f"{TEXT}.embeddings.LayerNorm")
    linear(f"{TEXT}.pooler.dense", width, width)
    for i in range(text_depth):
        layer = f"{TEXT}.encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            linear(f"{layer}.attention.{name}", width, width)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", 4 * width, width)
        linear(f"{layer}.output.dense", width, 4 * width)
        norm(f"{layer}.output.LayerNorm")
    linear("gloria.text_encoder.emb_global", width, width)
    linear("gloria.text_encoder.emb_local", width, width)
    shapes["gloria.dictionarylearning.dictionary.weight"] = bank, width

    generator, weights = torch.Generator().manual_seed(0), OrderedDict()
    for name, shape in shapes.items():
        # such that scores differ from case to case
        size, shift = (2 / width) ** 0.5, 0.0
        if len(shape) == 1:
            size, shift = 0.02, float("orm" in name and name.endswith("weight"))
        elif len(shape) > 2 or "embeddings" in name:
            size = 0.3
        weights[name] = torch.randn(shape, generator=generator) * size + shift
    return weights


@pytest.fixture
def files(tmp_path):
    """(checkpoint with objects that a plain unpickle would run, tokenizer's directory, output)."""
    train_tokenizer(TEXTS * 3, 90).save(str(tmp_path / "tokenizer.json"))
    trap = Settings(a=[Trap(tmp_path / "trapped")], b={1, 2})
    tied = torch.nn.Parameter(torch.ones(4))
    torch.save({
        "state_dict": released(**SMALL),
        "hyper_parameters": Settings(config=trap, kind=Outer.Kind.A, of=Outer.Kind),
        "epoch": 38,
        "optimizer_states": [{"state": {0: tied}, "callback": Settings}],
        "pytorch-lightning_version": "1.9.0",
    }, tmp_path / "official.ckpt")
    return tmp_path / "official.ckpt", tmp_path, tmp_path / "out"


# The authors' model once more, from REFERENCE's words and their checkpoint's names alone.

def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def embedded_volume(w, hu):
    """v (d,) of a preprocessed volume, HU (X, Y, Z)."""
    x = ((hu.float().clamp(-1000, 1000) / 1000 - 0.4978) / 0.2449)[None, None]
    kernel = w[f"{IMAGE}.patch_embed.proj.weight"]
    width, _, *patch = kernel.shape
    x = F.conv3d(x, kernel, w[f"{IMAGE}.patch_embed.proj.bias"], stride=patch)
    position, grid = w[f"{IMAGE}.pos_embed"], x.shape[2:]
    side = round((position.shape[1] - 1) ** (1 / 3))
    position, first = position[:, 1:], position[:, 0]
    position = position.mT.reshape(1, width, side, side, side)
    position = F.interpolate(position, grid, mode="trilinear").flatten(2).mT
    x = torch.cat([w[f"{IMAGE}.cls_token"][0] + first, (x.flatten(2).mT + position)[0]])
    depth = len({name.split(".")[4] for name in w if name.startswith(f"{IMAGE}.blocks.")})
    for i in range(depth):
        block = f"{IMAGE}.blocks.{i}"
        y = layer_norm(w, f"{block}.norm1", x, 1e-6)
        heads = []
        q, k, v = linear(w, f"{block}.attn.qkv", y).split(width, 1)
        for q, k, v in zip(q.split(64, 1), k.split(64, 1), v.split(64, 1)):
            heads.append((q @ k.T / 8).softmax(1) @ v)
        x = x + linear(w, f"{block}.attn.proj", torch.cat(heads, 1))
        y = layer_norm(w, f"{block}.norm2", x, 1e-6)
        x = x + linear(w, f"{block}.mlp.fc2", F.gelu(linear(w, f"{block}.mlp.fc1", y)))
    x = layer_norm(w, f"{IMAGE}.norm", x, 1e-5)[0]
    return linear(w, "gloria.img_encoder.global_embedder", x)


def layer_norm(w, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def embedded_texts(w, texts, tokenizer):
    """t (P, d) of cleaned texts, by transformers' BERT."""
    transformers = pytest.importorskip("transformers")
    names = {name.removeprefix(f"{TEXT}."): w[name] for name in w if name.startswith(f"{TEXT}.")}
    vocabulary, width = names["embeddings.word_embeddings.weight"].shape
    bert = transformers.BertModel(transformers.BertConfig(
        vocab_size=vocabulary, hidden_size=width, num_attention_heads=width // 64,
        num_hidden_layers=len({name.split(".")[2] for name in names if ".layer." in name}),
        intermediate_size=4 * width,
        max_position_embeddings=len(names["embeddings.position_embeddings.weight"]))).eval()
    bert.load_state_dict(names)
    rows = []
    for text in texts:
        encoding = tokenizer.encode(text)
        count = sum(encoding.attention_mask)
        layers = bert(torch.tensor([encoding.ids[:count]]), output_hidden_states=True).hidden_states
        rows.append(sum(layers[-4:])[0].sum(0) / 97)  # of 97 places, words and padding
    return linear(w, "gloria.text_encoder.emb_global", torch.stack(rows))


def authors_scores(w, volumes, texts, tokenizer):
    """Scores (N, P): mean of cos(v, t) and cos(v_hat, t)."""
    bank = w["gloria.dictionarylearning.dictionary.weight"]
    v = torch.stack([embedded_volume(w, hu) for hu in volumes])
    t = F.normalize(embedded_texts(w, texts, tokenizer), dim=1)
    v_hat = (v @ bank.T).softmax(1) @ bank
    return (F.normalize(v, dim=1) @ t.T + F.normalize(v_hat, dim=1) @ t.T) / 2


def test_the_released_checkpoint_converts_and_nothing_of_it_is_run(files):
    checkpoint, tokenizer, out = files
    _, left_out = convert(checkpoint, tokenizer, out)
    assert left_out == [] and not (tokenizer / "trapped").exists()
    torch.load(checkpoint, weights_only=False)
    assert (tokenizer / "trapped").exists()  # the trap was set
    model, w = BrgSA.from_pretrained(out), released(**SMALL)
    config = model.config
    assert config.crop == (12, 12, 6)
    assert (config.vit_depth, config.text_depth, config.bank_size) == (2, 5, 12)
    assert (config.text_pooling, config.text_cleaning) == ("padded", "authors")
    assert torch.equal(model.bank.weight, w["gloria.dictionarylearning.dictionary.weight"])
    generator = torch.Generator().manual_seed(1)
    hu = torch.randint(-1000, 1000, (1, 1, 12, 12, 6), generator=generator, dtype=torch.int16)
    with torch.no_grad():
        assert torch.allclose(model.encode_image(hu)[0], embedded_volume(w, hu[0, 0]), atol=1e-4)
        texts = embedded_texts(w, TEXTS, model.text.tokenizer)
        assert torch.allclose(model.encode_text(TEXTS), texts, atol=1e-4)


FULL = dict(width=768, depth=12, text_depth=12, vocabulary=30522, positions=512, bank=2048,
            patch=(16, 16, 8), side=14)


@pytest.mark.parametrize("sizes", [
    SMALL | {"patch": (32, 32, 16)}, pytest.param(FULL, marks=pytest.mark.slow)])
def test_evaluate_scores_by_a_converted_checkpoint_as_the_authors_model_does(tmp_path, sizes):
    """The whole way: their .ckpt -> convert.py; scans -> manifest -> evaluate.py -> scores.csv."""
    w, random = released(**sizes), numpy.random.default_rng(0)
    torch.save({"state_dict": w, "optimizer_states": [{"state": {0: torch.ones(9)}}]},
               tmp_path / "official.ckpt")
    words = " ".join(["there is", *CT_RATE])
    train_tokenizer([words], sizes["vocabulary"]).save(str(tmp_path / "tokenizer.json"))
    volumes, lines = [], [["name", "path", *(f"label:{name}" for name in CT_RATE)]]
    for i in range(2):  # already in their spacing and shape, with the patient's axes as LPS
        coarse = random.integers(-1200, 1400, (16, 16, 16)).astype(numpy.int16)
        hu = coarse.repeat(16, 0).repeat(16, 1).repeat(8, 2)
        affine = numpy.diag([-1.5, -1.5, 3, 1])
        nibabel.save(nibabel.Nifti1Image(hu, affine), tmp_path / f"{i}.nii.gz")
        volumes.append(torch.from_numpy(hu))
        lines.append([f"scan {i}", f"{i}.nii.gz", *[(i + c) % 2 for c in range(18)]])
    write_csv(tmp_path / "manifest.csv", lines)
    convert(tmp_path / "official.ckpt", tmp_path, tmp_path / "run")
    arguments = [tmp_path / "run", "--manifest", tmp_path / "manifest.csv",
                 "--benchmark", "ct-rate", "--device", "cpu", "--protocol", "authors"]
    assert evaluate.main(list(map(str, arguments))) == 0

    texts = [f"there is {name.lower()}" for name in CT_RATE]
    tokenizer = BrgSA.from_pretrained(tmp_path / "run").text.tokenizer
    with torch.no_grad():
        expected = authors_scores(w, volumes, texts, tokenizer)
    scores = evaluate.read_scores(tmp_path / "run" / "evaluation" / "scores.csv")
    scores = torch.tensor([[scores[f"scan {i}"][name] for name in CT_RATE] for i in range(2)])
    assert (scores - expected).abs().max() < 1e-4
    assert expected.std() > 1e-3  # so that the agreement says something


def test_tensors_without_a_place_are_named_and_half_precision_is_read(files):
    checkpoint, tokenizer, out = files
    weights = {name: value.half() for name, value in released(**SMALL).items()}
    torch.save({"state_dict": weights | {"gloria.surplus\nforged": torch.ones(0)}}, checkpoint)
    model, left_out = convert(checkpoint, tokenizer, out)
    assert left_out == ["gloria.surplus\nforged"] and model.bank.weight.dtype == torch.float32


def without(name):
    weights = released(**SMALL)
    del weights[f"gloria.{name}"]
    return {"state_dict": weights}


def replaced(name, value):
    return {"state_dict": released(**SMALL) | {f"gloria.{name}": value}}


UNREADABLE = "can't be read as a PyTorch Lightning checkpoint"
FOREIGN = "is not the authors' checkpoint"
LAYER_1 = "text_encoder.model.encoder.layer.1"


@pytest.mark.parametrize("content, message", [
    (b"no zip", UNREADABLE),
    ({"weights": {}}, UNREADABLE),
    ({"state_dict": {"encoder.weight": torch.ones(2)}}, "lacks 'patch_embed.proj.weight'"),
    (without(f"{LAYER_1}.output.dense.bias"), "encoder.layer.1.output.dense.bias"),
    (without("img_encoder.model.norm.bias"), "norm.bias"),
    (without("text_encoder.emb_global.bias"), "bias"),
    (replaced("img_encoder.model.pos_embed", torch.ones(1, 29, 128)), "pos_embed"),
    (replaced("img_encoder.model.pos_embed", torch.ones(29)), FOREIGN),
    (replaced("dictionarylearning.dictionary.weight", torch.tensor(1.0)), FOREIGN),
    (replaced("text_encoder.model.a\nforged", {}), UNREADABLE),
])
def test_a_foreign_or_damaged_checkpoint_is_one_line(files, monkeypatch, capsys, content, message):
    checkpoint, tokenizer, out = files
    if isinstance(content, bytes):
        checkpoint.write_bytes(content)
    else:
        torch.save(content, checkpoint)
    command = ["convert.py", "official", checkpoint, "--tokenizer", tokenizer, "--out", out]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    status, error = run_command(main), capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1
    assert str(checkpoint) in error and message in error
    assert not (out / "model.safetensors").exists()


def test_a_truncated_checkpoint_is_one_line_and_the_command_works(files):
    checkpoint, tokenizer, out = files
    command = [sys.executable, ROOT / "convert.py", "official", checkpoint]
    command += ["--tokenizer", tokenizer, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "weights" in done.stdout, done.stderr
    checkpoint.write_bytes(checkpoint.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=UNREADABLE):
        convert(checkpoint, tokenizer, out)
    checkpoint.unlink()
    with pytest.raises(ValueError, match="no such file"):
        convert(checkpoint, tokenizer, out)
