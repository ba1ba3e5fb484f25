"""A decoder language model from a Hugging Face checkpoint: weights, chat prompt, generation.

    x = embedding[ids]
    x = x + attention(norm(x)),  x = x + mlp(norm(x))     in every block
    logits = norm(x) head^T

Any unquantized checkpoint of the Llama, Mistral, Qwen2 or Qwen3 family will do. Prompts that begin
alike are read once up to where they part. Nothing is downloaded, nothing leaves the machine.
This file needs nothing of the project. It goes: a block, the whole model and its generation, the
prompt of a chat, the checkpoint's files, and what makes all of it fast.

Example:

    # A tiny Llama of random weights is written into this folder, and continues two prompts.
    import json, torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from llm import LLM, Config
    words = {"<end>": 0, "small": 1, "large": 2, "heart": 3, "lung": 4}
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "vocab_size": 5,
              "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
              "eos_token_id": 0}
    shapes = Config(config).shapes()
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, "model.safetensors")
    tokenizer = Tokenizer(models.WordLevel(words, "<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save("tokenizer.json")
    with open("config.json", "w") as file:
        json.dump(config, file)
    llm = LLM.from_pretrained(".")
    texts = llm.generate(["small heart", "large"], max_new_tokens=5)
    assert len(texts) == 2 and set(" ".join(texts).split()) <= set(words)
"""
import json
import math
import os
import re
import subprocess
import sys
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer


# ---- the decoder ---------------------------------------------------------------------------------
class Block:
    """Attention, then an MLP (SwiGLU), each on the normed stream and added to it."""

    def __init__(self, config, weights, layer):
        """weights: those of a layer, by the names of LAYER (below); layer: which one it is."""
        self.weights, self.eps = weights, config.eps
        self.attention = Attention(config, weights, layer)

    def __call__(self, x, layout, cache=None):
        x = x + self.attention(norm(x, self.weights["attention_norm"], self.eps), layout, cache)
        return x + self.mlp(norm(x, self.weights["mlp_norm"], self.eps))

    def mlp(self, x):
        w = self.weights
        gate, up = linear(x, w["gate_up"], w.get("gate_up_bias")).chunk(2, -1)
        return linear(F.silu(gate) * up, w["down"], w.get("down_bias"))


class Attention:
    """Causal attention with rotary positions; a group of queries shares its keys and values."""

    def __init__(self, config, weights, layer):
        self.config, self.weights, self.layer = config, weights, layer

    def __call__(self, x, layout, cache=None):
        c, w, D = self.config, self.weights, self.config.head_dim
        B, T, _ = x.shape
        qkv = linear(x, w["qkv"], w.get("qkv_bias")).view(B, T, -1, D)
        q, k, v = qkv.split([c.heads, c.kv_heads, c.kv_heads], 2)  # each (B, T, its heads, D)
        if "qk_norm" in w:
            q_norm, k_norm = w["qk_norm"].chunk(2)
            q = F.rms_norm(q, (D,), eps=c.eps) * q_norm
            k = F.rms_norm(k, (D,), eps=c.eps) * k_norm
        q, k = layout.rotate(q), layout.rotate(k)
        k, v, prefix = k.transpose(1, 2), v.transpose(1, 2), None  # (B, kv_heads, T, D)
        if cache:
            k, v, prefix = cache.update(self.layer, layout, k, v)  # (B, kv_heads, S, D)

        # The queries of a group stand below each other, as if they were more tokens.
        q = q.reshape(B, T, c.kv_heads, -1, D).transpose(1, 2)
        q = q.reshape(B, c.kv_heads, -1, D)  # (B, kv_heads, T group, D)
        mask, prefix_mask = layout.masks[c.windows[self.layer]]
        y = attend(q, k, v, mask, prefix, prefix_mask)
        y = y.view(B, c.kv_heads, T, -1, D).transpose(1, 2).reshape(B, T, -1)
        return linear(y, w["out"], w.get("out_bias"))


def norm(x, weight, eps):
    """RMS norm of x (..., width)."""
    return F.rms_norm(x, weight.shape, weight, eps)


class KVCache:
    """Keys and values of each layer by slot, (B, kv_heads, slots, D), of texts padded on the left.

    pad (B,): how many slots the padding takes in each row. prefix: the cache, of one row without
    padding, of a beginning that all texts share.
    """

    def __init__(self, config, pad, slots, dtype, prefix=None):
        self.pad, self.slots, self.prefix, self.layers = pad, slots, prefix, []
        shape = len(pad), config.kv_heads, slots, config.head_dim
        for _ in range(config.layers):
            k = torch.zeros(shape, dtype=dtype, device=pad.device)
            self.layers.append((k, torch.zeros_like(k)))

    def update(self, layer, layout, k, v):
        """Write k, v (B, kv_heads, T, D) into the layout's slots -> what it sees: k, v, prefix."""
        keys, values = self.layers[layer]
        keys.index_copy_(2, layout.slots, k)
        values.index_copy_(2, layout.slots, v)
        prefix = self.prefix and self.prefix.layers[layer]
        return keys[:, :, :layout.span], values[:, :, :layout.span], prefix

    def keep(self, rows):
        """Drop all rows but these."""
        self.pad = self.pad[rows]
        for layer, (k, v) in enumerate(self.layers):
            self.layers[layer] = k[rows], v[rows]


