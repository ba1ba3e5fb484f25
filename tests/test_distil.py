"""A small summarizer's training, and what it is taught on."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch
from test_llm import greedy
from test_summarize import manifest

import distil
import phantom_reports
import summarize
from llm import LLM

ROOT = Path(__file__).resolve().parent.parent


def test_fit_learns_its_pairs(fitted):
    assert fitted[2] > 0.95


def test_a_fitted_checkpoint_loads_in_transformers_and_agrees(fitted):
    transformers = pytest.importorskip("transformers")
    directory, pairs, _ = fitted
    llm = LLM.from_pretrained(directory / "model", "cpu")
    peer = transformers.AutoModelForCausalLM.from_pretrained(directory / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory / "model")
    ((ids, _),) = summarize.report_chat(llm.directory).prompts([pairs[0][0]], 500)
    messages = [{"role": "user", "content": pairs[0][0]}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert (chat["input_ids"] if not isinstance(chat, list) else chat) == ids
    prompt = torch.tensor([ids])
    with torch.no_grad():
        assert (llm.logits(prompt) - peer(prompt).logits).abs().max() < 1e-4
    answer = peer.generate(prompt, max_new_tokens=20)[0, len(ids):-1]
    assert answer.tolist() == greedy(llm, [ids])[0]


def test_fit_goes_on_from_a_checkpoint_with_summaries_and_their_manifest(fitted, tmp_path, command):
    directory, pairs, _ = fitted
    manifest(tmp_path / "m.csv", [report for report, _ in pairs[:40]])
    lines = [json.dumps({"report_sha256": "failed", "abnormalities": None}) + "\n"]
    for report, names in pairs[:40]:
        record = {"report_sha256": summarize.sha256(report), "abnormalities": names}
        lines.append(json.dumps(record) + "\n")
    (tmp_path / "s.jsonl").write_text("".join(lines))
    status, output, _ = command(
        distil.main, "distil.py", "--pairs", tmp_path / "s.jsonl", "--manifest", tmp_path / "m.csv",
        "--checkpoint", directory / "model", "--out", tmp_path / "out", "--steps", 2,
        "--tokens", 200)
    assert status == 0 and "micro F1" in output
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "generation_config.json"}


def test_caution_weighs_the_answers_of_pairs_that_affirm_nothing(fitted):
    llm, answers = LLM.from_pretrained(fitted[0] / "model", "cpu"), {1.0: set(), 3.0: set()}
    chat = summarize.report_chat(llm.directory)
    batches = distil.batches(fitted[1], llm, chat, 600, random.Random(0), caution=3.0)
    for ids, weights in itertools.islice(batches, 20):
        for row, weight in zip(ids, weights):
            answer = llm.tokenizer.decode(row[1:][weight > 0].tolist())
            answers[weight.max().item()].add(answer.strip().lower())
            assert set(weight.tolist()) == {0.0, weight.max().item()}
    assert answers[3.0] == {"none"} and len(answers[1.0]) == 7  # every way to affirm some of three


def test_a_fit_without_caution_is_refused(fitted, tmp_path):
    directory, _, _ = fitted
    with pytest.raises(ValueError, match="caution is 0"):
        distil.fit(directory / "pairs.jsonl", tmp_path / "out", directory / "model", caution=0)


def test_the_command_line_asks_for_pairs_or_a_curriculum(tmp_path, command):
    status, _, error = command(distil.main, "distil.py", "--out", tmp_path / "out")
    assert status == 2 and "give --pairs and --out, or --curriculum" in error


# ---- the curriculum

def bare(text):
    """A wording without fields, articles, plural endings and punctuation: what is compared."""
    words = re.findall(r"[^\W_]+", re.sub(r"{\w+}", " ", text).casefold())
    words = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(re.sub(r"(?<=...)s$", "", word) for word in words)


def bare_frame(text):
    text = re.sub(r"{(np|no|x)}", " NP ", text, flags=re.I)
    return bare(re.sub(r"{be}|{was}", " is ", text))


def expansions(template):
    """Every text that a template with choices stands for."""
    choice = re.search(r"<([^<>]*)>", template)
    if not choice:
        return [template]
    texts = []
    for option in choice[1].split("/"):
        texts += expansions(template[:choice.start()] + option + template[choice.end():])
    return texts


def expanded(*lists):
    return [text for template in itertools.chain(*lists) for text in expansions(template)]


def phantom_phrases(wordings):
    """The phantom's phrases of "usual" or "held-out" wordings, bare."""
    parts = [entry[wordings].values() for entry in phantom_reports.GRAMMAR.values()]
    return [bare(text) for text in itertools.chain(*itertools.chain(*parts))]


def phantom_frames(wordings):
    """The phantom's frames of "usual" or "held-out" wordings, bare."""
    return set(map(bare_frame, itertools.chain(*phantom_reports.FRAMES[wordings].values())))


def test_no_held_out_wording_is_in_the_curriculum():
    wordings = distil.read_wordings()
    assert set(wordings["abnormalities"]) == set(phantom_reports.ABNORMALITIES)
    usual, held_out = phantom_phrases("usual"), set(phantom_phrases("held-out"))
    held_out = [text for text in held_out if " " in text and not any(text in u for u in usual)]
    any_held_out = re.compile(rf"\b({'|'.join(held_out)})\b")
    held_out_frames = phantom_frames("held-out")
    assert len(held_out) > 100 and len(held_out_frames) == 9
    for entry in wordings["abnormalities"].values():
        for text in expanded(entry["nouns"], entry["sentences"]):
            assert not any_held_out.search(bare(text)), text
    for frame in wordings["frames"].values():
        for text in expanded(frame["templates"]):
            assert bare_frame(text) not in held_out_frames, text


def test_a_built_sentence_affirms_what_its_frame_says():
    wordings = distil.read_wordings()
    wordings["abnormalities"] = {
        "Cardiomegaly": {"nouns": ["big heart"], "sentences": ["The heart is big."]},
        "Empyema": {"nouns": ["pus"], "sentences": ["Pus is there {at}."]},
        "Lung mass": {"nouns": ["+<masses/tumours>"], "sentences": ["It grows."]},
    }
    templates = {
        "affirm": "{Np} {be} seen.", "deny": "No {no}.", "past": "{No} is gone.", "ask": "{No}?",
        "both": "{x} plus {y}.", "neither": "Neither {x} nor {y}.", "mixed": "{x}, no {y}.",
    }
    for kind, template in templates.items():
        wordings["frames"][kind]["templates"] = [template]
    words = {"Cardiomegaly": "heart", "Empyema": "pus", "Lung mass": "(masses|tumours|grows)"}
    kinds = {r"^(No|Neither) |gone\.$|\?$": 0, r" plus ": 2}
    built = distil.built_sentences(wordings, random.Random(0))
    for text, names in itertools.islice(built, 2000):
        counts = [count for pattern, count in kinds.items() if re.search(pattern, text)]
        assert len(names) == (counts or [1])[0], text
        said = re.split(r", no ", text)[0]
        assert all(re.search(words[name], said, re.I) for name in names)
        assert not re.search(r"[<>{}/]|  ", text), text
        assert text.startswith(("Mass", "Tumour")) <= (" is seen" not in text)


def test_the_curriculum_is_the_same_for_the_same_seed():
    pairs = distil.curriculum(2000)
    assert len(pairs) == 2000 and pairs == distil.curriculum(2000)
    assert pairs != distil.curriculum(2000, seed=1)
    known = set(summarize.BENCHMARK_NAMES)
    assert all(text and known.issuperset(names) for text, names in pairs)
