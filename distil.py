"""A small summarizer from pairs: what it is taught on, and its training.

    wordings --curriculum--> pairs: ("No effusion, but the heart is large.", ["Cardiomegaly"]), ...
    pairs --fit--> a small Llama, by the cross-entropy of the answers' tokens

    python distil.py --curriculum pairs.jsonl
    python distil.py --pairs pairs.jsonl --out DIR

The pairs may as well be a large model's summaries.jsonl of one's own reports, with --manifest for
these. What comes out is a checkpoint for summarize.py, in Hugging Face's format.
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


def parse():
    """The command line's arguments, those that are typed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--curriculum", metavar="FILE", help="write the curriculum's 800,000 pairs, no more")
    add("--pairs", help='lines {"report", "abnormalities"}; or a summaries.jsonl, with --manifest')
    add("--out", help="directory of the checkpoint to write")
    add("--manifest", help="where the reports of a summaries.jsonl are")
    add("--checkpoint", help="fine-tune this one; left out: a new Llama of --vocab to --heads")
    for name in ("vocab", "width", "layers", "heads", "steps", "tokens", "seed"):
        add(f"--{name}", type=int)
    add("--reads", choices=["reports", "sentences"],
        help="what a new checkpoint is asked for: sentences if the pairs are such")
    add("--lr", type=float)
    add("--dropout", type=float, help="of the tokenizer's merges in training (BPE-dropout)")
    add("--caution", type=float,
        help="weight of pairs that affirm nothing; above 1: rather miss than invent a finding")
    add("--device")
    return parser.parse_args()


if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:
    parse()  # before torch is loaded, so that it is quick

import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import report_sha256 as sha256
from data import run_command
from llm import LLM, Config, fast_on_cpu, read_json, write_atomically
from phantom_reports import capital, findings, statements
from summarize import (
    BENCHMARK_NAMES,
    answers,
    in_order,
    read_manifest,
    report_chat,
    score,
)

RESOURCES = Path(__file__).parent / "resources"

# ---- the curriculum: single sentences ------------------------------------------------------------
def curriculum(n, seed=1000):
    """n pairs (sentence, names affirmed): a sixth are the phantom's usual ones, the rest built."""
    rng, pairs = random.Random(seed), []
    built = built_sentences(read_wordings(), rng)
    for index in itertools.count():
        for part in statements(findings(seed, "summarizer", index, enriched=True), rng):
            pairs += [(sentence, names) for sentence, names, _ in part]
        pairs += itertools.islice(built, 100)
        if len(pairs) >= n:
            return pairs[:n]


def read_wordings():
    """The curriculum's grammar; its file says what the fields are."""
    return tomllib.loads((RESOURCES / "wordings.toml").read_text("utf-8"))


def built_sentences(wordings, rng):
    """Yield pairs (sentence, names affirmed) without end; wordings: see resources/wordings.toml."""
    abnormalities, frames = wordings["abnormalities"], wordings["frames"]
    weights = [frame["weight"] for frame in frames.values()]
    while True:
        kind = rng.choices(list(frames), weights)[0]
        names = rng.sample(list(abnormalities), 3)
        affirmed = names[:frames[kind]["affirmed"]]
        if kind == "sentence":
            template = rng.choice(abnormalities[names[0]]["sentences"])
            text = filled(template.replace("{at}", " " + wordings["where"]), rng)
        else:
            phrases = [noun_phrase(wordings, name, name in affirmed, rng) for name in names]
            text = framed(wordings, frames[kind], phrases, rng)
        yield capital(text), affirmed


def framed(wordings, frame, phrases, rng):
    """One of a frame's templates with three phrases (words, verb) in it."""
    (x, be), (y, _), (z, _) = phrases
    no = filled(rng.choice(wordings["denied"]).format(x=x, y=y, z=z), rng)
    fields = {"x": x, "y": y, "z": z, "np": x, "no": no}
    fields |= {field.capitalize(): capital(words) for field, words in fields.items()}
    template = rng.choice(frame["templates"]).replace("{w}", wordings["where"])
    return filled(template, rng).format(be=be, was="was" if be == "is" else "were", **fields)


def noun_phrase(wordings, name, affirmed, rng):
    """(words, "is" or "are"); mostly with a degree, size and place if affirmed, else seldom."""
    words = filled(rng.choice(wordings["abnormalities"][name]["nouns"]), rng)
    plural, words = words[0] == "+", words.lstrip("+")
    if rng.random() < (0.7 if affirmed else 0.25):
        around = wordings["degree"], words, wordings["extent"], wordings["where"]
        words = filled(" ".join(around), rng)
        if affirmed and not plural and rng.random() < 0.4:
            words = ("an " if words[0] in "aeiou" else "a ") + words
    return words, "are" if plural else "is"


