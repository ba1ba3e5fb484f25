"""A small summarizer from pairs: what it is taught on, and its training.

    curriculum: phrases and frames of resources/wordings.toml, and the phantom's sentences
                --> (sentence, abnormalities that it affirms)
    training:   cross-entropy of the answer's tokens alone

    python distil.py --curriculum pairs.jsonl
    python distil.py --pairs pairs.jsonl --out DIR

The pairs may as well be a large model's answers on one's own reports: a summaries.jsonl, with
--manifest for its reports. The result is a Llama in Hugging Face's format, which llm.py runs.
"""
import argparse
import itertools
import json
import math
import random
import re
import sys
import tomllib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save as safetensors_bytes
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

from llm import LLM, Config, fast_on_cpu, write_atomically
from phantom_reports import capital, findings, statements
from summarize import (
    BENCHMARK_NAMES,
    answers,
    in_order,
    read_manifest,
    report_chat,
    run_command,
    score,
    sha256,
)

# ---- 1. The curriculum: single sentences ---------------------------------------------------------
#
# In templates <a/b> is a choice, which may be empty or hold choices, and {size} a number of mm.

WHERE = (
    "< / / / / / /in the <right/left> <upper/lower> lobe/in the middle lobe/in the lingula"
    "/in both lungs/in the <right/left> <upper lobe and middle lobe/lower lobe and lingula>"
    "/on the <right/left>/bilaterally/on both sides/in the <right/left/> hemithorax"
    "/in both hemithoraces/at the <bases/apex/hilar level/carina>/in the <upper/middle/lower> zones"
    "/at the level of the <carina/aortic arch/diaphragm>/in the T<7/9/11> to T<8/10/12> levels"
    "/of the <left/right> <4th/6th and 7th> ribs>"
)
DEGREE = (
    "< / / / / / /mild/marked/small/large/extensive/diffuse/focal/minimal/moderate/slight/old"
    "/patchy/subtle/pronounced/chronic/bilateral/right/left/new/known>"
)
EXTENT = (
    "< / / / / / / / / /of {size} mm/measuring {size} mm/measuring {size}x{size} mm/up to {size} mm"
    "/{size} mm in <size/diameter/thickness>/reaching {size} mm/, the largest {size} mm,"
    "/with a diameter of {size} mm>"
)
JOINED = (
    "{x}", "{x}", "{x}", "{x} or {y}", "{x} or {y}", "{x}, {y} or {z}", "{x}, {y}, {z}",
    "{x} and {y}",
)
# Kinds of sentence: how often, and how many of its three phrases it affirms.
KINDS = {
    "affirm": (8, 1), "sentence": (4, 1), "deny": (8, 0), "past": (6, 0), "ask": (1, 0),
    "both": (2, 2), "neither": (2, 0), "mixed": (2, 1),
}


def read_wordings(path=Path(__file__).with_name("resources") / "wordings.toml"):
    """wordings.toml -> ({abnormality: {"phrases", "sentences"}}, {kind of frame: templates})."""
    wordings = tomllib.loads(path.read_text("utf-8"))
    return wordings["abnormality"], wordings["frames"]


def filled(template, rng):
    """A template with its choices made, the innermost first, and its spaces tidied."""
    while "<" in template:
        template = re.sub(r"<([^<>]*)>", lambda match: rng.choice(match[1].split("/")), template)
    template = re.sub(r"{size}", lambda _: str(rng.randint(2, 60)), template)
    template = re.sub(r"\s+", " ", template)
    return re.sub(r"\s+(?=[.,;:?])|,(?=\s*[.;:?,])", "", template).strip()


def noun_phrase(templates, affirmed, rng):
    """(words, "is" or "are"); mostly with a degree, size and place where affirmed, else seldom."""
    words = filled(rng.choice(templates), rng)
    plural, words = words[0] == "+", words.lstrip("+")
    if rng.random() < (0.7 if affirmed else 0.25):
        words = filled(f"{DEGREE} {words} {EXTENT} {WHERE}", rng)
        if affirmed and not plural and rng.random() < 0.4:
            words = ("an " if words[0] in "aeiou" else "a ") + words
    return words, "are" if plural else "is"


