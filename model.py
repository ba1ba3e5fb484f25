"""BrgSA (arXiv 2501.03565): a 3D vision encoder and a text encoder, bridged by a shared bank.

    v = projection(vision(volume))      v_hat = softmax(v D^T) D      D: the bank, cmki.py
    t = projection(text(prompt))        t_hat = softmax(t D^T) D
    zero-shot score of a volume and a prompt = (cos(v, t) + cos(v_hat, t)) / 2

Example:

    import torch
    from model import BrgSA, zero_shot_scores

    model = BrgSA.from_pretrained("runs/phantom")                          # by `python train.py`
    volumes = torch.randint(-1000, 1000, (2, 1, *model.config.shape))      # HU, (B, 1, X, Y, Z)
    prompts = ["There is pleural effusion", "There is lung nodule"]
    with torch.inference_mode():
        v = model.encode_image(volumes)                                    # (B, dim)
        t = model.encode_text(prompts)                                     # (P, dim)
        scores = zero_shot_scores(v, model.bridge(v), t, model.bridge(t))  # (B, P)
    assert scores.shape == (2, 2)
"""
import json
import math
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn

from cmki import KnowledgeBank, bank_usage, nearest_prompts  # noqa: F401, for evaluate.py


@dataclass
class Config:
    """All that the model is made from; the defaults are the authors' (preset `base`).

    Sizes are (x, y, z).
    """
    spacing: tuple = (1.5, 1.5, 3.0)    # mm, of the preprocessed volume
    shape: tuple = (256, 256, 128)      # voxels, of the preprocessed volume
    crop: tuple = (224, 224, 112)       # voxels, of a training crop
    hu_range: tuple = (-1000, 1000)     # HU are clipped to it and mapped to [-1, 1]
    mean: float = 0.4978                # then normalised
    std: float = 0.2449
    windows: tuple = ()                 # else each (low, high) HU is a channel, mapped to [-1, 1]
    vision: str = "vit"                 # vit, resnet8, resnet18 or resnet34
    patch: tuple = (16, 16, 8)          # vit: voxels of a patch
    vit_width: int = 768
    vit_depth: int = 12
    vit_heads: int = 12
    resnet_width: int = 64              # resnet: channels of the first stage
    vocabulary: int = 30522
    text_width: int = 768
    text_depth: int = 12
    text_heads: int = 12
    text_positions: int = 512
    text_mlp: int = 3072
    text_length: int = 97               # longer texts are cut to as many tokens
    text_eps: float = 1e-12             # of the text encoder's layer norms
    text_activation: str = "gelu"
    text_dropout: float = 0.1           # in training
    text_cleaning: str = "authors"      # see clean
    text_pooling: str = "padded"        # of words, see TextEncoder; of sentences, see encode_text
    dim: int = 768                      # of the joint space and of the bank
    bank_size: int = 2048
    bank_init: str = "orthogonal"
    scale: float = 10.0                 # of InfoNCE's logits, the inverse temperature
    learn_scale: bool = False
    prompts_as: str = "plain"           # how a prompt is read, see evaluate.prompt_vectors
    trained_on: str = ""                # "phantom" where it has seen no patient
    version: int = 2                    # of this file's layout

    def __post_init__(self):
        """ValueError where a setting's value has no meaning."""
        for item in fields(self):
            value, kind = getattr(self, item.name), item.type
            right = type(value) is kind or kind is float and type(value) is int
            if kind in (int, float):
                least = 0 if item.name in MAY_BE_ZERO else 1e-9
                right = right and least <= value < 2**31
            elif item.name in CHOICES:
                choices = CHOICES[item.name]
                _require(value in choices, item.name, value, f"; one of {', '.join(choices)}")
            _require(right, item.name, value)
        for name in ("spacing", "shape", "crop", "patch"):
            value = getattr(self, name)
            _require(len(value) == 3 and all(0 < size < math.inf for size in value), name, value)
        _require(self.text_dropout < 1, "text_dropout", self.text_dropout)
        _require(self.version == Config.version, "version", self.version)
        for window in (self.hu_range, *self.windows):
            _require(len(window) == 2 and window[0] < window[1], "hu_range or windows", window)
        for part in ("vit", "text"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            _require(width % heads == 0, f"{part}_width", f"{width}, not a multiple of {heads}")


def _require(right, name, value, mend=""):
    if not right:
        raise ValueError(f"{name} can't be {value!r}{mend}")


ACTIVATIONS = {
    "gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh"), "relu": F.relu, "silu": F.silu,
}
CHOICES = {
    "vision": ("vit", "resnet8", "resnet18", "resnet34"),
    "bank_init": ("orthogonal", "gaussian", "xavier", "uniform", "kmeans"),
    "text_activation": ACTIVATIONS,
    "text_cleaning": ("authors", "plain"),
    "text_pooling": ("padded", "mean", "sentences"),
    "prompts_as": ("plain", "contrast", "context", "prototype"),
}
MAY_BE_ZERO = ("mean", "text_eps", "text_dropout")  # all other numbers are more than 0
# What a config.json of version 1 meant without saying so.
VERSION_1 = {"text_cleaning": "plain", "text_pooling": "mean", "text_dropout": 0.0}
DEEP_LUNG, LUNG, SOFT_TISSUE, BONE = (-1000, -700), (-1000, -100), (-160, 240), (100, 900)
PRESETS = {
    "base": {},
    "phantom": dict(
        spacing=(6.0, 6.0, 6.0), shape=(64, 56, 48), crop=(56, 48, 48),
        windows=(DEEP_LUNG, LUNG, SOFT_TISSUE, BONE, (-1000, 1000)),
        vision="resnet8", resnet_width=16,
        patch=(8, 8, 8), vit_width=96, vit_depth=4, vit_heads=4,
        vocabulary=2048, text_width=128, text_depth=2, text_heads=4, text_positions=128,
        text_mlp=512, text_dropout=0.0, text_cleaning="plain", text_pooling="sentences",
        dim=128, bank_size=256,
    ),
}