class Layout:
    """Where the T tokens of one forward pass lie, for all blocks: slots, rotation, masks.

    All rows' tokens lie in the slots `slots` (T,) and see those below `span`. The first pad[b] of
    row b are padding; a prefix of `start` tokens comes before the rest.
    """

    def __init__(self, config, slots, span, pad, start, dtype):
        self.slots, self.span = slots, span
        shift = start - pad[:, None]  # from a slot to its token's position
        queries = (slots + shift)[:, :, None]  # (B, T, 1)
        keys = (torch.arange(span, device=pad.device) + shift)[:, None]  # (B, 1, S)
        angles = queries.float() * config.frequencies
        angles = torch.cat((angles, angles), -1)[:, :, None]  # (B, T, 1, D)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

        def additive(seen):
            # Not minus infinity: a row of padding sees nothing, and must give no NaN.
            mask = (~seen).to(dtype) * (torch.finfo(dtype).min / 2)
            return mask.repeat_interleave(config.heads // config.kv_heads, 1)[:, None]

        # By window: the masks of the own slots (B, 1, T group, S) and of the prefix, in which the
        # rows stand below each other (1, 1, B T group, N). Without a window all of it is seen.
        causal = (keys <= queries) & (keys >= start)
        prefix = torch.arange(start, device=pad.device)
        self.masks = {}
        for window in set(config.windows):
            if window is None:
                self.masks[None] = additive(causal), None
            else:
                first = queries - window  # what lies just before the window
                near = additive(prefix > first).flatten(0, 2)[None, None]
                self.masks[window] = additive(causal & (keys > first)), near

    def rotate(self, x):
        """The rotary embedding (arXiv 2104.09864) of x (B, T, heads, D)."""
        a, b = x.chunk(2, -1)
        return torch.addcmul(x * self.cos, torch.cat((-b, a), -1), self.sin)


# ---- the whole model -----------------------------------------------------------------------------
class LLM:
    """A decoder with its tokenizer."""

    def __init__(self, config, weights, directory, device, dtype, trainable=False):
        """weights: a mapping from Hugging Face's names to tensors.

        trainable: copies that require gradients; else those on a CPU are packed, for speed.
        """
        self.config, self.directory = config, Path(directory)
        self.device, self.dtype = torch.device(device), dtype
        config.frequencies = config.frequencies.to(device)
        self.weights = []  # of the whole model, then of each layer
        for table in config.tables():
            group = {}
            for name, tensors in table.items():
                parts = [weights[tensor].to(device, dtype, copy=trainable) for tensor in tensors]
                weight = parts[0] if len(parts) == 1 else torch.cat(parts)
                weight.requires_grad_(trainable)
                group[name] = weight if name == "embedding" else pack(weight)
            self.weights.append(group)
        whole, *layers = self.weights
        self.embedding, self.norm = whole["embedding"], whole["norm"]
        self.head = whole["head"] if "head" in whole else pack(self.embedding)
        self.blocks = [Block(config, group, layer) for layer, group in enumerate(layers)]
        self.prefix = [], None  # the last one that prompts shared, and its cache

    @classmethod
    def from_pretrained(cls, directory, device=None, dtype=None, trainable=False):
        """Load a checkpoint's directory; dtype: the weights' own, or float32 if the CPU lacks it.

        Raises ValueError or OSError, which name the file and what is wrong with it.
        """
        device, path = find_device(device), Path(directory) / "config.json"
        config = Config(read_json(path), path)
        weights = Weights(path.parent, config.shapes())
        if dtype is None:
            dtype = weights["model.norm.weight"].dtype
            if device.type == "cpu" and not fast_on_cpu(dtype):
                dtype = torch.float32
        return cls(config, weights, directory, device, dtype, trainable)

    def state_dict(self):
        """The weights by Hugging Face's names (of a trainable model)."""
        state = {}
        for table, group in zip(self.config.tables(), self.weights):
            for name, shapes in table.items():
                rows = [shape[0] for shape in shapes.values()]
                state |= zip(shapes, group[name].split(rows))
        return state

    @cached_property
    def tokenizer(self):
        return make_tokenizer(read_json(self.directory / "tokenizer.json"), self.directory)

    @cached_property
    def stops(self):
        """Ids that end an answer: those of generation_config.json, else those of config.json."""
        path = self.directory / "generation_config.json"
        settings = self.config.raw | (read_json(path) if path.exists() else {})
        stops = settings.get("eos_token_id")
        if not isinstance(stops, list):
            stops = [] if stops is None else [stops]
        if not {int}.issuperset(map(type, stops)):
            raise ValueError(f"{path}: eos_token_id is {stops}, not ids; fetch it again")
        return set(stops)

    def hidden(self, ids, layout=None, cache=None):
        """Final hidden states (B, T, width) of ids (B, T); a cache is read and written."""
        if layout is None:
            slots = torch.arange(ids.shape[1], device=self.device)
            no_pad = slots[:1] * 0
            layout = Layout(self.config, slots, len(slots), no_pad, 0, self.dtype)
        x = F.embedding(ids.to(self.device), self.embedding)
        for block in self.blocks:
            x = block(x, layout, cache)
        return norm(x, self.norm, self.config.eps)

    @torch.inference_mode()
    def logits(self, ids):
        """ids (B, T) -> logits (B, T, vocab)."""
        return linear(self.hidden(ids), self.head)

    # Generation: prompts are read at once (prefill), then each step adds a token to all (decode).

    def generate(self, prompts, max_new_tokens=256, **settings):
        """Continue prompts -> list of str, without special tokens; settings: see generate_ids.

        A prompt is a list of ids, or a str, in which the special tokens' names count as such.
        """
        ids = [self.tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
               for prompt in prompts]
        answers = dict(self.generate_ids(ids, max_new_tokens, **settings))
        return [self.tokenizer.decode(answers[i]) for i in range(len(ids))]

    @torch.inference_mode()
    def generate_ids(self, prompts, max_new_tokens=256, temperature=0.0, top_p=1.0, seed=0,
                     batch_size=8, share_prefix=True):
        """Yield (index, new ids without the stop token) of prompts (lists of ids), longest first.

        Greedy at temperature 0, else nucleus sampling; what is drawn for a prompt depends on (seed,
        index) alone, not on its batch. ValueError if a prompt and its answer exceed the context.
        """
        longest = self.config.context - max_new_tokens
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= longest or max(prompt) >= self.config.sizes["vocab"]:
                raise ValueError(
                    f"{self.directory}: prompt {i} has {len(prompt)} tokens; with {max_new_tokens} "
                    f"new ones it must fit a context of {self.config.context}, and each id be "
                    f"below {self.config.sizes['vocab']}")
        prefix = []
        if share_prefix and len(prompts) > 1:
            prefix = os.path.commonprefix([prompt[:-1] for prompt in prompts])
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        for first in range(0, len(order), batch_size):
            rows = order[first:first + batch_size]
            own = [prompts[i][len(prefix):] for i in rows]
            logits, cache = self.prefill(own, max_new_tokens, self._prefix_cache(prefix))
            draws = torch.empty(len(rows), max_new_tokens)
            for i, row in zip(rows, draws):
                row.uniform_(generator=torch.Generator().manual_seed(seed * 1_000_003 + i))
            yield from zip(rows, self._decode(logits, cache, draws, temperature, top_p))

    def prefill(self, prompts, room=0, prefix=None):
        """Read prompts (lists of ids) -> logits (B, vocab) of what comes next, and the cache.

        room: for how many new tokens; prefix: the cache of what comes before all prompts.
        """
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        pad = torch.tensor([width - len(prompt) for prompt in prompts], device=self.device)
        cache = KVCache(self.config, pad, width + room, self.dtype, prefix)
        slots = torch.arange(width, device=self.device)
        return self.step(ids, slots, width, cache), cache

    def step(self, ids, slots, span, cache):
        """Run ids (B, T), which lie in `slots` -> logits (B, vocab) of what comes next."""
        start = cache.prefix.slots if cache.prefix else 0
        layout = Layout(self.config, slots, span, cache.pad, start, self.dtype)
        last = self.hidden(ids, layout, cache)[:, -1:]
        return linear(last, self.head)[:, -1]

    def _prefix_cache(self, ids):
        """The cache of a prefix, read once; it stays until another is asked for."""
        if ids and ids != self.prefix[0]:
            self.prefix = ids, self.prefill([ids])[1]
        return self.prefix[1] if ids else None

    def _decode(self, logits, cache, draws, temperature, top_p):
        """New ids of each row of a batch, after `prefill`; draws (B, new tokens): see choose."""
        B, room = draws.shape
        rows = list(range(B))  # those that are still in the batch
        answers, finished, recording = [[] for _ in rows], set(), None
        for step in range(room):
            if not logits.isfinite().all():
                raise ValueError(f"{self.directory}: gives logits that are no numbers; its weights "
                                 f"are damaged, or too large for {self.dtype}")
            tokens = choose(logits, temperature, top_p, draws[rows, step])
            for row, token in zip(rows, tokens.tolist()):
                if token in self.stops:
                    finished.add(row)
                elif row not in finished:
                    answers[row].append(token)
            going = [place for place, row in enumerate(rows) if row not in finished]
            if not going or step + 1 == room:
                break
            slot = cache.slots - room + step
            # Finished rows leave once they are a quarter of the batch; copying a cache has a price.
            # A recording's shapes are fixed, so there they stay.
            if 4 * len(going) <= 3 * len(rows) * (self.device.type == "cpu"):
                rows, places = [rows[place] for place in going], torch.tensor(going)
                tokens = tokens[places]
                cache.keep(places)
            if self.device.type == "cuda":
                recording = recording or Recording(self, cache, slot)
                logits = recording(tokens, slot)
            else:
                logits = self.step(tokens[:, None], torch.tensor([slot]), slot + 1, cache)
        return answers


def find_device(name=None):
    """The torch.device of a name, by default this process's GPU, else the CPU; or ValueError."""
    if name is None:
        gpu = torch.cuda.is_available()
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpu else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except Exception:  # each kind of device has its own
        raise ValueError(f"device {name} can't be used; give cpu, or cuda where there is one"
                         ) from None
    return torch.device(name)


def choose(logits, temperature, top_p, draws):
    """The next token of each row (B,) from logits (B, vocab): the likeliest if temperature is 0.

    Else it is sampled by uniform draws (B,) from the nucleus: the likeliest tokens, as many as it
    takes to reach a mass of top_p (arXiv 1904.09751).
    """
    if not temperature:
        return logits.argmax(-1)
    p, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    mass = p.cumsum(-1)
    place = torch.searchsorted(mass, draws[:, None].to(mass) * mass[:, -1:], right=True)
    place = place.clamp(max=p.count_nonzero(-1)[:, None] - 1)
    return order.gather(-1, place)[:, 0]


# ---- the chat prompt -----------------------------------------------------------------------------
PLAIN_TEMPLATE = """{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}

{% endfor %}assistant:"""
MARK = r"(?m)\[[^\[\]\s]+\]|<[^<>\s]+>|^#+ *\w+|^\w[\w ]*:"  # [INST], <user>, # Input, User:


class Chat:
    """The prompt of a text, in the form of a checkpoint's template: instruction, examples, text.

    A text can't end its turn: a special token's name in it is encoded as text, and a mark that the
    template writes without special tokens ([/INST], ### Response, Report:) gets a space before its
    last character. This is no promise that a model won't do what a text asks for.
    """
    PLACE = "\uE000report\uE000"  # stands where the text goes

    def __init__(self, directory, system, examples=(), fallback=PLAIN_TEMPLATE):
        """system: str; examples: pairs (user, assistant); fallback: a template if it has none."""
        directory = Path(directory)
        raw = read_json(directory / "tokenizer.json")
        self.tokenizer = make_tokenizer(raw, directory)
        self.plain = make_tokenizer(raw | {"added_tokens": [], "post_processor": None}, directory)
        names = {token["content"]: token["id"] for token in raw.get("added_tokens", [])}
        self.special = set(names.values())

        if not self.plain.encode(system).ids:
            raise ValueError(f"{directory}/tokenizer.json: has no tokens for the instruction; use "
                             "another checkpoint")
        turns = [("system", system)]
        for user, assistant in examples:
            turns += [("user", user), ("assistant", assistant)]
        turns.append(("user", self.PLACE))
        self.text = render(directory, fallback, turns)
        # Where the last character of a mark begins.
        ends = [f"(?<={re.escape(mark[:-1])})(?={re.escape(mark[-1])})"
                for mark in re.findall(MARK, self.text) if mark not in names]
        self.marks = re.compile("|".join(ends) or "(?!)", re.IGNORECASE)
        before, after = self.text.split(self.PLACE)
        self.before = self.tokenizer.encode(before, add_special_tokens=False).ids
        self.after = self.tokenizer.encode(after, add_special_tokens=False).ids

    def prompts(self, texts, room):
        """Each text's prompt in at most `room` tokens -> list of (ids, whether the text was cut).

        Where a text is cut, it is after a sentence. ValueError if there is no room for any text.
        """
        constant = len(self.before) + len(self.after)
        room -= constant
        if room < 16:
            raise ValueError(f"the instruction's {constant} tokens leave none for a text in this "
                             "checkpoint's context; use one with a longer context")
        texts, prompts = [self.marks.sub(" ", text.strip()) for text in texts], []
        encodings = self.plain.encode_batch(texts, add_special_tokens=False)
        for text, encoding in zip(texts, encodings):
            ids, cut = encoding.ids, len(encoding.ids) > room
            if cut:
                text = whole_sentences(text[:encoding.offsets[room][0]])
                ids = self.plain.encode(text, add_special_tokens=False).ids[:room]
            ids = [i for i in ids if i not in self.special]
            prompts.append((self.before + ids + self.after, cut))
        return prompts


def whole_sentences(text):
    """text up to the end of its last sentence; where there is none, up to its last word's."""
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s)|\n", text)]
    ends = ends or [match.start() for match in re.finditer(r"\s", text)]
    return text[:ends[-1]] if ends else text


