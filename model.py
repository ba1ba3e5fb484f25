"""BrgSA: a 3D vision encoder and a text encoder, bridged by the knowledge bank that both share (arXiv 2501.03565).

    v = projection(vision(volume))      v_hat = softmax(v D^T) D          zero-shot score of a volume and a prompt:
    t = projection(text(prompt))        t_hat = softmax(t D^T) D          (cos(v, t) + cos(v_hat, t)) / 2

    model = BrgSA.from_pretrained("runs/phantom")
    v, t = model.encode_image(volumes), model.encode_text(["There is pleural effusion"])

The authors' released checkpoint becomes such a directory without any of its pickled code being run:

    python model.py convert official.ckpt --tokenizer path/to/their-bert --out runs/official
"""
import json
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn

from cmki import KnowledgeBank


@dataclass
class Config:
    """All that the model is made from; the defaults are the authors' (preset `base`). Sizes are (x, y, z)."""
    spacing: tuple = (1.5, 1.5, 3.0)    # mm, of the preprocessed volume
    shape: tuple = (256, 256, 128)      # voxels, of the preprocessed volume
    crop: tuple = (224, 224, 112)       # voxels, of a training crop
    hu_range: tuple = (-1000, 1000)     # HU are clipped to it and mapped to [-1, 1]
    mean: float = 0.4978                # then normalised
    std: float = 0.2449
    windows: tuple = ()                 # else each (low, high) HU is a channel of its own, clipped and mapped to [-1, 1]
    vision: str = "vit"                 # vit, resnet18 or resnet34
    patch: tuple = (16, 16, 8)          # vit: voxels of a patch
    vit_width: int = 768
    vit_depth: int = 12
    vit_heads: int = 12
    resnet_width: int = 64              # resnet: channels of the first stage; the last has 32 times as many
    vocabulary: int = 30522
    text_width: int = 768
    text_depth: int = 12
    text_heads: int = 12
    text_positions: int = 512
    text_length: int = 97               # longer texts are cut to as many tokens
    dim: int = 768                      # of the joint space and of the bank
    bank_size: int = 2048
    bank_init: str = "orthogonal"
    scale: float = 10.0                 # of InfoNCE's logits, the inverse temperature
    learn_scale: bool = False
    trained_on: str = ""                # "phantom" where it has seen no patient


PRESETS = {
    "base": {},
    "phantom": dict(spacing=(6.0, 6.0, 6.0), shape=(64, 56, 48), crop=(56, 48, 48), vision="resnet18",
                    windows=((-1000, -700), (-1000, -100), (-160, 240), (100, 900), (-1000, 1000)),  # deep lung, lung, soft tissue, bone, all
                    resnet_width=16, patch=(8, 8, 8), vit_width=96, vit_depth=4, vit_heads=4, vocabulary=2048,
                    text_width=128, text_depth=2, text_heads=4, text_positions=128, dim=128, bank_size=256),
}


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, C)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, mask=None):
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # each (B, heads, N, C / heads)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A transformer block; pre-norm as in ViT, or post-norm as in BERT."""

    def __init__(self, width, heads, eps, post_norm=False):
        super().__init__()
        self.post_norm = post_norm
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = MLP(width)

    def forward(self, x, mask=None):
        if self.post_norm:
            x = self.norm1(x + self.attn(x, mask))
            return self.norm2(x + self.mlp(x))
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


def sincos_position_embedding(grid, width):
    """Fixed sine-cosine embedding of a 3D grid: (gx * gy * gz, width), a third of the channels for each axis."""
    per_axis = width // 6
    frequency = 1e4 ** (-torch.arange(per_axis) / per_axis)
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in axes]
    embedding = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return F.pad(embedding, (0, width - embedding.shape[1]))