# ---- 1. The transformer block, of images and texts -----------------------------------------------

class Attention(nn.Module):
    """Multi-head self-attention over (B, N, C)."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, mask=None):
        B, N, C = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, C // self.heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)                           # three (B, heads, N, C / heads)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(*qkv, mask, dropout)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class MLP(nn.Module):
    """Two layers with an activation between them: (..., C) -> (..., C)."""

    def __init__(self, width, inner, activation=F.gelu):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.activation = activation

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """A transformer block of ViT (pre-norm)."""

    def __init__(self, width, heads, inner, eps=1e-6, dropout=0.0, activation=F.gelu):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, inner, activation)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TextBlock(Block):
    """A transformer block of BERT (post-norm)."""

    def forward(self, x, mask):
        x = self.norm1(x + self.dropout(self.attn(x, mask)))
        return self.norm2(x + self.dropout(self.mlp(x)))


def _initialise(module):
    if isinstance(module, (nn.Linear, nn.Conv3d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


# ---- 2. Vision encoders: volumes -> one feature, and one a cell of a grid ------------------------

def sincos_position_embedding(grid, width):
    """Fixed sine-cosine embedding of a 3D grid: (gx * gy * gz, width), a third for each axis."""
    per_axis = width // 6
    frequency = 1e4 ** (-torch.arange(per_axis) / per_axis)
    axes = [torch.arange(size, dtype=torch.float32) for size in grid]
    parts = []
    for axis in torch.meshgrid(*axes, indexing="ij"):
        angle = axis.reshape(-1, 1) * frequency
        parts += angle.sin(), angle.cos()
    return F.pad(torch.cat(parts, 1), (0, width - 6 * per_axis))


class ViT3D(nn.Module):
    """3D vision transformer: volumes (B, channels, X, Y, Z) -> (B, C), (B, gx, gy, gz, C).

    The first is the CLS token, the second the patch tokens. The position embedding belongs to
    base_grid = shape / patch and is resized trilinearly for any other grid.
    """

    def __init__(
        self, shape=(224, 224, 112), patch=(16, 16, 8), width=768, depth=12, heads=12, channels=1
    ):
        super().__init__()
        self.patch, self.width = tuple(patch), width
        self.base_grid = tuple(size // step for size, step in zip(shape, patch))
        convolution = nn.Conv3d(channels, width, self.patch, stride=self.patch)
        self.patch_embed = nn.ModuleDict({"proj": convolution})
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        positions = sincos_position_embedding(self.base_grid, width)
        self.pos_embed = nn.Parameter(F.pad(positions, (0, 0, 1, 0))[None])       # (1, 1 + N, C)
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.apply(_initialise)

    def forward(self, volumes):
        B, _, *shape = volumes.shape
        if any(size % step for size, step in zip(shape, self.patch)):
            raise ValueError(
                f"a volume of {tuple(shape)} voxels can't be cut into patches of {self.patch}; "
                "each size must be a multiple"
            )
        grid = [size // step for size, step in zip(shape, self.patch)]
        x = self.embed_patches(volumes, grid)                                    # (B, N, C)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], 1)                  # (B, 1 + N, C)
        x = x + resize_positions(self.pos_embed, self.base_grid, grid)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1:].unflatten(1, grid)

    def embed_patches(self, volumes, grid):
        """The convolution as one matrix product: (B, channels, X, Y, Z) -> (B, N, C)."""
        projection, (gx, gy, gz), (px, py, pz) = self.patch_embed["proj"], grid, self.patch
        x = volumes.reshape(*volumes.shape[:2], gx, px, gy, py, gz, pz)
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)           # (B, N, patch)
        return F.linear(x, projection.weight.flatten(1), projection.bias)


def resize_positions(positions, source, grid):
    """A position embedding (1, 1 + N, C) of the grid `source`, for another grid (gx, gy, gz)."""
    if tuple(source) == tuple(grid):
        return positions
    cls, patches = positions.tensor_split([1], 1)
    patches = F.interpolate(patches.mT.unflatten(2, source), grid, mode="trilinear")
    return torch.cat([cls, patches.flatten(2).mT], 1)


def _convolution(inputs, outputs, size, stride):
    """Its layers: convolution, batch norm, ReLU."""
    convolution = nn.Conv3d(inputs, outputs, size, stride, size // 2, bias=False)
    return convolution, nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)


def _initialise_convolutions(network):
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    network.to(memory_format=torch.channels_last_3d)


class Bottleneck(nn.Module):
    """1 x 1 x 1, 3 x 3 x 3 and 1 x 1 x 1 convolution with a shortcut (He et al. 2016).

    The output has 4 * width channels.
    """

    def __init__(self, channels, width, stride):
        super().__init__()
        out = 4 * width
        self.residual = nn.Sequential(
            *_convolution(channels, width, 1, 1),
            *_convolution(width, width, 3, stride),
            *_convolution(width, out, 1, 1)[:2],
        )
        self.shortcut = nn.Identity()
        if stride > 1 or channels != out:
            self.shortcut = nn.Sequential(*_convolution(channels, out, 1, stride)[:2])
        nn.init.zeros_(self.residual[-1].weight)  # each block starts as its shortcut

    def forward(self, x):
        return F.relu(self.shortcut(x) + self.residual(x), inplace=True)


class BasicBlock(nn.Module):
    """Two 3 x 3 x 3 convolutions, the first of stride 2, with a shortcut (He et al. 2016)."""

    def __init__(self, channels, out):
        super().__init__()
        self.residual = nn.Sequential(
            *_convolution(channels, out, 3, 2), *_convolution(out, out, 3, 1)[:2]
        )
        self.shortcut = nn.Sequential(*_convolution(channels, out, 1, 2)[:2])
        nn.init.zeros_(self.residual[-1].weight)  # each block starts as its shortcut

    def forward(self, x):
        return F.relu(self.shortcut(x) + self.residual(x), inplace=True)


class ResNet8(nn.Module):
    """A residual network for small findings: volumes (B, channels, X, Y, Z) -> (B, C) and cells.

    Stages of 1, 2, 4 and 8 times `width` channels, at 2, 4, 8 and 16 voxels a cell. The feature is
    the mean and the maximum of every stage, so that what fills one cell is not averaged away. The
    cells (B, gx, gy, gz, C) are the third stage's: what the feature would be of a volume that is
    like this everywhere. In training, of which they would take a tenth, there are none (None).
    """

    def __init__(self, width=64, channels=1):
        super().__init__()
        self.stem = nn.Sequential(*_convolution(channels, width, 3, 2))
        sizes = [width, 2 * width, 4 * width, 8 * width]
        self.blocks = nn.Sequential(*map(BasicBlock, sizes, sizes[1:]))
        self.width = 2 * sum(sizes)
        _initialise_convolutions(self)

    def forward(self, volumes):
        volumes = volumes.contiguous(memory_format=torch.channels_last_3d)
        stages = [self.stem(volumes)]
        for block in self.blocks:
            stages.append(block(stages[-1]))
        flat = [stage.movedim(1, -1).flatten(1, 3) for stage in stages]        # as it is in memory
        parts = [x.mean(1) for x in flat]
        parts += [x.max(1).values for x in flat]
        pooled, cells = torch.cat(parts, 1), None
        if not self.training:
            grid = stages[2].shape[2:]
            cells = [F.adaptive_avg_pool3d(stage, grid) for stage in stages]
            cells = torch.cat(cells + cells, 1).movedim(1, -1)
        return pooled, cells


class ResNet3D(nn.Module):
    """3D residual network: volumes (B, channels, X, Y, Z) -> (B, C), (B, gx, gy, gz, C).

    The first is the mean of the second. As the authors', "18" is [2, 2, 2, 2] and "34"
    [3, 4, 6, 3] of bottleneck blocks. Volumes shrink 32 times along each axis.
    """
    BLOCKS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3]}

    def __init__(self, depth=18, width=64, channels=1):
        super().__init__()
        # Two small convolutions, not 7 x 7 x 7 and pooling (He et al. 2019): a fifth of the cost.
        half = width // 2
        self.stem = nn.Sequential(
            *_convolution(channels, half, 3, 2), *_convolution(half, width, 3, 2)
        )
        blocks, channels = [], width
        for stage, count in enumerate(self.BLOCKS[depth]):
            for i in range(count):
                stride = 2 if stage and not i else 1
                blocks.append(Bottleneck(channels, width, stride))
                channels = 4 * width
            width *= 2
        self.blocks = nn.Sequential(*blocks)
        self.width = channels
        _initialise_convolutions(self)

    def forward(self, volumes):
        volumes = volumes.contiguous(memory_format=torch.channels_last_3d)
        x = self.blocks(self.stem(volumes))                                     # (B, C, gx, gy, gz)
        return x.mean((2, 3, 4)), x.movedim(1, -1)


# ---- 3. The text encoder -------------------------------------------------------------------------

def clean(text, cleaning="plain"):
    """A text in lower case, its words alone.

    "plain": words are runs of letters and digits. "authors": runs of letters, digits and _, in
    which what isn't ASCII is dropped; sentences, which end at "." or at a number such as "3.", are
    left out where they are a single word.
    """
    if cleaning == "plain":
        return " ".join(re.sub(r"[\W_]+", " ", text.lower()).split())
    words = []
    for sentence in re.split(r"\d+\.|\.", text):
        own = re.findall(r"\w+", sentence.lower())
        if len(own) > 1:
            words += own
    return " ".join(" ".join(words).encode("ascii", "ignore").decode().split())


def train_tokenizer(texts, vocabulary):
    """A WordPiece tokenizer in BERT's format, of at most `vocabulary` pieces.

    Every letter that occurs, and the most frequent words of texts. The same texts give the same
    tokenizer, which the trainers of `tokenizers` don't promise: they break ties at random.
    """
    normalise = normalizers.BertNormalizer(lowercase=True).normalize_str
    words = Counter()
    for text in texts:
        words.update(normalise(clean(text)).split())
    letters = sorted({*"abcdefghijklmnopqrstuvwxyz0123456789", *"".join(words)})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    pieces += [f"##{letter}" for letter in letters]
    frequent = [word for word in words if len(word) > 1]
    frequent.sort(key=lambda word: (-words[word], word))
    return _wordpiece(pieces + frequent[:max(0, vocabulary - len(pieces))])


def _wordpiece(pieces):
    numbers = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    last, first = [(piece, numbers[piece]) for piece in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(last, first)
    return tokenizer


class TextEncoder(nn.Module):
    """BERT with the authors' pooling: list of str -> (B, C).

    Hidden states of the last four layers are summed, over the pieces and words, too. The text's
    feature is that sum over config.text_length, to which the authors pad all texts (text_pooling
    "padded"), else over the number of words. Without a tokenizer it spells by letters.
    """

    def __init__(self, config=None, tokenizer=None):
        super().__init__()
        self.config = c = config or Config()
        self.word_embeddings = nn.Embedding(c.vocabulary, c.text_width)
        self.position_embeddings = nn.Embedding(c.text_positions, c.text_width)
        self.type_embedding = nn.Parameter(torch.zeros(c.text_width))  # BERT's token type 0
        self.norm = nn.LayerNorm(c.text_width, c.text_eps)
        self.dropout = nn.Dropout(c.text_dropout)
        self.blocks = nn.ModuleList()
        for _ in range(c.text_depth):
            self.blocks.append(TextBlock(
                c.text_width, c.text_heads, c.text_mlp, c.text_eps, c.text_dropout,
                ACTIVATIONS[c.text_activation]))
        self.apply(_initialise)
        # Blocks that stay as they begin must mix words: without that, "pleural calcification" is
        # "pericardial calcification" plus "pleural effusion" less "pericardial effusion".
        if c.text_pooling == "sentences":
            for weight in self.blocks.parameters():
                if weight.ndim > 1:
                    nn.init.normal_(weight, std=c.text_width ** -0.5)
        self.set_tokenizer(tokenizer or train_tokenizer([], c.vocabulary))

    def set_tokenizer(self, tokenizer):
        """Use this tokenizers.Tokenizer; ValueError where it's no BERT's or has too many pieces."""
        numbers, rows = tokenizer.get_vocab(), self.word_embeddings.num_embeddings
        if not {"[PAD]", "[UNK]"} <= numbers.keys():
            raise ValueError("the tokenizer lacks the piece [PAD] or [UNK]; a BERT's is needed")
        n_pieces = max(numbers.values()) + 1
        if n_pieces > rows:
            raise ValueError(f"the tokenizer has {n_pieces} pieces, the text encoder {rows}")
        tokenizer.enable_truncation(min(self.config.text_length, self.config.text_positions))
        tokenizer.enable_padding(pad_id=numbers["[PAD]"])
        self.tokenizer = tokenizer
        starts_word = torch.ones(rows)
        starts_word[[i for piece, i in numbers.items() if piece.startswith("##")]] = 0
        self.register_buffer("starts_word", starts_word, persistent=False)

    def forward(self, texts):
        encodings = self.tokenizer.encode_batch(list(map(self.clean, texts)))
        pairs = [(encoding.ids, encoding.attention_mask) for encoding in encodings]
        pairs = torch.tensor(pairs, device=self.type_embedding.device)
        tokens, mask = pairs.unbind(1)                                          # each (B, T)
        layers = self.hidden_states(tokens, mask)[-4:]
        count = self.config.text_length
        if self.config.text_pooling != "padded":
            count = (self.starts_word[tokens] * mask).sum(1, keepdim=True)                # (B, 1)
        return (sum(layers) * mask[..., None]).sum(1) / count                             # (B, C)

    def clean(self, text):
        """A text as this encoder reads it."""
        return clean(text, self.config.text_cleaning)

    def hidden_states(self, tokens, mask):
        """BERT's hidden states, the embedding's first: tokens, mask (B, T) -> [(B, T, C), ...]."""
        positions = self.position_embeddings.weight[:tokens.shape[1]]
        x = self.word_embeddings(tokens) + positions + self.type_embedding
        states = [self.dropout(self.norm(x))]
        for block in self.blocks:
            states.append(block(states[-1], mask[:, None, None].bool()))
        return states

    @classmethod
    def from_huggingface(cls, directory):
        """Load a BERT saved by transformers: config.json, model.safetensors, tokenizer or vocab.

        ValueError names the file that is missing or damaged, or a setting that isn't supported.
        """
        path = Path(directory) / "config.json"
        raw = _read_json(path)
        for key, only in (("model_type", "bert"), ("position_embedding_type", "absolute")):
            if raw.get(key, only) != only or "model_type" not in raw:
                raise ValueError(f"{path}: {key} is {raw.get(key)!r}; {only!r} is needed")
        settings = {own: raw[key] for key, own in BERT_CONFIG.items() if key in raw}
        config = _config(settings, path)
        weights = _read_weights(directory, config.text_depth)
        weights = {name.removeprefix("bert."): tensor for name, tensor in weights.items()}
        state = from_bert(weights, config.text_depth, directory)
        return _loaded(cls, config, read_tokenizer(directory), state, directory).eval()


# Hugging Face's name of a setting -> ours; both have the same defaults.
BERT_CONFIG = {
    "vocab_size": "vocabulary",
    "hidden_size": "text_width",
    "num_hidden_layers": "text_depth",
    "num_attention_heads": "text_heads",
    "intermediate_size": "text_mlp",
    "hidden_act": "text_activation",
    "hidden_dropout_prob": "text_dropout",
    "max_position_embeddings": "text_positions",
    "layer_norm_eps": "text_eps",
}
# Name in a block -> Hugging Face's in a layer; several matrices there are one here.
BERT_LAYER = {
    "attn.qkv": "attention.self.query attention.self.key attention.self.value",
    "attn.proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm2": "output.LayerNorm",
}


def from_bert(weights, depth, where):
    """A Hugging Face BertModel's weights, renamed to TextEncoder's; ValueError names `where`."""
    for old, new in (("gamma", "weight"), ("beta", "bias")):  # BERT's first names
        ending = f"LayerNorm.{old}"
        for name in [name for name in weights if name.endswith(ending)]:
            weights[name.removesuffix(old) + new] = weights.pop(name)
    tables = {"norm": ["embeddings.LayerNorm"]}
    for i in range(depth):
        for name, parts in BERT_LAYER.items():
            tables[f"blocks.{i}.{name}"] = [f"encoder.layer.{i}.{part}" for part in parts.split()]
    try:
        state = {"type_embedding": weights["embeddings.token_type_embeddings.weight"][0]}
        for name in ("word_embeddings.weight", "position_embeddings.weight"):
            state[name] = weights[f"embeddings.{name}"]
        for name, parts in tables.items():
            for kind in ("weight", "bias"):
                state[f"{name}.{kind}"] = torch.cat([weights[f"{part}.{kind}"] for part in parts])
        return state
    except KeyError as error:
        raise ValueError(
            f"{where}: the weights lack {error}, so they are not a BertModel's"
        ) from None


# ---- 4. The whole model --------------------------------------------------------------------------

class BrgSA(nn.Module):
    """The whole model; embeddings are (B, dim), not normalised."""

    def __init__(self, config=None, tokenizer=None):
        super().__init__()
        self.config = config = config or Config()
        channels = max(1, len(config.windows))
        if config.vision == "vit":
            self.vision = ViT3D(
                config.crop, config.patch, config.vit_width, config.vit_depth, config.vit_heads,
                channels,
            )
        elif config.vision == "resnet8":
            self.vision = ResNet8(config.resnet_width, channels)
        else:
            self.vision = ResNet3D(int(config.vision[6:]), config.resnet_width, channels)
        self.text = TextEncoder(config, tokenizer)
        self.vision_projection = nn.Linear(self.vision.width, config.dim)
        self.text_projection = nn.Linear(config.text_width, config.dim)
        self.bank = KnowledgeBank(config.bank_size, config.dim, config.bank_init)
        self.scale = nn.Parameter(torch.tensor(float(config.scale)), config.learn_scale)

    def forward(self, volumes, texts):
        """A batch of pairs -> v, t, v_hat, t_hat, as cmki.alignment_loss takes them."""
        v, t = self.encode_image(volumes), self.encode_text(texts)
        return v, t, self.bridge(v), self.bridge(t)

    def encode_image(self, volumes):
        """Volumes (B, 1, X, Y, Z) in HU, preprocessed -> v (B, dim)."""
        pooled, _ = self.vision(self.normalise(volumes))
        return self.vision_projection(pooled)

    def encode_text(self, texts):
        """List of str -> t (B, dim).

        With text_pooling "sentences" the sum of the embeddings of a text's sentences: statements
        add up, in any order (as in Deep Sets, Zaheer et al. 2017).
        """
        if self.config.text_pooling != "sentences":
            return self.text_projection(self.text(texts))
        sentences = list(map(self.sentences, texts))
        distinct = list(dict.fromkeys(sentence for parts in sentences for sentence in parts))
        embeddings = dict(zip(distinct, self.text_projection(self.text(distinct))))
        return torch.stack([sum(map(embeddings.get, parts)) for parts in sentences])

    def sentences(self, text):
        """A text's sentences that hold a word."""
        parts = re.split(r"(?<=[.!?])\s+|\n", text)
        return list(filter(self.text.clean, parts)) or [text]

    def bridge(self, x):
        """Re-express embeddings (B, dim) from the knowledge bank: x_hat."""
        return self.bank(x)

    def normalise(self, volumes):
        """HU (B, 1, X, Y, Z) -> the vision encoder's input, float (B, channels, X, Y, Z)."""
        volumes = volumes.to(self.scale.dtype)
        if self.config.windows:
            low, high = torch.tensor(self.config.windows, device=volumes.device).mT
            gain = 2 / (high - low)
            volumes = torch.addcmul(-1 - low * gain, volumes.movedim(1, -1), gain)
            return volumes.clamp_(-1, 1).movedim(-1, 1)  # in memory the channels come last
        # [low, high] -> [-1, 1] -> (x - mean) / std, in one pass
        low, high = self.config.hu_range
        gain = 2 / (high - low) / self.config.std
        offset = low * gain + (1 + self.config.mean) / self.config.std
        return volumes.clamp(low, high).mul_(gain).sub_(offset)

    @torch.no_grad()
    def initialise(self, volumes, texts):
        """Scale both projections so that a first batch gets embeddings of zero mean, equal spread.

        Features of untrained encoders hardly differ from sample to sample (ratio of mean to spread
        above 3), which starts all embeddings in one point, from where InfoNCE's gradient is small.
        Data-dependent initialisation as of Kraehenbuehl et al. 2016.

        With text_pooling "sentences" the texts are all sentences to train on, as often as they
        occur, and their embeddings are decorrelated, too (whitening): sentences that share words
        start as far apart as any, and one weighs the more the rarer it is (as by inverse document
        frequency), about 1 / sqrt(its share).
        """
        pooled, _ = self.vision(self.normalise(volumes))
        places = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        self.text.eval()  # without dropout
        features = self.text(list(places))[[places[text] for text in texts]]
        self.text.train()
        self.vision_projection.weight /= pooled.std(0) + 1e-3 * pooled.std()
        if self.config.text_pooling == "sentences":
            nn.init.orthogonal_(self.text_projection.weight)
            self.text_projection.weight.copy_(self.text_projection.weight @ whitening(features))
        else:
            self.text_projection.weight /= features.std(0) + 1e-3 * features.std()
        for projection, x in ((self.vision_projection, pooled), (self.text_projection, features)):
            projection.bias.copy_(-projection.weight @ x.mean(0))

    def save_pretrained(self, directory):
        """Write config.json, tokenizer.json and model.safetensors, the weights last."""
        self.save_settings(directory)
        weights = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_atomically(Path(directory) / "model.safetensors", save(weights))

    def save_settings(self, directory):
        """Write config.json and tokenizer.json."""
        directory, config = Path(directory), json.dumps(asdict(self.config), indent=1)
        write_atomically(directory / "config.json", config.encode())
        write_atomically(directory / "tokenizer.json", self.text.tokenizer.to_str().encode())

    @classmethod
    def from_pretrained(cls, directory):
        """Load what save_pretrained wrote, to evaluate; ValueError names the file that is wrong."""
        config = read_config(Path(directory) / "config.json")
        depth = max(config.text_depth, config.vit_depth * (config.vision == "vit"))
        weights = _read_weights(directory, depth)
        model = _loaded(cls, config, read_tokenizer(directory), weights, directory)
        if config.vision != "vit":
            model.vision.to(memory_format=torch.channels_last_3d)  # which files don't keep
        return model.eval()