def framed(frames, phrases, rng):
    """A frame filled with three phrases (words, verb)."""
    (x, be), (y, _), (z, _) = phrases
    no = filled(rng.choice(JOINED).format(x=x, y=y, z=z), rng)
    frame = rng.choice(frames).replace("{w}", WHERE)
    fields = {"x": x, "y": y, "z": z, "np": x, "no": no}
    fields |= {name.capitalize(): capital(words) for name, words in fields.items()}
    return filled(frame, rng).format(**fields, be=be, was="was" if be == "is" else "were")


def built_sentences(wordings, frames, rng):
    """Yield pairs (sentence, names affirmed) without end, built from what read_wordings gives."""
    names = list(wordings)
    weights = [weight for weight, _ in KINDS.values()]
    while True:
        kind = rng.choices(list(KINDS), weights)[0]
        chosen = rng.sample(names, 3)
        _, affirmed = KINDS[kind]
        if kind == "sentence":
            template = rng.choice(wordings[chosen[0]]["sentences"])
            text = filled(template.replace("{at}", f" {WHERE}"), rng)
        else:
            phrases = []
            for i, name in enumerate(chosen):
                phrases.append(noun_phrase(wordings[name]["phrases"], i < affirmed, rng))
            text = framed(frames[kind], phrases, rng)
        yield capital(text), chosen[:affirmed]


def curriculum(n, seed=1000):
    """n pairs (sentence, names affirmed): a sixth the phantom's usual wordings, the rest built."""
    rng, pairs = random.Random(seed), []
    built = built_sentences(*read_wordings(), rng)
    for index in itertools.count():
        found = findings(seed, "summarizer", index, enriched=True)
        for part in statements(found, rng):
            pairs += [(sentence, names) for sentence, names, _ in part]
        pairs += itertools.islice(built, 100)
        if len(pairs) >= n:
            return pairs[:n]


def read_pairs(path, manifest=None):
    """Lines {"report" or "report_sha256", "abnormalities"} -> list of (report, names).

    A report_sha256 is looked up in `manifest`. ValueError names the line that is none of these.
    """
    rows, pairs = read_manifest(manifest) if manifest else [], []
    reports = {sha256(row["report"]): row["report"] for row in rows}
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            names = entry["abnormalities"]
            if names is not None:
                report = entry["report"] if "report" in entry else reports[entry["report_sha256"]]
                pairs.append((report, names))
        except (ValueError, KeyError, TypeError):
            form = 'no {"report", "abnormalities"}, nor a summary of a report in --manifest'
            raise ValueError(f"{path}: line {number} is {form}") from None
    if len(pairs) < 10:
        raise ValueError(f"{path}: {len(pairs)} pairs are too few to train on")
    return pairs


# ---- 2. The checkpoint: a new one, and saving ----------------------------------------------------

SPECIALS = ["<|pad|>", "<|report|>", "<|answer|>", "<|end|>"]
# A small model has its task in its weights: it needs neither instruction nor examples.
TEMPLATE = "<|report|>{{ messages[-1]['content'] }}<|answer|>"


def answer_text(names):
    """The answer that a pair teaches."""
    return "; ".join(in_order(names)) or "None"


def new_tokenizer(texts, vocab):
    """A lower-casing byte-level BPE tokenizer, trained on texts; each digit is its own piece."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.decoder = normalizers.Lowercase(), decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
    ])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def new_checkpoint(out, texts, vocab, width, layers, heads, seed, reads):
    """Write a Llama of random weights and its tokenizer into directory `out`; reads: see `fit`."""
    tokenizer = new_tokenizer(texts, vocab)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32",
        "vocab_size": tokenizer.get_vocab_size(), "hidden_size": width,
        "intermediate_size": 2 * width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "head_dim": width // heads, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": None, "eos_token_id": 3, "pad_token_id": 0, "reads": reads,
    }
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in Config.from_dict(config).shapes().items():
        weights[name] = torch.ones(shape)
        if len(shape) > 1:
            weights[name] = torch.randn(shape, generator=generator) * 0.05
    generation = {"eos_token_id": 3, "pad_token_id": 0, "do_sample": False}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {"pad_token": SPECIALS[0], "eos_token": SPECIALS[3]}
    write_atomically(out / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    write_atomically(out / "config.json", as_json(config))
    write_atomically(out / "generation_config.json", as_json(generation))
    write_atomically(out / "tokenizer_config.json", as_json(settings))
    write_atomically(out / "chat_template.jinja", TEMPLATE.encode())
    write_atomically(out / "model.safetensors", safetensors_bytes(weights, {"format": "pt"}))


def as_json(value):
    """Bytes of a JSON file."""
    return (json.dumps(value, indent=1) + "\n").encode()


def save(llm, out, dtype):
    """Write a trainable LLM into directory `out`, with its checkpoint's tokenizer and template."""
    others = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
    for name in (*others, "chat_template.jinja"):
        source = llm.directory / name
        if llm.directory != out and source.exists():
            write_atomically(out / name, source.read_bytes())
    weights = {}
    for name, tensor in llm.state_dict().items():
        weights[name] = tensor.detach().to("cpu", dtype).contiguous().clone()
    write_atomically(out / "model.safetensors", safetensors_bytes(weights, {"format": "pt"}))
    config = {key: value for key, value in llm.raw.items() if key != "torch_dtype"}
    write_atomically(out / "config.json", as_json(config | {"dtype": str(dtype).split(".")[1]}))