# The program that renders a dialogue. A template is a program, too, by whoever made the checkpoint:
# it runs in a process of its own, so that it can't take more time or memory than this.
RENDER = """
import json, resource, sys
from datetime import datetime
from functools import partial
from pathlib import Path

resource.setrlimit(resource.RLIMIT_CPU, (3, 3))  # seconds
resource.setrlimit(resource.RLIMIT_AS, (2 ** 29, 2 ** 29))  # bytes
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(jinja2.ext.Extension):  # marks the assistant's words for training, changes none
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def refuse(reason):
    raise jinja2.TemplateError(reason)


def read_template(file, settings, fallback):
    if file.endswith(".jinja"):
        return Path(file).read_text("utf-8")
    template = settings.get("chat_template") or fallback
    if isinstance(template, list):  # several, each with a name
        template = {entry["name"]: entry["template"] for entry in template}
    return template["default"] if isinstance(template, dict) else template


def special_tokens(settings):  # by the names that templates use
    tokens = {"bos_token": "", "eos_token": ""}
    for name, value in settings.items():
        if name.endswith("_token"):
            tokens[name] = value["content"] if isinstance(value, dict) else value or ""
    return tokens


def render(turns):
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    environment.globals["raise_exception"] = refuse
    # A prompt is the same on any day: the day is Llama 3's own where a template has no clock.
    environment.globals["strftime_now"] = datetime(2024, 7, 26).strftime
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    messages = [{"role": role, "content": content} for role, content in turns]
    text = environment.from_string(read_template(file, settings, fallback)).render(
        special_tokens(settings), messages=messages, tools=None, documents=None,
        add_generation_prompt=True, enable_thinking=False)
    text.encode("utf-8")  # fails on half a character, which JSON can hold
    return text if len(text) < 10 ** 6 else refuse("over a million characters")


def prompt(turns):
    # A template without a branch for the system refuses its turn or drops it in silence: the
    # instruction then opens the first message.
    (_, system), (_, first), *rest = turns
    folded = [("user", system + "\\n\\n" + first), *rest]
    error = None
    for form in (turns, folded):
        try:
            text = render(form)
            if all(content.strip() in text for _, content in turns):
                break
        except Exception as problem:
            error = problem
    else:
        # One that shows the last message alone is a checkpoint's that has its task in its weights.
        text = render(turns[-1:])
        if error or text != render(turns):
            raise error or ValueError("it changes or drops a message")
    if text.count(turns[-1][1]) != 1:
        raise ValueError("it changes, drops or repeats the last message")
    return text


file, settings, fallback, turns = json.load(sys.stdin)
try:
    print(json.dumps(prompt(turns)))
except Exception as error:
    sys.exit(" ".join(f"{type(error).__name__}: {error}".split())[:200])
"""