def filled(template, rng):
    """A template with its choices <a/b> made, the innermost first, and its spaces tidied."""
    while "<" in template:
        template = re.sub(r"<([^<>]*)>", lambda match: rng.choice(match[1].split("/")), template)
    template = re.sub(r"{size}", lambda _: str(rng.randint(2, 60)), template)
    template = re.sub(r"\s+", " ", template)
    return re.sub(r"\s+(?=[.,;:?])|,(?=\s*[.;:?,])", "", template).strip()


# ---- the training --------------------------------------------------------------------------------
def fit(pairs, out, checkpoint=None, manifest=None, steps=3000, tokens=3000, lr=2e-3, dropout=0.0,
        caution=1.0, dtype=torch.bfloat16, device=None, seed=0, **sizes):
    """Train a summarizer on a file of pairs, save it in `out` -> micro F1 on pairs held out.

    It starts from `checkpoint`, or as a new one of these sizes (see new_checkpoint). A batch has
    about `tokens` tokens. dropout: of the tokenizer's merges in training, so that words are met in
    other pieces, too (BPE-dropout, Provilkov et al. 2020). caution: the loss's weight of pairs that
    affirm nothing; above 1 the summarizer rather misses a finding than invents one. 2 % of the
    pairs, at most 500, are held out.
    """
    numbers = {"steps": steps, "tokens": tokens, "lr": lr, "caution": caution, **sizes}
    for name, value in numbers.items():
        if name != "reads" and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be above 0")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout is {dropout}; it must be from 0 to 1")
    rng, out, pairs = random.Random(seed), Path(out), read_pairs(pairs, manifest)
    random.Random(0).shuffle(pairs)  # whatever the seed: the next training holds out the same pairs
    n_held = min(len(pairs) // 50 + 1, 500)
    held, pairs = pairs[:n_held], pairs[n_held:]
    if checkpoint is None:
        new_checkpoint(out, pairs[:20000], seed, **sizes)
    llm = LLM.from_pretrained(checkpoint or out, device, torch.float32, trainable=True)
    chat = report_chat(llm.directory)
    if dropout:
        chat.plain.model.dropout = dropout
    weights = [weight for group in llm.weights for weight in group.values()]
    optimizer, schedule = adamw(weights, lr, steps)
    data = itertools.islice(batches(pairs, llm, chat, tokens, rng, caution), steps)
    bar = tqdm(data, total=steps, unit=" steps", desc="fit")
    for ids, answer in bar:
        loss = answer_loss(llm, ids.to(llm.device), answer.to(llm.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
    save(llm, out, dtype)
    return micro_f1(LLM.from_pretrained(out, device), held)


def read_pairs(path, manifest=None):
    """Lines {"report" or "report_sha256", "abnormalities"} -> list of (report, names).

    A report_sha256 is looked up in `manifest`. ValueError names a line that is none of these.
    """
    reports, pairs = {}, []
    if manifest:
        rows = read_manifest(manifest)
        reports = {sha256(row["report"]): row["report"] for row in rows}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            entry = json.loads(line)
            names = entry["abnormalities"]
            if names is not None:
                report = entry["report"] if "report" in entry else reports[entry["report_sha256"]]
                "".join([report, *names])  # TypeError where they are no texts
                pairs.append((report, names))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f'{path}: line {number} is no {{"report", "abnormalities"}}, nor a '
                             "summary of a report in --manifest") from None
    if len(pairs) < 10:
        raise ValueError(f"{path}: {len(pairs)} pairs are too few to train on")
    return pairs


def answer_text(names):
    """The answer that a pair teaches."""
    return "; ".join(in_order(names)) or "None"


def batches(pairs, llm, chat, tokens, rng, caution=1.0):
    """Yield batches of about `tokens` tokens without end: ids (B, T) and weights (B, T - 1).

    ids are padded on the right. weights are those of ids[:, 1:] in the loss: 0, but for an answer's
    tokens 1, or `caution` if it affirms nothing.
    """
    end = sorted(llm.stops)[:1]
    while True:
        pool = [rng.choice(pairs) for _ in range(4096)]
        prompts = chat.prompts([report for report, _ in pool], llm.config.context - 256)
        answers = chat.tokenizer.encode_batch([answer_text(names) for _, names in pool],
                                              add_special_tokens=False)
        rows = []
        for (prompt, _), answer, (_, names) in zip(prompts, answers, pool):
            answer = (answer.ids + end)[:256]
            weight = 1.0 if names else caution
            rows.append((prompt + answer, [0.0] * (len(prompt) - 1) + [weight] * len(answer)))
        # Rows of a length go together, so that little is padding.
        groups = [[]]
        for row in sorted(rows, key=lambda row: len(row[0])):
            if groups[-1] and (len(groups[-1]) + 1) * len(row[0]) > tokens:
                groups.append([])
            groups[-1].append(row)
        yield from map(padded, rng.sample(groups, len(groups)))


def padded(rows):
    """rows (ids, weights) -> a batch's ids and weights."""
    ids, weights = zip(*rows)
    ids, weights = list(map(torch.tensor, ids)), list(map(torch.tensor, weights))
    return pad_sequence(ids, batch_first=True), pad_sequence(weights, batch_first=True)


def answer_loss(llm, ids, weights):
    """Weighted cross-entropy of the answers' tokens, per token; ids, weights: see batches."""
    answer = weights > 0
    fast = llm.device.type == "cuda" or fast_on_cpu(torch.bfloat16)
    with torch.autocast(llm.device.type, torch.bfloat16, enabled=fast):
        logits = F.linear(llm.hidden(ids)[:, :-1][answer], llm.head)
        losses = F.cross_entropy(logits.float(), ids[:, 1:][answer], reduction="none")
    return losses @ weights[answer] / answer.sum()


def adamw(weights, lr, steps):
    """AdamW, which decays matrices alone, and its rate: a warm-up of 5 %, then a cosine."""
    groups = [{"params": [weight for weight in weights if weight.ndim == 2], "weight_decay": 0.05},
              {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.98))

    def rate(step):
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1))
        return min((step + 1) / (0.05 * steps), cosine)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def micro_f1(llm, pairs):
    """Micro F1 of a summarizer over the benchmarks' names on pairs (report, names)."""
    rows, records = [], {}
    for report, names in pairs:
        labels = {f"label:{name}": name in names for name in BENCHMARK_NAMES}
        rows.append(labels | {"report": report})
    for i, names, _, _ in answers(llm, [report for report, _ in pairs]):
        records[sha256(pairs[i][0])] = {"abnormalities": names}
    return score(rows, records)["micro"]["f1"]