# ---- 5. The zero-shot score ----------------------------------------------------------------------
#
# A volume has two embeddings, v and v_hat, a prompt t and t_hat: four pairs. The score is the mean
# cosine over some of the pairs (a, b), in the paper over (v, t) and (v_hat, t):
#
#     score = mean of a . b / (|a| |b|)

PAIRS = ("v-t", "v_hat-t", "v-t_hat", "v_hat-t_hat")


def zero_shot_scores(v, v_hat, t, t_hat, pairs=PAIRS[:2]):
    """Mean cosine of the pairs, by default of cos(v, t) and cos(v_hat, t): (N, P).

    v, v_hat (N, d) are of volumes, t, t_hat (P, d) of prompts.
    """
    images, texts = joint_vectors(v, v_hat, t, t_hat, pairs)
    return images @ texts.mT


def joint_vectors(v, v_hat, t, t_hat, pairs=PAIRS[:2]):
    """Unit vectors (N, D), (P, D) whose inner product is the mean cosine of the pairs.

    Each pair's two sides, side by side.
    """
    unit = {"v": v, "v_hat": v_hat, "t": t, "t_hat": t_hat}
    unit = {name: F.normalize(x, dim=-1) / len(pairs) ** 0.5 for name, x in unit.items()}
    images, texts = zip(*[pair.split("-") for pair in pairs])
    images = torch.cat([unit[name] for name in images], -1)
    return images, torch.cat([unit[name] for name in texts], -1)