def render(directory, fallback, turns):
    """The text of turns (role, content) in a checkpoint's chat template, an answer being next."""
    file = directory / "tokenizer_config.json"
    settings = read_json(file)
    if (directory / "chat_template.jinja").exists():
        file = directory / "chat_template.jinja"
    child = subprocess.run(
        [sys.executable, "-c", RENDER], capture_output=True, text=True,
        input=json.dumps((str(file), settings, fallback, turns)))
    if child.returncode:
        raise ValueError(f"{file}: the chat template fails ({child.stderr.strip() or 'over 3 s'}), "
                         "or needs over 512 MiB; use another checkpoint")
    return json.loads(child.stdout)


def make_tokenizer(raw, directory):
    """The tokenizer of a tokenizer.json's content, which neither truncates nor pads."""
    try:
        for token in raw.get("added_tokens", []):
            if "think" in token["content"].lower():  # a decoded text says where reasoning ends
                token["special"] = False
        tokenizer = Tokenizer.from_str(json.dumps(raw))
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"{directory}/tokenizer.json: not a tokenizer ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


# ---- the checkpoint's files ----------------------------------------------------------------------
FAMILIES = LLAMA, MISTRAL, QWEN2, QWEN3 = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


# Weight, its name in the checkpoint (or names: they are joined), its rows and columns.
WHOLE = """
embedding       model.embed_tokens.weight                         vocab    width
norm            model.norm.weight                                 width
head            lm_head.weight                                    vocab    width
"""
LAYER = """
attention_norm  model.layers.{}.input_layernorm.weight            width
qkv             model.layers.{}.self_attn.q_proj.weight           queries  width
qkv             model.layers.{}.self_attn.k_proj.weight           keys     width
qkv             model.layers.{}.self_attn.v_proj.weight           keys     width
qkv_bias        model.layers.{}.self_attn.q_proj.bias             queries
qkv_bias        model.layers.{}.self_attn.k_proj.bias             keys
qkv_bias        model.layers.{}.self_attn.v_proj.bias             keys
qk_norm         model.layers.{}.self_attn.q_norm.weight           head_dim
qk_norm         model.layers.{}.self_attn.k_norm.weight           head_dim
out             model.layers.{}.self_attn.o_proj.weight           width    queries
out_bias        model.layers.{}.self_attn.o_proj.bias             width
mlp_norm        model.layers.{}.post_attention_layernorm.weight   width
gate_up         model.layers.{}.mlp.gate_proj.weight              mlp      width
gate_up         model.layers.{}.mlp.up_proj.weight                mlp      width
gate_up_bias    model.layers.{}.mlp.gate_proj.bias                mlp
gate_up_bias    model.layers.{}.mlp.up_proj.bias                  mlp
down            model.layers.{}.mlp.down_proj.weight              width    mlp
down_bias       model.layers.{}.mlp.down_proj.bias                width
"""


