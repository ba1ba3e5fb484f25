"""A decoder language model from a Hugging Face checkpoint on the user's own disk: Llama, Mistral,
Qwen2 or Qwen3, with its weights, its chat template and batched generation. Nothing is downloaded.

    prompts (ids) --prefill--> keys and values in a cache --decode, one token at a time--> answers

A prompt's constant head (an instruction with its examples) is computed once and shared by all rows.
This file needs nothing of the project, so copy it.

Example:

    import json, torch, llm
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 16,
              "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shapes = llm.Config.from_dict(config).shapes()
    words = {word: i for i, word in enumerate("<unk> there is no effusion nodule and .".split())}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save("tokenizer.json")
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, "model.safetensors")
    json.dump(config, open("config.json", "w"))
    model = llm.LLM.from_pretrained(".", "cpu")
    texts = model.generate(["there is no nodule .", "effusion"], max_new_tokens=5)
    assert len(texts) == 2 and model.logits(torch.tensor([[1, 2]])).shape == (1, 2, 8)
"""
import json
import math
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jinja2
import torch
import torch.nn.functional as F
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

# ---- the checkpoint ------------------------------------------------------------------------------

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@dataclass
class Config:
    """What the decoder needs to know of config.json."""
    vocab: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    context: int
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: list              # per layer, the sliding window in tokens or None
    frequencies: torch.Tensor  # (head_dim / 2,), of the rotary embedding

    @classmethod
    def from_dict(cls, raw, name="config.json"):
        """Read a Hugging Face config; ValueError, naming the file, on what isn't supported."""
        family = FAMILIES.get((raw.get("architectures") or [None])[0])
        if family is None:
            wanted = f"is not supported; use one of {', '.join(FAMILIES)}"
            raise ValueError(f"{name}: architecture {raw.get('architectures')} {wanted}")
        for key, wanted in (("hidden_act", "silu"), ("quantization_config", None)):
            if raw.get(key, wanted) != wanted:
                mend = f"use an unquantized checkpoint with {key} = {wanted!r}"
                raise ValueError(f"{name}: {key} = {raw[key]!r} is not supported; {mend}")
        try:
            heads, width = raw["num_attention_heads"], raw["hidden_size"]
            head_dim = raw.get("head_dim") or width // heads
            bias = raw.get("attention_bias", False)
            return cls(
                vocab=raw["vocab_size"],
                width=width,
                hidden=raw["intermediate_size"],
                layers=raw["num_hidden_layers"],
                heads=heads,
                kv_heads=raw.get("num_key_value_heads") or heads,
                head_dim=head_dim,
                eps=raw.get("rms_norm_eps", 1e-6),
                context=raw.get("max_position_embeddings", 2048),
                tied=raw.get("tie_word_embeddings", False),
                qkv_bias=bias or family == "qwen2",
                out_bias=bias and family in ("llama", "qwen3"),
                mlp_bias=family == "llama" and raw.get("mlp_bias", False),
                qk_norm=family == "qwen3",
                windows=sliding_windows(raw, family),
                frequencies=rope_frequencies(raw, head_dim, name),
            )
        except KeyError as error:
            missing = f"key {error} is missing; fetch the checkpoint again"
            raise ValueError(f"{name}: {missing}") from None

    def layer_shapes(self):
        """The name table: our weight -> {Hugging Face's name within a layer: its shape}.

        Where there are several, ours is their concatenation along the rows.
        """
        d, f, norm = self.width, self.hidden, (self.head_dim,)
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        table = {
            "attn_norm": {"input_layernorm.weight": (d,)},
            "qkv": {
                "self_attn.q_proj.weight": (q, d),
                "self_attn.k_proj.weight": (kv, d),
                "self_attn.v_proj.weight": (kv, d),
            },
            "qkv_bias": {
                "self_attn.q_proj.bias": (q,),
                "self_attn.k_proj.bias": (kv,),
                "self_attn.v_proj.bias": (kv,),
            },
            "qk_norm": {"self_attn.q_norm.weight": norm, "self_attn.k_norm.weight": norm},
            "out": {"self_attn.o_proj.weight": (d, q)},
            "out_bias": {"self_attn.o_proj.bias": (d,)},
            "mlp_norm": {"post_attention_layernorm.weight": (d,)},
            "gate_up": {"mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d)},
            "gate_up_bias": {"mlp.gate_proj.bias": (f,), "mlp.up_proj.bias": (f,)},
            "down": {"mlp.down_proj.weight": (d, f)},
            "down_bias": {"mlp.down_proj.bias": (d,)},
        }
        absent = {
            "qkv_bias": not self.qkv_bias, "qk_norm": not self.qk_norm,
            "out_bias": not self.out_bias, "gate_up_bias": not self.mlp_bias,
            "down_bias": not self.mlp_bias,
        }
        return {name: parts for name, parts in table.items() if not absent.get(name)}

    def shapes(self):
        """Every tensor of the checkpoint: Hugging Face's name -> shape."""
        shapes = {
            "model.embed_tokens.weight": (self.vocab, self.width),
            "model.norm.weight": (self.width,),
        }
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, self.width)
        for i in range(self.layers):
            for parts in self.layer_shapes().values():
                shapes |= {f"model.layers.{i}.{name}": shape for name, shape in parts.items()}
        return shapes


