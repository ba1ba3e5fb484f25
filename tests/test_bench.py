"""bench.py is run by hand; here that each of its commands is there, and what the small summarizer is trained on."""
import itertools
import random
import re
import subprocess
import sys
from pathlib import Path

import data
import distil
import phantom_reports

ROOT = Path(__file__).resolve().parent.parent


def test_every_command_says_what_it_measures():
    done = subprocess.run([sys.executable, "bench.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"    {command} " in done.stdout for command in ("preprocess", "evaluate", "summarize", "attention", "ablation"))


def bare(text):
    """A wording without fields, articles, plural endings and punctuation: what is compared."""
    words = re.findall(r"[^\W_]+", re.sub(r"{\w+}", " ", text).casefold())
    return " ".join(re.sub(r"(?<=...)s$", "", word) for word in words if word not in ("a", "an", "the"))


def frame(text):
    return bare(re.sub(r"{be}|{was}", " is ", re.sub(r"{(np|no|x)}", " NP ", text, flags=re.I)))


def expansions(template):
    choice = re.search(r"<([^<>]*)>", template)
    if not choice:
        return [template]
    return [text for option in choice[1].split("/") for text in expansions(template[:choice.start()] + option + template[choice.end():])]


def test_no_held_out_wording_is_in_the_curriculum():
    phrases, frames = distil.read_wordings(ROOT / "checkpoints" / "wordings.txt")
    assert set(phrases) == {*data.CT_RATE, *data.CT_RATE_LT}
    usual, held_out = ([bare(phrase) for _, *parts in phantom_reports.GRAMMAR.values() for part in parts[start::2] for phrase in part.split("|")] for start in (0, 1))
    held_out = [phrase for phrase in held_out if " " in phrase and not any(phrase in other for other in usual)]
    any_held_out = re.compile(rf"\b({'|'.join(held_out)})\b")
    held_out_frames = {frame(text) for kind in (phantom_reports.FRAMES, phantom_reports.IMPRESSION_FRAMES, phantom_reports.NEGATIONS) for text in kind["held-out"].split("|")}
    assert len(held_out) > 100 and len(held_out_frames) == 9
    for text in (text for templates in phrases.values() for template in templates for text in expansions(template)):
        assert not any_held_out.search(bare(text)), text
    for text in (text for templates in frames.values() for template in templates for text in expansions(template)):
        assert frame(text) not in held_out_frames, text


def test_a_built_sentence_affirms_what_its_frame_says():
    phrases = {"Cardiomegaly": ["big heart", "The heart is big."], "Empyema": ["pus", "Pus is there {at}."], "Lung mass": ["+<masses/tumours>", "It grows."]}
    frames = {"affirm": ["{Np} {be} seen."], "deny": ["No {no}."], "past": ["{No} is gone."], "ask": ["{No}?"], "both": ["{x} plus {y}."],
              "neither": ["Neither {x} nor {y}."], "mixed": ["{x}, no {y}."]}
    words = {"Cardiomegaly": "heart", "Empyema": "pus", "Lung mass": "(masses|tumours|grows)"}
    kinds = {r"^(No|Neither) |gone\.$|\?$": 0, r" plus ": 2}
    for text, names in itertools.islice(distil.built_sentences(phrases, frames, random.Random(0)), 2000):
        assert len(names) == next((count for pattern, count in kinds.items() if re.search(pattern, text)), 1), text
        said = re.split(r", no ", text)[0]
        assert all(re.search(words[name], said, re.I) for name in names) and not re.search(r"[<>{}/]|  ", text), text
        assert text.startswith(("Mass", "Tumour")) <= (" is seen" not in text)