# Of a config.json's keys: what transformers takes where one is left out, what it takes whatever
# the file says, and the values that are supported (null is as good as left out).
#                        llama         mistral       qwen2         qwen3
LEFT_OUT = """
max_position_embeddings  2048          131072        32768         32768
num_key_value_heads      null          8             32            32
head_dim                 null          null          null          128
rms_norm_eps             1e-6          1e-6          1e-6          1e-6
rope_theta               1e4           1e4           1e4           1e4
sliding_window           null          4096          4096          4096
max_window_layers        0             0             28            28
"""
ALWAYS = """
use_sliding_window       false         true          -             -
max_window_layers        0             0             -             -
attention_bias           -             false         false         -
mlp_bias                 -             false         false         false
"""
SUPPORTED = """
model_type               ["llama"]     ["mistral"]   ["qwen2"]     ["qwen3"]
hidden_act               ["silu"]      ["silu"]      ["silu"]      ["silu"]
partial_rotary_factor    [1]           [1]           [1]           [1]
quantization_config      []            []            []            []
per_layer_config         []            []            []            []
tie_word_embeddings      [true,false]  [true,false]  [true,false]  [true,false]
use_sliding_window       [true,false]  [true,false]  [true,false]  [true,false]
attention_bias           [true,false]  [true,false]  [true,false]  [true,false]
mlp_bias                 [true,false]  [true,false]  [true,false]  [true,false]
"""