class ViT3D(nn.Module):
    """3D vision transformer: normalised volumes (B, channels, X, Y, Z) -> CLS token (B, C) and patch tokens (B, gx, gy, gz, C).

    The position embedding belongs to base_grid = shape / patch and is resized trilinearly for any other grid.
    """

    def __init__(self, shape=(224, 224, 112), patch=(16, 16, 8), width=768, depth=12, heads=12, channels=1):
        super().__init__()
        self.patch, self.width = tuple(patch), width
        self.base_grid = tuple(size // step for size, step in zip(shape, patch))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(channels, width, self.patch, stride=self.patch)})
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(F.pad(sincos_position_embedding(self.base_grid, width), (0, 0, 1, 0))[None])
        self.blocks = nn.ModuleList(Block(width, heads, eps=1e-6) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.apply(_initialise)

    def forward(self, volumes):
        _, _, *shape = volumes.shape
        if any(size % step for size, step in zip(shape, self.patch)):
            raise ValueError(f"a volume of {tuple(shape)} voxels can't be cut into patches of {self.patch}; each size must be a multiple")
        x = self.patch_embed["proj"](volumes.contiguous(memory_format=torch.channels_last_3d))  # (B, C, gx, gy, gz)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)                                         # (B, N, C)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.position_embedding(grid)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1:].unflatten(1, grid)

    def position_embedding(self, grid):
        """(1, 1 + N, C) for a grid (gx, gy, gz)."""
        if tuple(grid) == self.base_grid:
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        patches = patches.transpose(1, 2).unflatten(2, self.base_grid)           # (1, C, gx, gy, gz)
        patches = F.interpolate(patches, size=tuple(grid), mode="trilinear", align_corners=False)
        return torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)


class Bottleneck(nn.Module):
    """1 x 1 x 1, 3 x 3 x 3 and 1 x 1 x 1 convolution with a shortcut (He et al. 2016); the output has 4 * width channels."""

    def __init__(self, channels, width, stride):
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv3d(channels, width, 1, bias=False), nn.BatchNorm3d(width), nn.ReLU(inplace=True),
            nn.Conv3d(width, width, 3, stride, padding=1, bias=False), nn.BatchNorm3d(width), nn.ReLU(inplace=True),
            nn.Conv3d(width, 4 * width, 1, bias=False), nn.BatchNorm3d(4 * width))
        self.shortcut = nn.Identity() if stride == 1 and channels == 4 * width else nn.Sequential(
            nn.Conv3d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm3d(4 * width))
        nn.init.zeros_(self.residual[-1].weight)  # each block starts as its shortcut

    def forward(self, x):
        return F.relu(self.shortcut(x) + self.residual(x), inplace=True)