# ---- the checkpoint: a new one, and saving -------------------------------------------------------
def new_checkpoint(out, pairs, seed, vocab=2000, width=128, layers=4, heads=4, reads="reports"):
    """Write a Llama of random weights, and a tokenizer trained on pairs, into directory `out`.

    Its prompt is the report alone: a small model has its task in its weights. reads: "sentences"
    where the pairs are single sentences, which are then what it is asked for, one by one.
    """
    files, texts = read_json(RESOURCES / "small_llama.json"), []
    for report, names in pairs:
        texts += report, answer_text(names)
    tokenizer = new_tokenizer(texts, vocab, files["special_tokens"])
    config = files["config.json"] | {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "reads": reads}
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in Config(config).shapes().items():
        weights[name] = torch.ones(shape)
        if len(shape) == 2:
            weights[name] = 0.05 * torch.randn(shape, generator=generator)
    write_atomically(out / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    write_atomically(out / "chat_template.jinja", files["chat_template.jinja"].encode())
    for name in ("tokenizer_config.json", "generation_config.json"):
        write_json(out / name, files[name])
    write_checkpoint(out, weights, config)


def write_checkpoint(out, weights, config):
    """Write weights (name -> tensor) and config, Hugging Face's, into directory `out`."""
    write_atomically(out / "model.safetensors", to_safetensors(weights, {"format": "pt"}))
    write_json(out / "config.json", config)


def new_tokenizer(texts, vocab, special_tokens):
    """A lower-casing byte-level BPE tokenizer, trained on texts; a digit is a piece of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.decoder = normalizers.Lowercase(), decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=True)])
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special_tokens, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def write_json(path, content):
    """Write a JSON file of a checkpoint."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def save(llm, out, dtype):
    """Write a trained LLM into directory `out`, with its checkpoint's tokenizer and template."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                 "generation_config.json"):
        source = llm.directory / name
        if source.exists():
            write_atomically(out / name, source.read_bytes())
    weights = {}
    for name, weight in llm.state_dict().items():
        weights[name] = weight.detach().to("cpu", dtype).clone()
    config = llm.config.raw | {"dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)  # its older name
    write_checkpoint(out, weights, config)


# ---- command line --------------------------------------------------------------------------------
def main():
    settings = vars(parse())
    if "curriculum" in settings:
        path, lines = settings["curriculum"], []
        for sentence, names in curriculum(800_000):
            lines.append(json.dumps({"report": sentence, "abnormalities": names}) + "\n")
        write_atomically(path, "".join(lines).encode())
        print(f"{path}: 800,000 pairs")
        return
    if not settings.keys() >= {"pairs", "out"}:
        raise ValueError("give --pairs and --out, or --curriculum alone")
    f1 = fit(**settings)
    result = "none of them affirms anything" if f1 is None else f"{f1:.3f}"
    print(f"{settings['out']}: saved; micro F1 on pairs held out: {result}")


if __name__ == "__main__":
    sys.exit(run_command(main))