class Config:
    """What a decoder needs to know of its config.json."""

    def __init__(self, raw, name="config.json"):
        """raw: Hugging Face's dict; ValueError on what isn't supported, `name` being its file."""
        try:
            self._read(raw)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from None

    def _read(self, raw):
        architectures = raw.get("architectures") or [
            f"{str(raw.get('model_type')).capitalize()}ForCausalLM"]
        family = list(architectures)[0]
        if family not in FAMILIES:
            raise ValueError(f"architecture {architectures} is not supported; "
                             f"use one of {', '.join(FAMILIES)}")
        for key, values in column(SUPPORTED, family).items():
            if raw.get(key) not in [None, *values]:
                raise ValueError(f"{key} = {raw[key]!r:.60} is not supported; use a checkpoint "
                                 f"where it is left out or one of {values}")
        self.raw, raw = raw, column(LEFT_OUT, family) | raw | column(ALWAYS, family)
        width = number(raw, "hidden_size")
        self.layers = number(raw, "num_hidden_layers", most=10_000)
        self.heads = number(raw, "num_attention_heads")
        self.kv_heads = number(raw, "num_key_value_heads", self.heads)
        self.head_dim = number(raw, "head_dim", width // self.heads, most=10_000)
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError(f"{self.heads} heads of size {self.head_dim} share {self.kv_heads} "
                             "keys; heads must be a multiple of the keys, their size even")
        self.eps = real(raw, "rms_norm_eps")
        self.context = number(raw, "max_position_embeddings")
        self.windows = sliding_windows(family, raw)  # tokens that a layer looks back, or None: all
        self.frequencies = rope_frequencies(raw, self.head_dim)  # (D / 2,)
        self.sizes = {
            "vocab": number(raw, "vocab_size"),
            "width": width,
            "mlp": number(raw, "intermediate_size"),
            "queries": self.heads * self.head_dim,
            "keys": self.kv_heads * self.head_dim,
            "head_dim": self.head_dim}
        bias, mlp_bias = raw.get("attention_bias"), raw.get("mlp_bias")
        self.optional = {
            "head": not raw.get("tie_word_embeddings"),
            "qkv_bias": bias or family == QWEN2,
            "out_bias": bias,
            "gate_up_bias": mlp_bias,
            "down_bias": mlp_bias,
            "qk_norm": family == QWEN3}

    def tables(self):
        """Of the whole model, then of each layer: weight -> {name in the checkpoint: its shape}.

        A weight of several names is theirs joined along the rows.
        """
        return [self._table(WHOLE), *(self._table(LAYER, i) for i in range(self.layers))]

    def _table(self, text, layer=None):
        table = {}
        for line in text.strip().splitlines():
            weight, name, *shape = line.split()
            if self.optional.get(weight, True):
                sizes = tuple(self.sizes[size] for size in shape)
                table.setdefault(weight, {})[name.format(layer)] = sizes
        return table

    def shapes(self):
        """Every tensor of the checkpoint: its name -> its shape."""
        shapes = {}
        for table in self.tables():
            for tensors in table.values():
                shapes |= tensors
        return shapes


def column(table, family):
    """A family's values in one of the tables above."""
    rows, place = map(str.split, table.strip().splitlines()), 1 + FAMILIES.index(family)
    return {row[0]: json.loads(row[place]) for row in rows if row[place] != "-"}


def number(raw, key, default=None, kind=int, least=1, most=10 ** 9):
    """A config's number, its default if it's left out or null; ValueError beyond the bounds."""
    value = default if raw.get(key) is None else raw[key]
    if type(value) not in (int, kind) or not least <= value <= most:
        raise ValueError(f"{key} is {value!r:.60}, but must be {kind.__name__} from {least} to "
                         f"{most}; fetch the checkpoint again")
    return value


real = partial(number, kind=float, least=1e-20, most=1e20)


def sliding_windows(family, raw):
    """How many tokens back each layer sees, None for all."""
    layers, first = raw["num_hidden_layers"], number(raw, "max_window_layers", least=0)
    window, full, sliding = None, "full_attention", "sliding_attention"
    if raw.get("use_sliding_window") and raw["sliding_window"] is not None:
        window = number(raw, "sliding_window")
    kinds = [sliding if window and i >= first else full for i in range(layers)]
    given = raw.get("layer_types") or kinds
    mixed = family != MISTRAL and window and {full, sliding}.issuperset(given)
    if len(given) != layers or given != kinds and not mixed:
        raise ValueError("layer_types is at odds with its other keys; use a checkpoint that "
                         "transformers reads")
    return [window if kind == sliding else None for kind in given]


def rope_frequencies(raw, head_dim):
    """The rotary embedding's frequencies (D / 2,): plain, or scaled as linear or as Llama 3.

    As in transformers, `rope_scaling` replaces `rope_parameters`, and `rope_theta` in either goes
    before the one beside it.
    """
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    whole = isinstance(rope, dict) and rope.get("partial_rotary_factor") in (None, 1)
    if not whole or dict in map(type, rope.values()):
        raise ValueError(f"rope scaling {rope!r:.200} is not supported; use a checkpoint that "
                         "rotates whole heads, and in all layers alike")
    kind = rope.get("rope_type", rope.get("type", "default"))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = real(raw | rope, "rope_theta") ** -exponents
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / real(rope, "factor")
    if kind == "llama3":  # slow turns are scaled, fast ones are not, those between are mixed
        original = number(rope | raw, "original_max_position_embeddings",
                          raw["max_position_embeddings"])
        turns = original * frequencies / (2 * math.pi)
        low = real(rope, "low_freq_factor")
        high = real(rope, "high_freq_factor", least=low)
        fast = ((turns - low) / (high - low)).clamp(0, 1)
        return torch.lerp(frequencies / real(rope, "factor"), frequencies, fast)
    raise ValueError(f"rope scaling {kind!r} is not supported; default, linear and llama3 are")


class Weights:
    """A checkpoint's tensors by name, read from its *.safetensors when asked for.

    Names and shapes are checked against `shapes` first: ValueError names the file and the tensor.
    """

    def __init__(self, directory, shapes):
        files = ["model.safetensors"]
        index = directory / "model.safetensors.index.json"
        if index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict):
                raise ValueError(f"{index}: has no weight_map; fetch it again")
            files = sorted(set(map(str, shards.values())))
        self.file, present = {}, {}
        for file in files:
            if os.path.basename(file) != file:
                raise ValueError(f"{index}: names {file!r}, which is outside its folder; fetch the "
                                 "checkpoint again")
            tensors = tensor_shapes(directory / file)
            present |= tensors
            self.file |= dict.fromkeys(tensors, directory / file)
        for name, shape in shapes.items():
            if name not in present:
                raise ValueError(f"{directory}: tensor {name} is missing from its safetensors; "
                                 "fetch the checkpoint again")
            if present[name] != shape:
                raise ValueError(f"{self.file[name]}: tensor {name} has shape {present[name]}, "
                                 f"but config.json says {shape}")
        for name in present.keys() - shapes.keys():
            # Old checkpoints hold the rotary frequencies, some tied ones the embedding as a head.
            if name == "lm_head.weight":
                head, embedding = self[name].float(), self["model.embed_tokens.weight"].float()
                if not torch.equal(head, embedding):
                    raise ValueError(f"{self.file[name]}: {name} isn't the embedding, but "
                                     "config.json ties them; set tie_word_embeddings to false")
            elif not name.endswith("rotary_emb.inv_freq"):
                raise ValueError(f"{self.file[name]}: tensor {name} has no place in this "
                                 "architecture; check config.json")

    def __getitem__(self, name):
        # The file is opened anew each time, so that its pages go when the tensor goes.
        with safe_open(self.file[name], "pt") as tensors:
            tensor = tensors.get_tensor(name)
        if not tensor.is_floating_point():
            raise ValueError(f"{self.file[name]}: tensor {name} holds {tensor.dtype}; use an "
                             "unquantized checkpoint")
        return tensor