def whitening(features, floor=0.001):
    """The matrix (C, C) that decorrelates features (N, C) and gives them equal spread.

    Directions in which they hardly differ are amplified less: the variances are raised by a share
    of their mean, so that it exists where there are fewer features than channels.
    """
    centred = features - features.mean(0)
    variances, axes = torch.linalg.eigh(centred.mT @ centred / len(features))
    variances = variances.clamp(min=0) + floor * variances.mean()
    return axes * variances.rsqrt() @ axes.mT


def pick_device(name=None, rank=None):
    """The name of a device of this machine: cuda (of a rank, its own) where there is one, else cpu.

    ValueError where there is none of this name.
    """
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    name = name or ("cuda" if len(names) > 1 else "cpu")
    if name == "cuda":
        name = f"cuda:{rank or 0}"
    if name not in names:
        raise ValueError(f"there is no device '{name}' here; there is {', '.join(names)}")
    return name


def half_type(device):
    """The type of 16 bits that a device computes in: bfloat16, else float16 on a GPU, else None."""
    if torch.device(device).type == "cpu":
        return torch.bfloat16 if torch.cpu.get_capabilities().get("amx_bf16") else None
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


# ---- 6. Files ------------------------------------------------------------------------------------

def write_atomically(path, content):
    """Write bytes to a temporary name beside path, sync, rename: a killed run leaves old or new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tokenizer(directory):
    """A directory's tokenizer.json, else its vocab.txt, as tokenizers.Tokenizer."""
    path = Path(directory) / "tokenizer.json"
    vocabulary = path.with_name("vocab.txt")
    try:
        if path.exists() or not vocabulary.exists():
            return Tokenizer.from_file(str(path))
        return _wordpiece(vocabulary.read_text().splitlines())
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(f"{path}: can't be read as a tokenizer ({error})") from None