def sliding_windows(raw, family):
    """Per layer, the sliding window in tokens or None."""
    layers, window, first = raw["num_hidden_layers"], raw.get("sliding_window"), 0
    if family == "llama" or family != "mistral" and not raw.get("use_sliding_window"):
        window = None
    if family != "mistral":
        first = raw.get("max_window_layers", 0)
    kinds = raw.get("layer_types")
    if not kinds:
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return [window if kind == "sliding_attention" else None for kind in kinds]


def rope_frequencies(raw, head_dim, name="config.json"):
    """Inverse frequencies (head_dim / 2,) of the rotary embedding; plain, linear or Llama 3's."""
    rope = raw.get("rope_parameters")
    if not rope:
        rope = (raw.get("rope_scaling") or {}) | {"rope_theta": raw.get("rope_theta", 10000.0)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = rope.get("rope_theta", 10000.0) ** -exponents
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / rope["factor"]
    if kind == "llama3":
        # Turns within the original context: few turns are stretched by the factor, many stay.
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        stays = ((turns - low) / (high - low)).clamp(0, 1)
        return torch.lerp(frequencies / rope["factor"], frequencies, stays)
    supported = "is not supported; default, linear and llama3 are"
    raise ValueError(f"{name}: rope scaling {kind!r} {supported}")


class Weights:
    """A checkpoint's *.safetensors, memory-mapped: `weights[name]` is read when it is asked for.

    Every name and shape is checked against `shapes` first; ValueError names what doesn't fit.
    """

    def __init__(self, directory, shapes):
        index, files = directory / "model.safetensors.index.json", ["model.safetensors"]
        if index.exists():
            files = sorted(set(read_json(index)["weight_map"].values()))
        self.file, present = {}, {}
        for file in files:
            for name, shape in self._shapes_in(directory / file).items():
                self.file[name], present[name] = directory / file, shape
        for name, shape in shapes.items():
            if name not in present:
                missing = f"tensor {name} is missing from its safetensors"
                raise ValueError(f"{directory}: {missing}; fetch the checkpoint again")
            if present[name] != shape:
                differs = f"tensor {name} has shape {present[name]}, but config.json says {shape}"
                raise ValueError(f"{self.file[name]}: {differs}")
        for name in present.keys() - shapes.keys():
            in_vain = name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"
            if not in_vain:  # what old checkpoints and tied ones carry
                extra = f"tensor {name} has no place in this architecture"
                raise ValueError(f"{self.file[name]}: {extra}; check config.json")

    @staticmethod
    def _shapes_in(file):
        if not file.exists():
            mend = "fetch the whole checkpoint (weights must be safetensors)"
            raise ValueError(f"{file}: no such file; {mend}")
        try:
            with safe_open(file, "pt") as opened:
                return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged or truncated ({error}); fetch it again") from None

    def __getitem__(self, name):
        # Opened anew each time, so that the mapped pages go when the tensor goes.
        with safe_open(self.file[name], "pt") as tensors:
            return tensors.get_tensor(name)


def read_json(path):
    """Parse a JSON file; ValueError names it where it is absent or no JSON."""
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        mend = "give the directory of a Hugging Face checkpoint"
        raise ValueError(f"{path}: no such file; {mend}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


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


# ---- the decoder ---------------------------------------------------------------------------------
#
# Plain classes over weight tensors. Rows of a batch are padded on the left, so that all of them
# decode into the same slot of the cache; a row's position is its slot less its padding.

class KVCache:
    """Keys and values of one layer, (B, kv_heads, slots, head_dim) each."""

    def __init__(self, B, slots, config, dtype, device):
        shape = B, config.kv_heads, slots, config.head_dim
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def update(self, slots, k, v, span):
        """Write k, v (B, kv_heads, T, head_dim) to `slots` (T,); return all up to slot `span`."""
        k = self.k.index_copy_(2, slots, k)[:, :, :span]
        v = self.v.index_copy_(2, slots, v)[:, :, :span]
        return k, v

    def keep(self, rows):
        """Leave out all rows but these."""
        self.k, self.v = self.k[rows], self.v[rows]


class Attention:
    """Grouped-query attention with rotary positions: x (B, T, width) -> (B, T, width)."""

    def __init__(self, config, weights):
        self.config, self.weights = config, weights
        # Which of the normalised heads is a key, for Qwen3's two norms.
        kinds = [0] * config.heads + [1] * config.kv_heads
        self.is_key = torch.tensor(kinds, device=weights["attn_norm"].device)

    def __call__(self, x, rotary, masks, slots, span, cache=None, head=None):
        c, w, (B, T, _) = self.config, self.weights, x.shape
        group = c.heads // c.kv_heads
        qkv = linear(x, w["qkv"], w.get("qkv_bias")).view(B, T, -1, c.head_dim)
        qk, v = qkv.split([c.heads + c.kv_heads, c.kv_heads], 2)
        if c.qk_norm:
            norms = w["qk_norm"].view(2, -1)[self.is_key]
            qk = F.rms_norm(qk, (c.head_dim,), None, c.eps) * norms
        q, k = rotate(qk, *rotary).split([c.heads, c.kv_heads], 2)
        k, v = k.transpose(1, 2), v.transpose(1, 2)                # (B, kv_heads, T, D)
        # Queries that share a key head lie side by side, as if they were further tokens.
        q = q.reshape(B, T, c.kv_heads, group, -1).transpose(1, 2)
        q = q.reshape(B, c.kv_heads, T * group, -1)                # (B, kv_heads, T * group, D)
        if cache is not None:
            k, v = cache.update(slots, k, v, span)                 # (B, kv_heads, span, D)
        mask, head_mask = masks
        y = attend(q, k, v, mask, head, head_mask)
        y = y.view(B, c.kv_heads, T, group, -1).transpose(1, 2).reshape(B, T, -1)
        return linear(y, w["out"], w.get("out_bias"))


class Block:
    """Attention and a gated MLP, each behind an RMS norm and around a shortcut."""

    def __init__(self, config, weights, window):
        self.config, self.weights, self.window = config, weights, window
        self.attention = Attention(config, weights)

    def __call__(self, x, *context):
        x = x + self.attention(self.norm(x, "attn_norm"), *context)
        return x + self.mlp(self.norm(x, "mlp_norm"))

    def norm(self, x, name):
        return F.rms_norm(x, (self.config.width,), self.weights[name], self.config.eps)

    def mlp(self, x):
        w = self.weights
        gate, up = linear(x, w["gate_up"], w.get("gate_up_bias")).chunk(2, -1)
        return linear(F.silu(gate) * up, w["down"], w.get("down_bias"))


class LLM:
    """A decoder of one of the four families, with its tokenizer."""

    def __init__(
        self, config, weights, directory=None, device="cpu", dtype=torch.float32, trainable=False
    ):
        """config: Hugging Face's, a dict; weights: Hugging Face's names -> tensors.

        trainable: leave the weights plain on the CPU, and copy them out of their mapped file.
        """
        self.raw, self.directory = config, directory
        self.config = Config.from_dict(config, f"{directory or ''}/config.json")
        self.device, self.dtype = torch.device(device), dtype
        packs = self.device.type == "cpu" and not trainable

        def get(name):
            return weights[name].to(self.device, dtype, copy=trainable)

        def prepared(weight):
            return pack(weight) if packs and weight.ndim == 2 else weight

        self.embedding, self.norm = get("model.embed_tokens.weight"), get("model.norm.weight")
        self.head = prepared(self.embedding if self.config.tied else get("lm_head.weight"))
        self.blocks = []
        for i, window in enumerate(self.config.windows):
            layer = {}
            for name, parts in self.config.layer_shapes().items():
                tensors = [get(f"model.layers.{i}.{part}") for part in parts]
                layer[name] = prepared(torch.cat(tensors) if len(tensors) > 1 else tensors[0])
            self.blocks.append(Block(self.config, layer, window))
        self.frequencies = self.config.frequencies.to(self.device)
        self.shared = (), None  # the last constant head, and its keys and values

    @classmethod
    def from_pretrained(cls, directory, device=None, dtype=None, trainable=False):
        """Load a checkpoint's directory; dtype: the weights' own (float32 where the CPU lacks it).

        Raises ValueError or OSError, naming the file and what is wrong with it.
        """
        directory = Path(directory)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        raw = read_json(directory / "config.json")
        shapes = Config.from_dict(raw, directory / "config.json").shapes()
        weights = Weights(directory, shapes)
        if dtype is None:
            dtype = weights["model.norm.weight"].dtype
            dtype = torch.float32 if device.type == "cpu" and not fast_on_cpu(dtype) else dtype
        return cls(raw, weights, directory, device, dtype, trainable)

    @cached_property
    def tokenizer(self):
        """The checkpoint's tokenizers.Tokenizer."""
        return read_tokenizers(self.directory)[0]

    @cached_property
    def stops(self):
        """Ids that end an answer: those of generation_config.json, else of config.json."""
        path = self.directory / "generation_config.json" if self.directory else None
        generation = read_json(path) if path and path.exists() else {}
        stops = generation.get("eos_token_id", self.raw.get("eos_token_id"))
        if stops is None:
            return set()
        return set(stops) if isinstance(stops, list) else {stops}

    def parameters(self):
        """Every weight tensor, each once."""
        whole = [self.embedding, self.norm] + ([] if self.config.tied else [self.head])
        return whole + [weight for block in self.blocks for weight in block.weights.values()]

    def state_dict(self):
        """The weights under Hugging Face's names (of a trainable model)."""
        state = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        if not self.config.tied:
            state["lm_head.weight"] = self.head
        for i, block in enumerate(self.blocks):
            for name, shapes in self.config.layer_shapes().items():
                parts = block.weights[name].split([shape[0] for shape in shapes.values()])
                for part, tensor in zip(shapes, parts):
                    state[f"model.layers.{i}.{part}"] = tensor
        return state

    def hidden(self, ids, pad=None, slots=None, span=None, cache=None, head=None):
        """Final hidden states (B, T, width) of ids (B, T).

        Row b's tokens lie in the cache's `slots` (T,), the same for all rows; its first pad[b]
        slots are padding. cache: a KVCache per layer, written here and read up to slot `span`.
        head: per layer (k, v), each (1, kv_heads, N, head_dim), of a prefix that all rows share.
        """
        B, T = ids.shape
        slots = torch.arange(T, device=self.device) if slots is None else slots
        pad = torch.zeros(1, dtype=torch.long, device=self.device) if pad is None else pad
        span = span or T
        start = head[0][0].shape[2] if head else 0                                  # N
        positions = slots + start - pad[:, None]                                    # (B or 1, T)
        held = torch.arange(span, device=self.device) + start - pad[:, None]
        rotary = self._rotary(positions)
        masks = {}
        for window in set(self.config.windows):
            masks[window] = self._masks(positions, held, start, window, B)
        x = F.embedding(ids.to(self.embedding.device), self.embedding)              # (B, T, width)
        for i, block in enumerate(self.blocks):
            own, shared = cache and cache[i], head and head[i]
            x = block(x, rotary, masks[block.window], slots, span, own, shared)
        return F.rms_norm(x, (self.config.width,), self.norm, self.config.eps)

    def _rotary(self, positions):
        """cos and sin (B or 1, T, 1, head_dim) of the rotary embedding at positions (B or 1, T)."""
        angles = positions[..., None].float() * self.frequencies
        angles = torch.cat((angles, angles), -1)[:, :, None]
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def _masks(self, positions, held, start, window, B):
        """Additive masks for queries at `positions` (B or 1, T) and own slots that hold `held`.

        Of the own slots (B or 1, 1, T * group, span), and of the shared head
        (1, 1, B * T * group, start), None where all of it is seen.
        """
        group = self.config.heads // self.config.kv_heads
        fill = torch.finfo(self.dtype).min / 2  # finite, so that a row of padding gives no NaN

        def additive(seen):
            mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
            return mask.masked_fill_(~seen, fill).repeat_interleave(group, 1)

        queries, keys = positions[:, :, None], held[:, None]
        seen = (keys <= queries) & (keys >= start)
        if window is None:
            return additive(seen)[:, None], None
        own = additive(seen & (keys > queries - window))[:, None]
        if not start:
            return own, None
        head = additive(torch.arange(start, device=self.device) > queries - window)
        return own, head.expand(B, -1, -1).reshape(1, 1, -1, start)

    @torch.inference_mode()
    def logits(self, ids):
        """ids (B, T) -> logits (B, T, vocab)."""
        return linear(self.hidden(ids.to(self.device)), self.head)

    # ---- generation

    def generate(self, prompts, max_new_tokens=256, **settings):
        """Continue each prompt (str, or a list of ids) -> list of str, without special tokens.

        Special tokens in a str count as such. settings: see generate_ids.
        """
        ids = [self._ids(prompt) for prompt in prompts]
        answers = dict(self.generate_ids(ids, max_new_tokens, **settings))
        return [self.tokenizer.decode(answers[i]) for i in range(len(ids))]

    def _ids(self, prompt):
        return self.tokenizer.encode(prompt).ids if isinstance(prompt, str) else list(prompt)

    @torch.inference_mode()
    def generate_ids(
        self, prompts, max_new_tokens=256, temperature=0.0, top_p=1.0, seed=0, batch_size=8,
        share_prefix=True,
    ):
        """Yield (index, new ids without the stop token) of prompts (lists of ids), longest first.

        Greedy at temperature 0; otherwise nucleus sampling, in which a row's draws depend on
        (seed, its index) alone, not on its batch. ValueError where a prompt doesn't fit.
        """
        context = self.config.context
        for i, prompt in enumerate(prompts):
            if not prompt or len(prompt) + max_new_tokens > context:
                fit = f"with {max_new_tokens} new ones it must fit a context of {context}"
                raise ValueError(f"prompt {i} has {len(prompt)} tokens; {fit}")
        head = []
        if share_prefix and len(prompts) > 1:
            head = os.path.commonprefix([prompt[:-1] for prompt in prompts])
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for at in range(0, len(order), batch_size):
            rows = order[at:at + batch_size]
            draws = []
            for i in rows:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
                draws.append(torch.rand(max_new_tokens, generator=generator))
            own = [prompts[i][len(head):] for i in rows]
            sampling = temperature, top_p, torch.stack(draws)
            yield from zip(rows, self._batch(own, self._head(head), max_new_tokens, sampling))

    def _cache(self, B, slots):
        return [KVCache(B, slots, self.config, self.dtype, self.device) for _ in self.blocks]

    def _head(self, ids):
        """Keys and values of a constant prompt head, kept until another head is asked for."""
        if not ids:
            return None
        if self.shared[0] != tuple(ids):
            cache = self._cache(1, len(ids))
            self.hidden(torch.tensor([ids], device=self.device), span=len(ids), cache=cache)
            self.shared = tuple(ids), [(layer.k, layer.v) for layer in cache]
        return self.shared[1]

    def _prefill(self, prompts, head, slots):
        """(logits (B, vocab) after the prompts, pad (B,), cache of so many slots)."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts], device=self.device)
        pad = torch.tensor([width - len(row) for row in prompts], device=self.device)
        cache = self._cache(len(prompts), slots)
        places = torch.arange(width, device=self.device)
        x = self.hidden(ids, pad, places, width, cache, head)[:, -1:].clone()
        return linear(x, self.head)[:, -1], pad, cache

    def _batch(self, prompts, head, max_new_tokens, sampling):
        """New ids of each prompt, all decoded side by side."""
        temperature, top_p, draws = sampling
        width = max(map(len, prompts))
        logits, pad, cache = self._prefill(prompts, head, width + max_new_tokens)
        answers, running = [[] for _ in prompts], [True] * len(prompts)
        live, decode = list(range(len(prompts))), None
        for step in range(max_new_tokens):
            chosen = choose(logits, temperature, top_p, draws[live, step])
            for row, token in zip(live, chosen.tolist()):
                running[row] = running[row] and token not in self.stops
                if running[row]:
                    answers[row].append(token)
            going = [place for place, row in enumerate(live) if running[row]]
            if not going or step + 1 == max_new_tokens:
                break
            # Finished rows leave once they are a quarter of the batch: so the copying stays small.
            if 4 * len(going) <= 3 * len(live):
                live = [live[place] for place in going]
                rows = torch.tensor(going, device=self.device)
                chosen, pad, decode = chosen[rows], pad[rows], None
                for layer in cache:
                    layer.keep(rows)
            decode = decode or self._decoder(pad, cache, head, width + step)
            logits = decode(chosen[:, None], width + step)
        return answers

    def _decoder(self, pad, cache, head, slot):
        """One decoding step, (ids (B, 1), slot) -> logits (B, vocab); on CUDA a replayed graph."""
        def step(ids, slots, span):
            return linear(self.hidden(ids, pad, slots, span, cache, head), self.head)[:, -1]

        if self.device.type != "cuda":
            return lambda ids, slot: step(ids, torch.tensor([slot], device=self.device), slot + 1)
        ids = torch.zeros(len(pad), 1, dtype=torch.long, device=self.device)
        slots, span = torch.tensor([slot], device=self.device), cache[0].k.shape[2]
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        # A first run lets libraries set themselves up; what it writes to `slot` is overwritten.
        with torch.cuda.stream(stream):
            step(ids, slots, span)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            logits = step(ids, slots, span)

        def replay(new_ids, slot):
            ids.copy_(new_ids)
            slots.fill_(slot)
            graph.replay()
            return logits
        return replay


def choose(logits, temperature, top_p, draws):
    """The next token of each row (B,) from logits (B, vocab).

    The likeliest, or sampled from the nucleus of mass top_p by uniform draws (B,).
    """
    if not temperature:
        return logits.argmax(-1)
    p, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    mass = p.cumsum(-1)
    place = torch.searchsorted(mass, draws[:, None].to(mass) * mass[:, -1:], right=True)
    return order.gather(-1, place.clamp(max=p.count_nonzero(-1)[:, None] - 1))[:, 0]


def rotate(x, cos, sin):
    """Rotary embedding of x (B, T, heads, D), with cos and sin (B, T, 1, D)."""
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat((-b, a), -1), sin)


def attend(q, k, v, mask, head=None, head_mask=None):
    """Attention of q (B, H, Q, D) to its own k, v (B, H, S, D) and to a shared head's, if given.

    head: (k, v), each (1, H, N, D). It is read once for the whole batch, and both parts are joined
    by their log-sum-exp, which is exact.
    """
    if head is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    B, H, Q, D = q.shape
    own, own_lse = attend_with_lse(q, k, v, mask)
    all_rows = q.transpose(0, 1).reshape(1, H, B * Q, D)
    shared, shared_lse = attend_with_lse(all_rows, *head, head_mask)
    shared = shared.view(H, B, Q, D).transpose(0, 1)
    shared_lse = shared_lse.view(H, B, Q).transpose(0, 1)
    share = torch.sigmoid(shared_lse - own_lse).unsqueeze(-1).to(own.dtype)
    return torch.lerp(own, shared, share)


def attend_with_lse(q, k, v, mask=None):
    """(softmax(q k^T / sqrt(D) + mask) v, the log-sum-exp (B, H, Q) of its scores in float32)."""
    if q.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(q, k, v, 0.0, False, attn_mask=mask, scale=None)
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1).to(v.dtype) @ v, scores.logsumexp(-1)


# What makes the CPU fast: oneDNN's blocked layout, with which a step at batch 8 runs two to three
# times as fast as from plain rows.

def linear(x, weight, bias=None):
    """x weight^T + bias; a packed weight goes through oneDNN directly."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def pack(weight):
    """Re-order a CPU weight (out, in) once into oneDNN's blocked layout, where it pays."""
    fast = fast_on_cpu(weight.dtype)
    return torch.ops.mkldnn._reorder_linear_weight(weight, 8) if fast else weight


def fast_on_cpu(dtype):
    """Whether this CPU computes in the dtype itself."""
    mkldnn = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


# ---- the chat prompt -----------------------------------------------------------------------------

PLAIN_TEMPLATE = """{{ bos_token }}{% for m in messages %}{{ m.content }}

{% endfor %}"""  # for checkpoints without a chat template


def read_tokenizers(directory):
    """(tokenizer, the same without special tokens, the special tokens' ids) of a checkpoint."""
    path = Path(directory) / "tokenizer.json"
    raw = read_json(path)
    plain_raw = raw | {"added_tokens": [], "post_processor": None}
    try:
        tokenizer = Tokenizer.from_str(json.dumps(raw))
        plain = Tokenizer.from_str(json.dumps(plain_raw))
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"{path}: not a tokenizer ({error})") from None
    for one in (tokenizer, plain):
        one.no_truncation()
        one.no_padding()
    return tokenizer, plain, {token["id"] for token in raw.get("added_tokens", [])}


class Chat:
    """The prompt of a user's text, in the words of a checkpoint's tokenizer and chat template.

    system: the instruction; examples: pairs (user's text, answer), shown as earlier turns;
    plain_template: for a checkpoint without a template. Text that only looks like a special token
    is encoded as plain text, so that no token of the user's text can end its turn or open another.
    Raises ValueError, naming the file, where tokenizer or template can't be used.
    """
    PLACE = "\uE000report\uE000"  # part of the prompt whose hash stands in summaries.jsonl

    def __init__(self, directory, system="", examples=(), plain_template=PLAIN_TEMPLATE):
        self.tokenizer, self.plain, self.special = read_tokenizers(directory)
        settings = read_json(Path(directory) / "tokenizer_config.json")
        file = Path(directory) / "chat_template.jinja"
        template = settings.get("chat_template") or plain_template
        if file.exists():
            template = file.read_text("utf-8")
        elif isinstance(template, list):
            named = {entry["name"]: entry["template"] for entry in template}
            template = named["default"]
        turns = []
        for text, answer in examples:
            turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        turns.append({"role": "user", "content": self.PLACE})
        names = special_names(settings)
        try:
            self.text = render(template, names, [{"role": "system", "content": system}, *turns])
        except jinja2.TemplateError:  # a template without a system role: the first turn carries it
            turns[0] = {"role": "user", "content": f"{system}\n\n{turns[0]['content']}"}
            try:
                self.text = render(template, names, turns)
            except jinja2.TemplateError as error:
                where = file if file.exists() else directory
                raise ValueError(f"{where}: the chat template fails ({error})") from None
        before, after = self.text.split(self.PLACE)
        self.before = self.tokenizer.encode(before, add_special_tokens=False).ids
        self.after = self.tokenizer.encode(after, add_special_tokens=False).ids

    def prompts(self, texts, room):
        """[(ids of the text's prompt in at most `room` tokens, whether the text was cut to fit)].

        A text is cut after a sentence. Raises ValueError where there is no room for any.
        """
        constant = len(self.before) + len(self.after)
        room -= constant
        if room < 16:
            none = f"the instruction's {constant} tokens leave none for a text in this context"
            raise ValueError(f"{none}; use a checkpoint with a longer one")
        texts, prompts = [text.strip() for text in texts], []
        for text, encoding in zip(texts, self.plain.encode_batch(texts, add_special_tokens=False)):
            ids, cut = encoding.ids, len(encoding.ids) > room
            if cut:
                text = cut_after_sentence(text[:encoding.offsets[room][0]])
                ids = self.plain.encode(text, add_special_tokens=False).ids[:room]
            ids = [i for i in ids if i not in self.special]
            prompts.append((self.before + ids + self.after, cut))
        return prompts


def cut_after_sentence(text):
    """text up to its last whole sentence, or else its last whole word."""
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s)|\n", text)]
    if not ends:
        ends = [match.start() for match in re.finditer(r"\s", text)]
    return text[:ends[-1]] if ends else text


def special_names(settings):
    """tokenizer_config.json's *_token entries as the names that chat templates use."""
    names = {"bos_token": "", "eos_token": ""}
    for name, value in settings.items():
        if name.endswith("_token"):
            names[name] = value["content"] if isinstance(value, dict) else value or ""
    return names


def render(template, names, messages):
    """A chat template's text for the messages, in jinja2's sandbox and as transformers does it.

    There is no clock: the same text gives the same prompt on any day.
    """
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, **options):
        return json.dumps(value, ensure_ascii=False, **options)

    loops = ["jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=loops
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = tojson
    return environment.from_string(template).render(
        messages=messages, add_generation_prompt=True, enable_thinking=False, **names
    )