def tensor_shapes(file):
    """Name -> shape of every tensor in a safetensors file."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file; fetch the whole checkpoint "
                         "(weights must be safetensors)")
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged or truncated ({error}); fetch it again") from None


def read_json(path):
    """A JSON file's object; ValueError names the file."""
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give the directory of a Hugging Face checkpoint"
                         ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object; fetch it again")
    return content


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


# ---- what makes it fast --------------------------------------------------------------------------
def linear(x, weight, bias=None):
    """x weight^T + bias; a weight that `pack` has re-ordered goes through oneDNN."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def pack(weight):
    """Re-order a CPU's matrix (out, in) once into oneDNN's blocks, unless it is to be trained.

    A step at batch 8 then takes a half to a third of the time that it takes from plain rows.
    """
    if weight.ndim == 1 or weight.requires_grad or weight.device.type != "cpu":
        return weight
    fast = fast_on_cpu(weight.dtype)
    return torch.ops.mkldnn._reorder_linear_weight(weight, 8) if fast else weight


def fast_on_cpu(dtype):
    """Whether oneDNN multiplies matrices of this type fast on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


def attend(q, k, v, mask, prefix=None, prefix_mask=None):
    """Attention of q (B, H, Q, D) to k, v (B, H, S, D) and to a prefix (k, v) that all rows share.

    The prefix, each (1, H, N, D), is read once for the whole batch. Both parts are joined by the
    log-sum-exp of their scores, which is exact.
    """
    if prefix is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    B, H, Q, D = q.shape
    own, own_lse = attend_with_lse(q, k, v, mask)
    q = q.transpose(0, 1).reshape(1, H, B * Q, D)  # the batch's queries as those of one row
    shared, shared_lse = attend_with_lse(q, *prefix, prefix_mask)
    shared = shared.view(H, B, Q, D).transpose(0, 1)  # (B, H, Q, D)
    shared_lse = shared_lse.view(H, B, Q).transpose(0, 1)  # (B, H, Q)
    weight = torch.sigmoid(shared_lse - own_lse).unsqueeze(-1)
    return torch.lerp(own, shared, weight.to(own.dtype))


def attend_with_lse(q, k, v, mask=None):
    """softmax(scores) v and the log-sum-exp of scores = q k^T / sqrt(D) + mask, in float32."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=mask, scale=None)
    if mask is not None:  # the operator wants its rows to begin at multiples of 16 bytes
        width = mask.shape[-1]
        mask = F.pad(mask, (0, -width % 8))[..., :width].expand(*q.shape[:3], width)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True)
    return out, lse[..., :q.shape[2]]


class Recording:
    """A decoding step on CUDA, recorded as a graph: replayed, it is one launch, not hundreds."""

    def __init__(self, llm, cache, slot):
        self.ids = torch.zeros_like(cache.pad)[:, None]
        self.slots = torch.tensor([slot], device=llm.device)

        def step():  # a graph's shapes are fixed, so it reads all slots
            return llm.step(self.ids, self.slots, cache.slots, cache)
        with torch.cuda.device(llm.device):
            step()  # lets libraries set themselves up; what it writes is overwritten later
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=torch.cuda.Stream()):  # on this device
                self.logits = step()

    def __call__(self, tokens, slot):
        self.ids.copy_(tokens[:, None])
        self.slots.fill_(slot)
        self.graph.replay()
        return self.logits
