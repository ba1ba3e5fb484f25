"""convert.py: the authors' checkpoint becomes a directory that loads and agrees with their layout's
plain reading, and nothing in it is run."""

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
    g, shapes = torch.Generator().manual_seed(0), {}

    def linear(name, n, m):
        shapes.update({f"{name}.weight": (n, m), f"{name}.bias": (n,)})

    def norm(name):
        shapes.update({f"{name}.weight": (W,), f"{name}.bias": (W,)})

    image, text = "img_encoder.model", "text_encoder.model"
    shapes |= {
        f"{image}.cls_token": (1, 1, W),
        f"{image}.pos_embed": (1, 1 + 3**3, W),
        f"{image}.patch_embed.proj.weight": (W, 1, 4, 4, 2),
        f"{image}.patch_embed.proj.bias": (W,),
    }
    for i in range(depth):
        block = f"{image}.blocks.{i}"
        (
            norm(f"{block}.norm1"),
            linear(f"{block}.attn.qkv", 3 * W, W),
            linear(f"{block}.attn.proj", W, W),
        )
        (
            norm(f"{block}.norm2"),
            linear(f"{block}.mlp.fc1", 4 * W, W),
            linear(f"{block}.mlp.fc2", W, 4 * W),
        )
    (
        norm(f"{image}.norm"),
        linear("img_encoder.global_embedder", W, W),
        linear("img_encoder.local_embedder", W, W),
    )
    shapes |= {
        f"{text}.embeddings.{kind}_embeddings.weight": (n, W)
        for kind, n in (("word", VOCABULARY), ("position", POSITIONS), ("token_type", 2))
    }
    norm(f"{text}.embeddings.LayerNorm"), linear(f"{text}.pooler.dense", W, W)
    for i in range(text_depth):
        layer = f"{text}.encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            linear(f"{layer}.attention.{name}", W, W)
        (
            norm(f"{layer}.attention.output.LayerNorm"),
            linear(f"{layer}.intermediate.dense", 4 * W, W),
            linear(f"{layer}.output.dense", W, 4 * W),
            norm(f"{layer}.output.LayerNorm"),
        )
    linear("text_encoder.emb_global", W, W), linear("text_encoder.emb_local", W, W)
    shapes["dictionarylearning.dictionary.weight"] = (BANK, W)
    return OrderedDict(
        (f"gloria.{name}", torch.randn(shape, generator=g) * 0.1) for name, shape in shapes.items()
    )


@pytest.fixture
def files(tmp_path):
    """(checkpoint with objects that a plain unpickle would run, tokenizer's directory, output)."""
    train_tokenizer(TEXTS * 3, VOCABULARY).save(str(tmp_path / "tokenizer.json"))
    tied = torch.nn.Parameter(torch.ones(4))
    torch.save(
        {
            "state_dict": released(),
            "hyper_parameters": Settings(
                config=Settings(a=[Trap(tmp_path / "trapped")], b={1, 2}),
                kind=Outer.Kind.A,
                of=Outer.Kind,
            ),
            "epoch": 38,
            "optimizer_states": [{"state": {0: tied}, "callback": Settings}],
            "pytorch-lightning_version": "1.9.0",
        },
        tmp_path / "official.ckpt",
    )
    return tmp_path / "official.ckpt", tmp_path, tmp_path / "out"


def naive_image(w, volume):
    """The released vision encoder, read off its names."""

    def get(name):
        part = f"gloria.img_encoder.model.{name}"
        return w[f"{part}.weight"], w[f"{part}.bias"]

    x = F.conv3d(volume, *get("patch_embed.proj"), stride=(4, 4, 2)).flatten(2).mT[0]
    x = (
        torch.cat([w["gloria.img_encoder.model.cls_token"][0], x])
        + w["gloria.img_encoder.model.pos_embed"][0]
    )
    for i in range(2):
        heads = [
            F.linear(
                F.layer_norm(x, (W,), *get(f"blocks.{i}.norm1"), 1e-6), *get(f"blocks.{i}.attn.qkv")
            )
            .split(W, 1)[j]
            .split(64, 1)
            for j in range(3)
        ]
        y = torch.cat([(q @ k.T / 8).softmax(1) @ v for q, k, v in zip(*heads)], 1)
        x = x + F.linear(y, *get(f"blocks.{i}.attn.proj"))
        x = x + F.linear(
            F.gelu(
                F.linear(
                    F.layer_norm(x, (W,), *get(f"blocks.{i}.norm2"), 1e-6),
                    *get(f"blocks.{i}.mlp.fc1"),
                )
            ),
            *get(f"blocks.{i}.mlp.fc2"),
        )
    x = F.layer_norm(x, (W,), *get("norm"), 1e-5)[0]
    return F.linear(
        x,
        w["gloria.img_encoder.global_embedder.weight"],
        w["gloria.img_encoder.global_embedder.bias"],
    )