# ---- 3. The training -----------------------------------------------------------------------------

def batches(pairs, llm, chat, tokens, steps, rng, caution=1.0):
    """`steps` batches of about `tokens` tokens: (ids (B, T), weights (B, T - 1) of ids[:, 1:]).

    ids are padded on the right; weights are 0 but for the answer's tokens: 1 there, or `caution`
    where the answer affirms nothing. Pools are sorted by length, so that little is padding.
    """
    end, done = sorted(llm.stops)[:1], 0
    while done < steps:
        pool = [rng.choice(pairs) for _ in range(4096)]
        texts = [answer_text(names) for _, names in pool]
        encoded = chat.tokenizer.encode_batch(texts, add_special_tokens=False)
        prompts = chat.prompts([report for report, _ in pool], llm.config.context - 256)
        items = []
        for (prompt, _), answer, (_, names) in zip(prompts, encoded, pool):
            ids = prompt + (answer.ids + end)[:256]
            items.append((ids, len(prompt), 1.0 if names else caution))
        items.sort(key=lambda item: len(item[0]))
        groups = [[]]
        for item in items:
            if groups[-1] and (len(groups[-1]) + 1) * len(item[0]) > tokens:
                groups.append([])
            groups[-1].append(item)
        for rows in rng.sample(groups, len(groups))[:steps - done]:
            done += 1
            yield padded(rows)


def padded(rows):
    """Tensors of rows (ids, where the answer begins, its weight): see `batches`."""
    width = max(len(ids) for ids, _, _ in rows)
    all_ids = torch.zeros(len(rows), width, dtype=torch.long)
    weights = torch.zeros(len(rows), width - 1)
    for row, (ids, start, weight) in enumerate(rows):
        all_ids[row, :len(ids)] = torch.tensor(ids)
        weights[row, start - 1:len(ids) - 1] = weight
    return all_ids, weights


