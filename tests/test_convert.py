"""convert.py: the authors' checkpoint becomes a directory that loads and agrees with a plain
reading of their layout; nothing in it is run.
"""
import enum
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from convert import convert, main, run_command
from model import BrgSA, train_tokenizer

ROOT = Path(__file__).parent.parent
W, VOCABULARY, POSITIONS, BANK = 128, 90, 20, 12
TEXTS = ["there is nodule", "effusion"]
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


def released(depth=2, text_depth=5):
    """Random weights under the names of the released checkpoint."""
    shapes = {}

    def linear(name, n, m):
        shapes.update({f"{name}.weight": (n, m), f"{name}.bias": (n,)})

    def norm(name):
        shapes.update({f"{name}.weight": (W,), f"{name}.bias": (W,)})

    shapes[f"{IMAGE}.cls_token"] = 1, 1, W
    shapes[f"{IMAGE}.pos_embed"] = 1, 1 + 3**3, W
    shapes[f"{IMAGE}.patch_embed.proj.weight"] = W, 1, 4, 4, 2
    shapes[f"{IMAGE}.patch_embed.proj.bias"] = W,
    for i in range(depth):
        block = f"{IMAGE}.blocks.{i}"
        norm(f"{block}.norm1")
        linear(f"{block}.attn.qkv", 3 * W, W)
        linear(f"{block}.attn.proj", W, W)
        norm(f"{block}.norm2")
        linear(f"{block}.mlp.fc1", 4 * W, W)
        linear(f"{block}.mlp.fc2", W, 4 * W)
    norm(f"{IMAGE}.norm")
    linear("gloria.img_encoder.global_embedder", W, W)
    linear("gloria.img_encoder.local_embedder", W, W)

    for kind, n in (("word", VOCABULARY), ("position", POSITIONS), ("token_type", 2)):
        shapes[f"{TEXT}.embeddings.{kind}_embeddings.weight"] = n, W
    norm(f"{TEXT}.embeddings.LayerNorm")
    linear(f"{TEXT}.pooler.dense", W, W)
    for i in range(text_depth):
        layer = f"{TEXT}.encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            linear(f"{layer}.attention.{name}", W, W)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", 4 * W, W)
        linear(f"{layer}.output.dense", W, 4 * W)
        norm(f"{layer}.output.LayerNorm")
    linear("gloria.text_encoder.emb_global", W, W)
    linear("gloria.text_encoder.emb_local", W, W)
    shapes["gloria.dictionarylearning.dictionary.weight"] = BANK, W

    generator, weights = torch.Generator().manual_seed(0), OrderedDict()
    for name, shape in shapes.items():
        weights[name] = torch.randn(shape, generator=generator) * 0.1
    return weights


@pytest.fixture
def files(tmp_path):
    """(checkpoint with objects that a plain unpickle would run, tokenizer's directory, output)."""
    train_tokenizer(TEXTS * 3, VOCABULARY).save(str(tmp_path / "tokenizer.json"))
    trap = Settings(a=[Trap(tmp_path / "trapped")], b={1, 2})
    tied = torch.nn.Parameter(torch.ones(4))
    torch.save({
        "state_dict": released(),
        "hyper_parameters": Settings(config=trap, kind=Outer.Kind.A, of=Outer.Kind),
        "epoch": 38,
        "optimizer_states": [{"state": {0: tied}, "callback": Settings}],
        "pytorch-lightning_version": "1.9.0",
    }, tmp_path / "official.ckpt")
    return tmp_path / "official.ckpt", tmp_path, tmp_path / "out"