def test_the_released_checkpoint_converts_and_nothing_of_it_is_run(files):
    checkpoint, tokenizer, out = files
    _, left_out = convert(checkpoint, tokenizer, out)
    assert left_out == [] and not (tokenizer / "trapped").exists()
    torch.load(checkpoint, weights_only=False)
    assert (tokenizer / "trapped").exists()  # the trap was set
    model, w = BrgSA.from_pretrained(out), released()
    assert model.config.crop == (12, 12, 6) and (
        model.config.vit_depth,
        model.config.text_depth,
        model.config.bank_size,
    ) == (2, 5, BANK)
    assert torch.equal(model.bank.weight, w["gloria.dictionarylearning.dictionary.weight"])
    hu = torch.randint(
        -1000,
        1000,
        (1, 1, 12, 12, 6),
        generator=torch.Generator().manual_seed(1),
        dtype=torch.int16,
    )
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
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=W,
            num_hidden_layers=5,
            num_attention_heads=W // 64,
            intermediate_size=4 * W,
            max_position_embeddings=POSITIONS,
        )
    ).eval()
    bert.load_state_dict(
        {
            name.removeprefix("gloria.text_encoder.model."): value
            for name, value in w.items()
            if "text_encoder.model" in name
        }
    )
    rows = []
    for text in TEXTS:
        encoding = model.text.tokenizer.encode(text)
        ids = [i for i, real in zip(encoding.ids, encoding.attention_mask) if real]
        states = sum(bert(torch.tensor([ids]), output_hidden_states=True).hidden_states[-4:])[0]
        rows.append(
            states.sum(0)
            / sum(not model.text.tokenizer.id_to_token(i).startswith("##") for i in ids)
        )
    return F.linear(
        torch.stack(rows),
        w["gloria.text_encoder.emb_global.weight"],
        w["gloria.text_encoder.emb_global.bias"],
    )


def test_tensors_without_a_place_are_named_and_half_precision_is_read(files):
    checkpoint, tokenizer, out = files
    torch.save(
        {
            "state_dict": {
                **{name: value.half() for name, value in released().items()},
                "gloria.surplus\nforged": torch.ones(0),
            }
        },
        checkpoint,
    )
    model, left_out = convert(checkpoint, tokenizer, out)
    assert left_out == ["gloria.surplus\nforged"] and model.bank.weight.dtype == torch.float32


def without(name):
    weights = released()
    del weights[name]
    return weights


@pytest.mark.parametrize(
    "content, message",
    [
        (b"no zip", "can't be read as a PyTorch Lightning checkpoint"),
        ({"weights": {}}, "can't be read as a PyTorch Lightning checkpoint"),
        ({"state_dict": {"encoder.weight": torch.ones(2)}}, "lacks 'patch_embed.proj.weight'"),
        (
            {"state_dict": without("gloria.text_encoder.model.encoder.layer.1.output.dense.bias")},
            "encoder.layer.1.output.dense.bias",
        ),
        ({"state_dict": without("gloria.img_encoder.model.norm.bias")}, "norm.bias"),
        ({"state_dict": without("gloria.text_encoder.emb_global.bias")}, "bias"),
        (
            {
                "state_dict": released()
                | {"gloria.img_encoder.model.pos_embed": torch.ones(1, 29, W)}
            },
            "pos_embed",
        ),
        (
            {"state_dict": released() | {"gloria.img_encoder.model.pos_embed": torch.ones(29)}},
            "is not the authors' checkpoint",
        ),
        (
            {
                "state_dict": released()
                | {"gloria.dictionarylearning.dictionary.weight": torch.tensor(1.0)}
            },
            "is not the authors' checkpoint",
        ),
        (
            {"state_dict": released() | {"gloria.text_encoder.model.a\nforged": {}}},
            "can't be read as a PyTorch Lightning checkpoint",
        ),
    ],
)
def test_a_foreign_or_damaged_checkpoint_is_one_line(files, monkeypatch, capsys, content, message):
    checkpoint, tokenizer, out = files
    checkpoint.write_bytes(content) if isinstance(content, bytes) else torch.save(
        content, checkpoint
    )
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "convert.py",
            "official",
            str(checkpoint),
            "--tokenizer",
            str(tokenizer),
            "--out",
            str(out),
        ],
    )
    status, error = run_command(main), capsys.readouterr().err
    assert (
        status == 2
        and error.count("\n") == 1
        and str(checkpoint) in error
        and message in error
        and not (out / "model.safetensors").exists()
    )


def test_a_truncated_checkpoint_is_one_line_and_the_command_works(files):
    checkpoint, tokenizer, out = files
    command = [
        sys.executable,
        ROOT / "convert.py",
        "official",
        checkpoint,
        "--tokenizer",
        tokenizer,
        "--out",
        out,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "weights" in done.stdout, done.stderr
    checkpoint.write_bytes(checkpoint.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="can't be read as a PyTorch Lightning checkpoint"):
        convert(checkpoint, tokenizer, out)
    checkpoint.unlink()
    with pytest.raises(ValueError, match="no such file"):
        convert(checkpoint, tokenizer, out)