def fit(
    pairs_path, out, checkpoint=None, manifest=None, vocab=2000, width=128, layers=4, heads=4,
    steps=3000, tokens=3000, lr=2e-3, reads="reports", dropout=0.0, caution=1.0,
    dtype=torch.bfloat16, device=None, seed=0, on_step=None,
):
    """Train a summarizer on pairs and save it as a Hugging Face checkpoint -> micro F1, held out.

    It starts from `checkpoint`, or as a new small Llama. AdamW, a cosine of the learning rate.
    reads: "sentences" where the pairs are single sentences, which are then what the new checkpoint
    is asked for, one by one. dropout: of the tokenizer's merges in training, so that words are met
    in other pieces, too (BPE-dropout, Provilkov et al. 2020). caution: the loss's weight of pairs
    that affirm nothing; above 1 the summarizer rather misses a finding than invents one.
    on_step(step, loss) is called after each step. 2 % of the pairs, at most 500, are held out and
    scored at the end.
    """
    if caution <= 0:
        raise ValueError(f"caution is {caution}; it must be above 0")
    rng, out, pairs = random.Random(seed), Path(out), read_pairs(pairs_path, manifest)
    # The same order whatever the seed, so that a second training holds the same pairs back.
    random.Random(0).shuffle(pairs)
    n_held = min(len(pairs) // 50 + 1, 500)
    held, pairs = pairs[:n_held], pairs[n_held:]
    if checkpoint is None:
        texts = []
        for report, names in pairs[:20000]:
            texts += report, answer_text(names)
        new_checkpoint(out, texts, vocab, width, layers, heads, seed, reads)

    llm = LLM.from_pretrained(checkpoint or out, device, torch.float32, trainable=True)
    chat = report_chat(llm.directory)
    if dropout:
        chat.plain.model.dropout = dropout
    optimizer, schedule = make_optimizer(llm.parameters(), lr, steps)
    data = batches(pairs, llm, chat, tokens, steps, rng, caution)
    bar = tqdm(enumerate(data), total=steps, unit=" steps", desc="fit")
    for step, (ids, weights) in bar:
        loss = answer_loss(llm, ids.to(llm.device), weights.to(llm.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
        if on_step:
            on_step(step, loss.item())
    save(llm, out, dtype)
    return held_out_f1(LLM.from_pretrained(out, device), held)


def make_optimizer(weights, lr, steps):
    """AdamW with decay for matrices alone, and a cosine with 5 % of warm-up."""
    matrices, vectors = [], []
    for weight in weights:
        (matrices if weight.ndim == 2 else vectors).append(weight.requires_grad_())
    groups = [
        {"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.98))

    def rate(step):
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1))
        return min((step + 1) / (0.05 * steps), cosine)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def answer_loss(llm, ids, weights):
    """Weighted cross-entropy of the answers' tokens, over their number; arguments: `batches`."""
    answer = weights > 0
    fast = llm.device.type == "cuda" or fast_on_cpu(torch.bfloat16)
    with torch.autocast(llm.device.type, torch.bfloat16, enabled=fast):
        logits = F.linear(llm.hidden(ids)[:, :-1][answer], llm.head).float()
        losses = F.cross_entropy(logits, ids[:, 1:][answer], reduction="none")
    return losses @ weights[answer] / answer.sum()


def held_out_f1(llm, pairs):
    """Micro F1 of a summarizer on pairs (report, names)."""
    rows, records = [], {}
    for report, names in pairs:
        labels = {f"label:{name}": float(name in names) for name in BENCHMARK_NAMES}
        rows.append({"report": report, **labels})
    for i, names, _, _ in answers(llm, [report for report, _ in pairs]):
        records[sha256(pairs[i][0])] = {"abnormalities": names}
    return score(rows, records)["micro"]["f1"]


# ---- command line --------------------------------------------------------------------------------

def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--curriculum", metavar="FILE", help="write the curriculum's 800,000 pairs, no more")
    add("--pairs", help='lines {"report", "abnormalities"}; or a summaries.jsonl, with --manifest')
    add("--out", help="the checkpoint's directory")
    add("--manifest", help="of the reports that a summaries.jsonl is about")
    add("--checkpoint", help="fine-tune this one; left out: a new small Llama of these sizes:")
    for name, value in (("vocab", 2000), ("width", 128), ("layers", 4), ("heads", 4)):
        add(f"--{name}", type=int, default=value)
    add("--steps", type=int, default=3000)
    add("--tokens", type=int, default=3000, help="in a batch, about")
    add("--lr", type=float, default=2e-3)
    add("--seed", type=int, default=0)
    add("--reads", choices=["reports", "sentences"], default="reports",
        help="what a new checkpoint is asked for: sentences where the pairs are such")
    add("--dropout", type=float, default=0.0, help="of the tokenizer's merges (BPE-dropout)")
    add("--caution", type=float, default=1.0,
        help="weight of pairs that affirm nothing; above 1, findings are missed, not invented")
    add("--device")
    a = parser.parse_args()
    if a.curriculum:
        lines = []
        for sentence, names in curriculum(800_000):
            lines.append(json.dumps({"report": sentence, "abnormalities": names}) + "\n")
        write_atomically(a.curriculum, "".join(lines).encode())
        print(f"{a.curriculum}: {len(lines):,} pairs")
        return
    if not (a.pairs and a.out):
        raise ValueError("--pairs and --out, or --curriculum, are needed")
    f1 = fit(
        a.pairs, a.out, a.checkpoint, a.manifest, a.vocab, a.width, a.layers, a.heads, a.steps,
        a.tokens, a.lr, a.reads, a.dropout, a.caution, device=a.device, seed=a.seed,
    )
    scored = "none of them affirms anything" if f1 is None else f"{f1:.3f}"
    print(f"{a.out}: saved; micro F1 on pairs held out: {scored}")


if __name__ == "__main__":
    sys.exit(run_command(main))