def _as_tuples(value):
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _read_json(path):
    """The object in a JSON file, as a dict."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; a folder with config.json, model.safetensors and "
            "tokenizer.json is needed"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object of settings")
    return content


def read_config(path):
    """The Config in a config.json that save_pretrained wrote; ValueError where it isn't one."""
    settings = _read_json(path)
    if settings.get("version", 1) == 1:  # where these were no settings yet
        settings |= VERSION_1 | {"text_mlp": 4 * settings.get("text_width", 768), "version": 2}
    return _config(settings, path)


def _config(settings, path):
    """The Config of settings from a file, which an error names."""
    try:
        return Config(**{name: _as_tuples(value) for name, value in settings.items()})
    except (ValueError, TypeError) as error:  # a value that can't be, a name that isn't known
        raise ValueError(f"{path}: {str(error).removeprefix('Config.__init__() ')}") from None


def _read_weights(directory, depth):
    """model.safetensors' tensors; ValueError where one isn't finite, or fewer than `depth`."""
    path = Path(directory) / "model.safetensors"
    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; has the training been run to its first checkpoint? "
            "(Weights of others must be safetensors.)"
        ) from None
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    if len(weights) < depth:
        raise ValueError(f"{path}: {len(weights)} tensors don't make config.json's {depth} layers")
    for name, weight in weights.items():
        if weight.is_floating_point():
            weights[name] = weight.float()
            if not weight.isfinite().all():
                raise ValueError(f"{path}: tensor {name} holds NaN or infinite values")
    return weights


def _loaded(kind, config, tokenizer, weights, directory):
    """A BrgSA or TextEncoder with these weights; nothing is allocated before they are seen to fit.
    """
    try:
        with torch.device("meta"):
            model = kind(config, tokenizer)
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, ValueError) as error:  # a tensor, the tokenizer
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{directory}: config.json doesn't fit what is there: {reason}") from None
    text = model.text if kind is BrgSA else model
    text.set_tokenizer(tokenizer)  # with tensors that have values
    return model