class ResNet3D(nn.Module):
    """3D residual network: normalised volumes (B, channels, X, Y, Z) -> mean feature (B, C) and features (B, gx, gy, gz, C).

    As the authors', "18" is [2, 2, 2, 2] and "34" [3, 4, 6, 3] of bottleneck blocks. Volumes shrink 32 times along each axis.
    """
    BLOCKS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3]}

    def __init__(self, depth=18, width=64, channels=1):
        super().__init__()
        self.stem = nn.Sequential(  # two 3 x 3 x 3 convolutions in place of 7 x 7 x 7 and pooling (He et al. 2019): a fifth of the cost
            nn.Conv3d(channels, width // 2, 3, stride=2, padding=1, bias=False), nn.BatchNorm3d(width // 2), nn.ReLU(inplace=True),
            nn.Conv3d(width // 2, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm3d(width), nn.ReLU(inplace=True))
        blocks, channels = [], width
        for stage, count in enumerate(self.BLOCKS[depth]):
            for i in range(count):
                blocks.append(Bottleneck(channels, width << stage, stride=2 if stage and i == 0 else 1))
                channels = 4 * (width << stage)
        self.blocks = nn.Sequential(*blocks)
        self.width = channels
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last_3d)

    def forward(self, volumes):
        x = self.blocks(self.stem(volumes.contiguous(memory_format=torch.channels_last_3d)))  # (B, C, gx, gy, gz)
        return x.mean(dim=(2, 3, 4)), x.movedim(1, -1)


def _initialise(module):
    if isinstance(module, (nn.Linear, nn.Conv3d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def clean(text):
    """Lower case, letters and digits only, as the authors treat every text."""
    return " ".join(re.sub(r"[\W_]+", " ", text.lower()).split())


def train_tokenizer(texts, vocabulary):
    """A WordPiece tokenizer in BERT's format: every letter that occurs, and the most frequent words of texts up to `vocabulary` pieces.

    The same texts give the same tokenizer, which the trainers of `tokenizers` don't promise: they break ties at random.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    words = Counter(word for text in texts for word in tokenizer.normalizer.normalize_str(clean(text)).split())
    letters = sorted({*"abcdefghijklmnopqrstuvwxyz0123456789", *"".join(words)})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    frequent = sorted((word for word in words if len(word) > 1), key=lambda word: (-words[word], word))
    _set_pieces(tokenizer, [*pieces, *frequent[:max(0, vocabulary - len(pieces))]])
    return tokenizer


def _set_pieces(tokenizer, pieces):
    numbers = {piece: i for i, piece in enumerate(pieces)}
    tokenizer.model = models.WordPiece(numbers, unk_token="[UNK]")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", numbers["[SEP]"]), ("[CLS]", numbers["[CLS]"]))


class TextEncoder(nn.Module):
    """BERT with the authors' pooling: list of str -> (B, C).

    Hidden states of the last four layers are summed; so are the pieces of a word; the mean over the words is the text's feature.
    Without a tokenizer it spells words by letters.
    """

    def __init__(self, tokenizer=None, vocabulary=30522, width=768, depth=12, heads=12, positions=512, length=97):
        super().__init__()
        self.width, self.length = width, min(length, positions)
        self.word_embeddings = nn.Embedding(vocabulary, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.type_embedding = nn.Parameter(torch.zeros(width))  # BERT's token type 0, the only one here
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.blocks = nn.ModuleList(Block(width, heads, eps=1e-12, post_norm=True) for _ in range(depth))
        self.apply(_initialise)
        self.set_tokenizer(tokenizer or train_tokenizer([], vocabulary))

    def set_tokenizer(self, tokenizer):
        """Use this tokenizers.Tokenizer; ValueError where it is no BERT's or has more pieces than the embedding has rows."""
        vocabulary = tokenizer.get_vocab()
        if "[PAD]" not in vocabulary:
            raise ValueError("the tokenizer has no piece [PAD]; a BERT's is needed")
        if max(vocabulary.values()) >= self.word_embeddings.num_embeddings:
            raise ValueError(f"the tokenizer has {max(vocabulary.values()) + 1} pieces, the text encoder {self.word_embeddings.num_embeddings}")
        tokenizer.enable_truncation(self.length)
        tokenizer.enable_padding(pad_id=vocabulary["[PAD]"], pad_token="[PAD]")
        self.tokenizer = tokenizer
        starts_word = torch.ones(self.word_embeddings.num_embeddings)
        starts_word[[i for piece, i in vocabulary.items() if piece.startswith("##")]] = 0
        self.register_buffer("starts_word", starts_word, persistent=False)

    def forward(self, texts):
        encodings = self.tokenizer.encode_batch([clean(text) for text in texts])
        device = self.word_embeddings.weight.device
        tokens = torch.tensor([encoding.ids for encoding in encodings], device=device)               # (B, T)
        mask = torch.tensor([encoding.attention_mask for encoding in encodings], device=device)      # (B, T)
        layers = self.hidden_states(tokens, mask)[-4:]
        n_words = (self.starts_word[tokens] * mask).sum(1, keepdim=True)
        return (sum(layers) * mask[..., None]).sum(1) / n_words                                      # (B, C)

    def hidden_states(self, tokens, mask):
        """BERT's hidden states, the embedding's first: tokens, mask (B, T) -> depth + 1 tensors (B, T, C)."""
        x = self.word_embeddings(tokens) + self.position_embeddings.weight[:tokens.shape[1]] + self.type_embedding
        states = [self.norm(x)]
        for block in self.blocks:
            states.append(block(states[-1], mask[:, None, None].bool()))
        return states

    @classmethod
    def from_huggingface(cls, directory, length=97):
        """Load a BERT saved by transformers: config.json, model.safetensors, and tokenizer.json or vocab.txt."""
        directory = Path(directory)
        config = _read_json(directory / "config.json")
        if config.get("model_type") != "bert":
            raise ValueError(f"{directory / 'config.json'}: model_type is {config.get('model_type')!r}, a BERT is needed")
        weights = {key.removeprefix("bert."): value for key, value in _read_weights(directory).items()}
        encoder = cls(_read_tokenizer(directory), config["vocab_size"], config["hidden_size"], config["num_hidden_layers"],
                      config["num_attention_heads"], config["max_position_embeddings"], length)
        encoder.load_state_dict(_from_bert(weights, config["num_hidden_layers"], directory))
        return encoder


def _from_bert(weights, depth, where):
    """Hugging Face's BertModel names -> TextEncoder's."""
    def linear(*names):
        return {kind: torch.cat([weights[f"{name}.{kind}"] for name in names]) for kind in ("weight", "bias")}
    try:
        parts = {"norm": linear("embeddings.LayerNorm")}
        for i in range(depth):
            layer, block = f"encoder.layer.{i}", f"blocks.{i}"
            parts[f"{block}.attn.qkv"] = linear(*(f"{layer}.attention.self.{name}" for name in ("query", "key", "value")))
            parts[f"{block}.attn.proj"] = linear(f"{layer}.attention.output.dense")
            parts[f"{block}.norm1"] = linear(f"{layer}.attention.output.LayerNorm")
            parts[f"{block}.mlp.fc1"] = linear(f"{layer}.intermediate.dense")
            parts[f"{block}.mlp.fc2"] = linear(f"{layer}.output.dense")
            parts[f"{block}.norm2"] = linear(f"{layer}.output.LayerNorm")
        return {"word_embeddings.weight": weights["embeddings.word_embeddings.weight"],
                "position_embeddings.weight": weights["embeddings.position_embeddings.weight"],
                "type_embedding": weights["embeddings.token_type_embeddings.weight"][0],
                **{f"{name}.{kind}": value for name, part in parts.items() for kind, value in part.items()}}
    except KeyError as error:
        raise ValueError(f"{where}: the weights lack {error}, so they are not a BertModel's") from None


class BrgSA(nn.Module):
    """The whole model; embeddings are (B, dim), not normalised."""

    def __init__(self, config=None, tokenizer=None):
        super().__init__()
        self.config = config = config or Config()
        channels = max(1, len(config.windows))
        if config.vision == "vit":
            self.vision = ViT3D(config.crop, config.patch, config.vit_width, config.vit_depth, config.vit_heads, channels)
        elif config.vision in ("resnet18", "resnet34"):
            self.vision = ResNet3D(int(config.vision[6:]), config.resnet_width, channels)
        else:
            raise ValueError(f"vision is '{config.vision}'; vit, resnet18 or resnet34 is needed")
        self.text = TextEncoder(tokenizer, config.vocabulary, config.text_width, config.text_depth, config.text_heads,
                                config.text_positions, config.text_length)
        self.vision_projection = nn.Linear(self.vision.width, config.dim)
        self.text_projection = nn.Linear(config.text_width, config.dim)
        self.bank = KnowledgeBank(config.bank_size, config.dim, config.bank_init)
        self.scale = nn.Parameter(torch.tensor(float(config.scale)), requires_grad=config.learn_scale)

    def normalise(self, volumes):
        """HU of any type (B, 1, X, Y, Z) -> the vision encoder's input, float (B, 1 or one a window, X, Y, Z)."""
        if self.config.windows:
            volumes = volumes.float()
            return torch.cat([((volumes - low) * (2 / (high - low)) - 1).clamp_(-1, 1) for low, high in self.config.windows], dim=1)
        low, high = self.config.hu_range
        gain = 2 / (high - low) / self.config.std  # [low, high] -> [-1, 1] -> (x - mean) / std, in one pass
        return volumes.float().clamp(low, high).mul_(gain).sub_(low * gain + (1 + self.config.mean) / self.config.std)

    def encode_image(self, volumes):
        """Volumes (B, 1, X, Y, Z) in HU, preprocessed -> v (B, dim)."""
        pooled, _ = self.vision(self.normalise(volumes))
        return self.vision_projection(pooled)

    def encode_text(self, texts):
        """List of str -> t (B, dim)."""
        return self.text_projection(self.text(texts))

    def bridge(self, x):
        """Re-express embeddings (B, dim) from the knowledge bank: x_hat."""
        return self.bank(x)

    @torch.no_grad()
    def initialise(self, volumes, texts):
        """Scale both projections so that a first batch of pairs gets embeddings of zero mean and equal spread along each feature.

        Features of untrained encoders hardly differ from sample to sample (ratio of mean to spread above 3), which starts all embeddings
        in one point, from where InfoNCE's gradient is small. Data-dependent initialisation as of Kraehenbuehl et al. 2016.
        """
        for projection, features in ((self.vision_projection, self.vision(self.normalise(volumes))[0]), (self.text_projection, self.text(texts))):
            projection.weight /= features.std(0) + 1e-3 * features.std()
            projection.bias.copy_(-projection.weight @ features.mean(0))

    def forward(self, volumes, texts):
        """A batch of pairs -> v, t, v_hat, t_hat, as cmki.alignment_loss takes them."""
        v, t = self.encode_image(volumes), self.encode_text(texts)
        return v, t, self.bridge(v), self.bridge(t)

    def save_pretrained(self, directory):
        """Write config.json, tokenizer.json and model.safetensors, the weights last; each atomically."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        for name, content in (("config.json", json.dumps(asdict(self.config), indent=1).encode()),
                              ("tokenizer.json", self.text.tokenizer.to_str().encode()),
                              ("model.safetensors", save(weights))):
            temporary = directory / f".{name}.tmp"
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, directory / name)

    @classmethod
    def from_pretrained(cls, directory):
        """Load what save_pretrained wrote, in evaluation mode; ValueError names the file and what is wrong with it."""
        directory = Path(directory)
        settings = _read_json(directory / "config.json")
        unknown = set(settings) - {field.name for field in fields(Config)}
        if unknown:
            raise ValueError(f"{directory / 'config.json'}: unknown settings {', '.join(sorted(unknown))}; not a BrgSA of this version")
        config = Config(**{name: _tuples(value) for name, value in settings.items()})
        model, weights = cls(config, _read_tokenizer(directory)), _read_weights(directory)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{directory / 'model.safetensors'}: doesn't fit config.json: {str(error).splitlines()[1].strip()}") from None
        return model.eval()


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _read_json(path):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a folder with config.json, model.safetensors and tokenizer.json is needed") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def _read_weights(directory):
    path = directory / "model.safetensors"
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; has the training been run to its first checkpoint?") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error})") from None


def _read_tokenizer(directory):
    path, vocabulary = directory / "tokenizer.json", directory / "vocab.txt"
    try:
        if path.exists() or not vocabulary.exists():
            return Tokenizer.from_file(str(path))
        tokenizer = train_tokenizer([], 0)
        _set_pieces(tokenizer, vocabulary.read_text().splitlines())
        return tokenizer
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(f"{path}: can't be read as a tokenizer ({error})") from None


# ---- the zero-shot score

PAIRS = ("v-t", "v_hat-t", "v-t_hat", "v_hat-t_hat")


def zero_shot_scores(v, v_hat, t, t_hat, pairs=PAIRS[:2]):
    """Mean cosine of the pairs: v, v_hat (N, d) of volumes, t, t_hat (P, d) of prompts -> (N, P); by default cos(v, t) and cos(v_hat, t)."""
    images, texts = joint_vectors(v, v_hat, t, t_hat, pairs)
    return images @ texts.mT


def joint_vectors(v, v_hat, t, t_hat, pairs=PAIRS[:2]):
    """Unit vectors (N, D), (P, D) whose inner product is the mean cosine of the pairs: each pair's two sides, side by side."""
    unit = {name: F.normalize(x, dim=-1) / len(pairs) ** 0.5 for name, x in (("v", v), ("v_hat", v_hat), ("t", t), ("t_hat", t_hat))}
    return (torch.cat([unit[pair.split("-")[side]] for pair in pairs], dim=-1) for side in (0, 1))


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"
