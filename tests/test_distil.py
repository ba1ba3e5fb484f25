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
    llm, peer = (
        LLM.from_pretrained(directory / "model", "cpu"),
        transformers.AutoModelForCausalLM.from_pretrained(directory / "model"),
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory / "model")
    ((ids, _),) = summarize.report_chat(llm.directory).prompts([pairs[0][0]], 500)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": pairs[0][0]}], add_generation_prompt=True
    )
    assert (chat["input_ids"] if not isinstance(chat, list) else chat) == ids
    with torch.no_grad():
        assert (
            llm.logits(torch.tensor([ids])) - peer(torch.tensor([ids])).logits
        ).abs().max() < 1e-4
    assert (
        peer.generate(torch.tensor([ids]), max_new_tokens=20)[0, len(ids) : -1].tolist()
        == greedy(llm, [ids])[0]
    )


def test_fit_goes_on_from_a_checkpoint_with_summaries_and_their_manifest(fitted, tmp_path, command):
    directory, pairs, _ = fitted
    manifest(tmp_path / "m.csv", [report for report, _ in pairs[:40]])
    lines = [
        json.dumps({"report_sha256": summarize.sha256(report), "abnormalities": names}) + "\n"
        for report, names in pairs[:40]
    ]
    (tmp_path / "s.jsonl").write_text(
        "".join(lines) + json.dumps({"report_sha256": "failed", "abnormalities": None}) + "\n"
    )
    status, output, _ = command(
        distil.main,
        "distil.py",
        "--pairs",
        tmp_path / "s.jsonl",
        "--manifest",
        tmp_path / "m.csv",
        "--checkpoint",
        directory / "model",
        "--out",
        tmp_path / "out",
        "--steps",
        2,
        "--tokens",
        200,
    )
    assert status == 0 and "micro F1" in output
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    }


def test_caution_weighs_the_answers_of_pairs_that_affirm_nothing(fitted):
    llm, answers = LLM.from_pretrained(fitted[0] / "model", "cpu"), {1.0: set(), 3.0: set()}
    for ids, weights in distil.batches(
        fitted[1], llm, summarize.report_chat(llm.directory), 600, 20, random.Random(0), caution=3.0
    ):
        for row, weight in zip(ids, weights):
            answers[weight.max().item()].add(
                llm.tokenizer.decode(row[1:][weight > 0].tolist()).strip().lower()
            )
            assert set(weight.tolist()) == {0.0, weight.max().item()}
    assert answers[3.0] == {"none"} and len(answers[1.0]) == 7  # every way to affirm some of three


def test_a_fit_without_caution_is_refused(fitted, tmp_path):
    with pytest.raises(ValueError, match="caution is 0"):
        distil.fit(
            fitted[0] / "pairs.jsonl",
            tmp_path / "out",
            fitted[0] / "model",
            steps=1,
            caution=0,
            device="cpu",
        )


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
        texts += expansions(template[: choice.start()] + option + template[choice.end() :])
    return texts


def expanded(*lists):
    return [text for template in itertools.chain(*lists) for text in expansions(template)]


def phrases_of(wordings):
    parts = [entry[wordings].values() for entry in phantom_reports.GRAMMAR.values()]
    return [bare(text) for text in itertools.chain(*itertools.chain(*parts))]


def test_no_held_out_wording_is_in_the_curriculum():
    wordings, frames = distil.read_wordings()
    assert set(wordings) == set(phantom_reports.ABNORMALITIES)
    usual, held_out = phrases_of("usual"), set(phrases_of("held-out"))
    held_out = [text for text in held_out if " " in text and not any(text in u for u in usual)]
    any_held_out = re.compile(rf"\b({'|'.join(held_out)})\b")
    held_out_frames = set(
        map(bare_frame, itertools.chain(*phantom_reports.FRAMES["held-out"].values()))
    )
    assert len(held_out) > 100 and len(held_out_frames) == 9
    for entry in wordings.values():
        for text in expanded(entry["phrases"], entry["sentences"]):
            assert not any_held_out.search(bare(text)), text
    for text in expanded(*frames.values()):
        assert bare_frame(text) not in held_out_frames, text


def test_a_built_sentence_affirms_what_its_frame_says():
    wordings = {
        "Cardiomegaly": {"phrases": ["big heart"], "sentences": ["The heart is big."]},
        "Empyema": {"phrases": ["pus"], "sentences": ["Pus is there {at}."]},
        "Lung mass": {"phrases": ["+<masses/tumours>"], "sentences": ["It grows."]},
    }
    frames = {
        "affirm": ["{Np} {be} seen."],
        "deny": ["No {no}."],
        "past": ["{No} is gone."],
        "ask": ["{No}?"],
        "both": ["{x} plus {y}."],
        "neither": ["Neither {x} nor {y}."],
        "mixed": ["{x}, no {y}."],
    }
    words = {"Cardiomegaly": "heart", "Empyema": "pus", "Lung mass": "(masses|tumours|grows)"}
    kinds = {r"^(No|Neither) |gone\.$|\?$": 0, r" plus ": 2}
    built = distil.built_sentences(wordings, frames, random.Random(0))
    for text, names in itertools.islice(built, 2000):
        counts = [count for pattern, count in kinds.items() if re.search(pattern, text)]
        assert len(names) == (counts or [1])[0], text
        said = re.split(r", no ", text)[0]
        assert all(re.search(words[name], said, re.I) for name in names)
        assert not re.search(r"[<>{}/]|  ", text), text
        assert text.startswith(("Mass", "Tumour")) <= (" is seen" not in text)