def naive_image(w, volume):
    """The released vision encoder, read off its names."""
    def get(name):
        return w[f"{IMAGE}.{name}.weight"], w[f"{IMAGE}.{name}.bias"]

    x = F.conv3d(volume, *get("patch_embed.proj"), stride=(4, 4, 2)).flatten(2).mT[0]
    x = torch.cat([w[f"{IMAGE}.cls_token"][0], x]) + w[f"{IMAGE}.pos_embed"][0]
    for i in range(2):
        y = F.layer_norm(x, (W,), *get(f"blocks.{i}.norm1"), 1e-6)
        q, k, v = F.linear(y, *get(f"blocks.{i}.attn.qkv")).split(W, 1)
        heads = []
        for q, k, v in zip(q.split(64, 1), k.split(64, 1), v.split(64, 1)):
            heads.append((q @ k.T / 8).softmax(1) @ v)
        x = x + F.linear(torch.cat(heads, 1), *get(f"blocks.{i}.attn.proj"))
        y = F.layer_norm(x, (W,), *get(f"blocks.{i}.norm2"), 1e-6)
        y = F.gelu(F.linear(y, *get(f"blocks.{i}.mlp.fc1")))
        x = x + F.linear(y, *get(f"blocks.{i}.mlp.fc2"))
    x = F.layer_norm(x, (W,), *get("norm"), 1e-5)[0]
    projection = "gloria.img_encoder.global_embedder"
    return F.linear(x, w[f"{projection}.weight"], w[f"{projection}.bias"])


def test_the_released_checkpoint_converts_and_nothing_of_it_is_run(files):
    checkpoint, tokenizer, out = files
    _, left_out = convert(checkpoint, tokenizer, out)
    assert left_out == [] and not (tokenizer / "trapped").exists()
    torch.load(checkpoint, weights_only=False)
    assert (tokenizer / "trapped").exists()  # the trap was set
    model, w = BrgSA.from_pretrained(out), released()
    config = model.config
    assert config.crop == (12, 12, 6)
    assert (config.vit_depth, config.text_depth, config.bank_size) == (2, 5, BANK)
    assert torch.equal(model.bank.weight, w["gloria.dictionarylearning.dictionary.weight"])
    generator = torch.Generator().manual_seed(1)
    hu = torch.randint(-1000, 1000, (1, 1, 12, 12, 6), generator=generator, dtype=torch.int16)
    normalised = (hu.float() / 1000 - 0.4978) / 0.2449
    with torch.no_grad():
        assert torch.allclose(model.encode_image(hu)[0], naive_image(w, normalised), atol=1e-4)


def test_converted_texts_embed_as_transformers_says(files):
    checkpoint, tokenizer, out = files
    model, w = convert(checkpoint, tokenizer, out)[0], released()
    with torch.no_grad():
        assert torch.allclose(model.encode_text(TEXTS), text_of_transformers(model, w), atol=1e-4)


def text_of_transformers(model, w):
    """Sum of BERT's last four layers, a word's pieces summed, mean over words, by transformers."""
    transformers = pytest.importorskip("transformers")
    bert = transformers.BertModel(transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=W, num_hidden_layers=5, num_attention_heads=W // 64,
        intermediate_size=4 * W, max_position_embeddings=POSITIONS)).eval()
    names = [name for name in w if name.startswith(TEXT)]
    bert.load_state_dict({name.removeprefix(f"{TEXT}."): w[name] for name in names})
    rows = []
    for text in TEXTS:
        encoding = model.text.tokenizer.encode(text)
        ids = [i for i, real in zip(encoding.ids, encoding.attention_mask) if real]
        pieces = [model.text.tokenizer.id_to_token(i) for i in ids]
        n_words = sum(not piece.startswith("##") for piece in pieces)
        layers = bert(torch.tensor([ids]), output_hidden_states=True).hidden_states[-4:]
        rows.append(sum(layers)[0].sum(0) / n_words)
    projection = "gloria.text_encoder.emb_global"
    return F.linear(torch.stack(rows), w[f"{projection}.weight"], w[f"{projection}.bias"])


def test_tensors_without_a_place_are_named_and_half_precision_is_read(files):
    checkpoint, tokenizer, out = files
    weights = {name: value.half() for name, value in released().items()}
    torch.save({"state_dict": weights | {"gloria.surplus\nforged": torch.ones(0)}}, checkpoint)
    model, left_out = convert(checkpoint, tokenizer, out)
    assert left_out == ["gloria.surplus\nforged"] and model.bank.weight.dtype == torch.float32


def without(name):
    weights = released()
    del weights[f"gloria.{name}"]
    return {"state_dict": weights}


def replaced(name, value):
    return {"state_dict": released() | {f"gloria.{name}": value}}


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
    (replaced("img_encoder.model.pos_embed", torch.ones(1, 29, W)), "pos_embed"),
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
