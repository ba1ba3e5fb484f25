"""A small summarizer from pairs: what it is taught on, its training."""
import itertools
import random
import re
from pathlib import Path

import phantom_reports
from phantom_reports import capital

# What the small summarizer is trained on: single sentences, in the phantom's usual wordings and built from checkpoints/wordings.txt (<a/b> is a choice, "+" marks a
# plural). A large language model wrote those wordings without sight of the phantom's; what coincided with a held-out one was taken out (tests/test_bench.py).
WHERE = ("< / / / / / /in the <right/left> <upper/lower> lobe/in the middle lobe/in the lingula/in both lungs/in the <right/left> <upper lobe and middle lobe/lower lobe and lingula>"
         "/on the <right/left>/bilaterally/on both sides/in the <right/left/> hemithorax/in both hemithoraces/at the <bases/apex/hilar level/carina>/in the <upper/middle/lower> zones"
         "/at the level of the <carina/aortic arch/diaphragm>/in the T<7/9/11> to T<8/10/12> levels/of the <left/right> <4th/6th and 7th> ribs>")
DEGREE = "< / / / / / /mild/marked/small/large/extensive/diffuse/focal/minimal/moderate/slight/old/patchy/subtle/pronounced/chronic/bilateral/right/left/new/known>"
EXTENT = ("< / / / / / / / / /of {size} mm/measuring {size} mm/measuring {size}x{size} mm/up to {size} mm/{size} mm in <size/diameter/thickness>/reaching {size} mm"
          "/, the largest {size} mm,/with a diameter of {size} mm>")


def filled(template, rng):
    """A template with its choices made."""
    while "<" in template:
        template = re.sub(r"<([^<>]*)>", lambda match: rng.choice(match[1].split("/")), template)
    template = re.sub(r"{size}", lambda _: str(rng.randint(2, 60)), template)
    return re.sub(r"\s+(?=[.,;:?])|,(?=\s*[.;:?,])", "", re.sub(r"\s+", " ", template)).strip()


def read_wordings(path):
    """checkpoints/wordings.txt -> {abnormality: templates, a sentence's ends with "."}, {kind of frame: frames}; lines that begin with a space go on."""
    wordings = {name: body.split("|") for name, body in phantom_reports.entries(path.read_text("utf-8"))}
    frames = {kind: wordings.pop(kind) for kind in ("affirm", "deny", "past", "ask", "both", "neither", "mixed")}
    return wordings, frames


def built_sentences(wordings, frames, rng):
    """Yield pairs (sentence, names affirmed) without end: noun phrases of `wordings` in `frames`, and its sentences as they are."""
    names = list(wordings)
    nouns = {name: [template for template in wordings[name] if template[-1] != "."] for name in names}
    sentences = {name: [template for template in wordings[name] if template[-1] == "."] for name in names}
    kinds = {"affirm": (8, 1), "sentence": (4, 1), "deny": (8, 0), "past": (6, 0), "ask": (1, 0), "both": (2, 2), "neither": (2, 0), "mixed": (2, 1)}

    def phrase(name, affirmed):
        """A noun phrase -> (words, is or are), mostly with a degree, a size, a place or an article where affirmed, seldom where denied."""
        words = filled(rng.choice(nouns[name]), rng)
        plural, words = words[0] == "+", words.lstrip("+")
        if rng.random() < (0.7 if affirmed else 0.25):
            words = filled(f"{DEGREE} {words} {EXTENT} {WHERE}", rng)
            if affirmed and not plural and rng.random() < 0.4:
                words = ("an " if words[0] in "aeiou" else "a ") + words
        return words, "are" if plural else "is"
    while True:
        kind = rng.choices(list(kinds), [weight for weight, _ in kinds.values()])[0]
        chosen = rng.sample(names, 3)
        affirmed = kinds[kind][1]
        if kind == "sentence":
            text = filled(rng.choice(sentences[chosen[0]]).replace("{at}", f" {WHERE}"), rng)
        else:
            (x, be), (y, _), (z, _) = (phrase(name, i < affirmed) for i, name in enumerate(chosen))
            no = filled(rng.choice(("{x}", "{x}", "{x}", "{x} or {y}", "{x} or {y}", "{x}, {y} or {z}", "{x}, {y}, {z}", "{x} and {y}")).format(x=x, y=y, z=z), rng)
            text = rng.choice(frames[kind]).replace("{w}", WHERE)
            fields = {"x": x, "y": y, "z": z, "np": x, "no": no, "be": be, "was": {"is": "was", "are": "were"}[be]}
            fields |= {field.capitalize(): capital(fields[field]) for field in ("x", "y", "z", "np", "no")}
            text = filled(text, rng).format(**fields)
        yield capital(text), chosen[:affirmed]


def summarizer_pairs(n, seed=1000):
    """n pairs (sentence, names affirmed) to train the small summarizer on: a sixth the phantom's, the rest built; no held-out phrase is among them."""
    rng = random.Random(seed)
    wordings, frames = read_wordings(Path(__file__).parent / "checkpoints" / "wordings.txt")
    built, pairs = built_sentences(wordings, frames, rng), []
    for index in itertools.count():
        found = phantom_reports.findings(seed, "summarizer", index, enriched=True)
        for part in phantom_reports.statements(found, rng):
            pairs += [(sentence, names) for sentence, names, _ in part]
        pairs += itertools.islice(built, 100)
        if len(pairs) >= n:
            return pairs[:n]
