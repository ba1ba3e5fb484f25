"""The synthetic benchmark's findings, and what its reports say: which abnormalities a scan has,
and a radiologist-like report that affirms just these. phantom.py draws the volumes.

Everything follows from (seed, split, index). Data stands in resources/phantom.toml: prevalences,
what occurs together, how lesions are drawn, and the wordings.

    from phantom_reports import reports
    for text, affirmed, denied in reports(3, seed=0):
        print(text, affirmed, denied)
"""
import math
import random
import tomllib
from pathlib import Path
from statistics import NormalDist

_text = Path(__file__).with_name("resources").joinpath("phantom.toml").read_text("utf-8")
_data = tomllib.loads(_text)
GRAMMAR, FRAMES, NORMAL = _data["abnormality"], _data["frames"], _data["normal"]
CAUSES, TEXTS, CORONARIES = _data["causes"], _data["texts"], _data["coronaries"]
ABNORMALITIES = list(GRAMMAR)
CT_RATE = [name for name in GRAMMAR if GRAMMAR[name]["benchmark"] == "ct-rate"]
CT_RATE_LT = [name for name in GRAMMAR if GRAMMAR[name]["benchmark"] == "ct-rate-lt"]
SIDES = ("right", "left")

# ---- 1. What is found ----------------------------------------------------------------------------
#
# Abnormalities occur together: age brings calcifications and spondylosis, heart failure effusions.
# So each has a latent normal variable, a weighted sum of shared causes and a part of its own: it is
# there where that exceeds a threshold (a Gaussian copula: prevalences stay as they are given).

def implied(name):
    """What an abnormality brings along."""
    return GRAMMAR[name].get("implies", ())


def _thresholds(column):
    """The latent threshold of each abnormality for its prevalence in a column of the grammar."""
    prevalence = {name: entry[column] for name, entry in GRAMMAR.items()}
    for cause in GRAMMAR:  # leave room for those that others bring along
        for effect in implied(cause):
            p = prevalence[cause]
            prevalence[effect] = (prevalence[effect] - p) / (1 - p)
    return {name: NormalDist().inv_cdf(1 - p) for name, p in prevalence.items()}


def _own_share(name):
    """The loading of an abnormality's own part: what its causes leave of a variance of 1."""
    shared = sum(loadings.get(name, 0)**2 for loadings in CAUSES.values())
    return math.sqrt(1 - shared)


THRESHOLDS = {False: _thresholds("prevalence"), True: _thresholds("prevalence_valid")}
OWN = {name: _own_share(name) for name in GRAMMAR}


def findings(seed, split, index, enriched=False):
    """Which abnormalities scan `index` of a split has: dict name -> list of lesions (dicts).

    split "valid" (or enriched) has the rare ones at 6 to 10 %. A patient's second scan keeps what
    is chronic; nodules have grown or shrunk a little, what is acute is drawn anew.
    """
    patient, second = patient_of(seed, split, index)
    enriched = enriched or split == "valid"
    first_rng = random.Random(f"findings {seed} {split} {patient} 0")
    first = _sample(first_rng, enriched)
    if not second:
        return first
    rng = random.Random(f"findings {seed} {split} {patient} 1")
    fresh = _sample(rng, enriched)
    growth = rng.uniform(.8, 1.3)
    merged = {name: lesions for name, lesions in fresh.items() if GRAMMAR[name]["acute"]}
    for name, lesions in first.items():
        if name == "Lung nodule":
            lesions = [grown(lesion, growth) for lesion in lesions]
        if not GRAMMAR[name]["acute"]:
            merged[name] = lesions
    for cause in GRAMMAR:  # what a new acute cause brings along
        for effect in implied(cause):
            if cause in merged and effect not in merged:
                merged[effect] = fresh.get(effect) or first[effect]
    return {name: merged[name] for name in ABNORMALITIES if name in merged}


def grown(nodule, growth):
    """A nodule after some time; none grows into a mass."""
    return nodule | {"size": min(30, round(nodule["size"] * growth))}


def patient_of(seed, split, index):
    """Scan index -> (patient number, whether it is that patient's second scan).

    In each 11 scans, one of 10 patients has two.
    """
    block, place = divmod(index, 11)
    twice = random.Random(f"patient {seed} {split} {block}").randrange(10)
    return 10 * block + place - (place > twice), place == twice + 1


def _sample(rng, enriched):
    """Findings of one scan: dict name -> lesions, in ABNORMALITIES' order."""
    latent = {name: OWN[name] * rng.gauss(0, 1) for name in ABNORMALITIES}
    for loadings in CAUSES.values():
        strength = rng.gauss(0, 1)
        for name, loading in loadings.items():
            latent[name] += loading * strength
    threshold = THRESHOLDS[enriched]
    present = {name for name in ABNORMALITIES if latent[name] > threshold[name]}
    present.update(*map(implied, present))
    found = {name: lesions(name, rng) for name in ABNORMALITIES if name in present}
    return {name: [placed(lesion, rng) for lesion in each] for name, each in found.items()}


def placed(lesion, rng):
    """A lesion with the three random numbers in [0, 1) from which phantom.py draws it."""
    return lesion | {"place": (rng.random(), rng.random(), rng.random())}


def lesions(name, rng):
    """Draw the lesions of an abnormality, as its entry in phantom.toml says: list of dicts."""
    spec = GRAMMAR[name]["lesions"]
    return LESION_KINDS[spec["where"]](spec, rng)


def _measured(lesion, spec, rng):
    """The lesion with its size in mm, number and scale, where the spec has these."""
    if "size" in spec:
        size = rng.uniform(*spec["size"])
        lesion["size"] = size if spec.get("fine") else round(size)
    if "n" in spec:
        lesion["n"] = rng.randint(*spec["n"])
    if "scale" in spec:
        lesion["scale"] = rng.uniform(*spec["scale"])
    return lesion


def _one(spec, rng):
    return [_measured({}, spec, rng)]


def _each_side(spec, rng):
    """One on each side, in a lobe of it where the spec names one."""
    out = []
    for side in SIDES:
        lesion = {"side": side} | ({"lobe": f"{side} {spec['lobe']}"} if "lobe" in spec else {})
        out.append(_measured(lesion, spec, rng))
    return out


def _on_sides(spec, rng):
    """One on a random side, or one on each."""
    sides = SIDES if rng.random() < spec["both"] else (rng.choice(SIDES),)
    return [_measured({"side": side}, spec, rng) for side in sides]


def _in_lobes(spec, rng):
    """Several, in lobes drawn without replacement while there are any."""
    among, n, lobes = spec["among"], spec["count"], []
    if isinstance(n, list):
        n = rng.choice(n)
    while len(lobes) < n:
        lobes += rng.sample(among, len(among))
    out = []
    for lobe in lobes[:n]:
        out.append(_measured({"lobe": lobe, "side": lobe.split()[0]}, spec, rng))
    if "what" in spec:
        for lesion in out:
            lesion["what"] = rng.choice(spec["what"])
    return out


def _some_of(spec, rng):
    """Several of a list of things."""
    out, n = [], rng.choice(spec["count"])
    for what in rng.sample(spec["of"], n):
        lesion = {"what": what} | ({"side": rng.choice(SIDES)} if spec.get("side") else {})
        out.append(_measured(lesion, spec, rng))
    return out


def _at_vertebrae(spec, rng):
    """Three to six vertebrae, each on the right, the left or both sides."""
    out, n = [], rng.randint(3, 6)
    for vertebra in sorted(rng.sample(range(5, 12), n)):
        lesion = {"what": f"T{vertebra}", "side": rng.choice((*SIDES, "both"))}
        out.append(_measured(lesion, spec, rng))
    return out


def _neighbouring_vertebrae(spec, rng):
    first, n = rng.randint(4, 6), rng.randint(4, 6)
    return [{"what": f"T{vertebra}"} for vertebra in range(first, first + n)]


def _neighbouring_ribs(spec, rng):
    side, first, n = rng.choice(SIDES), rng.randint(3, 7), rng.randint(1, 4)
    return [_measured({"side": side, "rib": rib}, spec, rng) for rib in range(first, first + n)]


LESION_KINDS = {
    "one": _one, "each side": _each_side, "sides": _on_sides, "lobes": _in_lobes,
    "some of": _some_of, "vertebrae with a side": _at_vertebrae,
    "neighbouring vertebrae": _neighbouring_vertebrae, "neighbouring ribs": _neighbouring_ribs,
}


# ---- 2. What is said -----------------------------------------------------------------------------

def joined(words, last=" and "):
    """`a, b and c`, each word once."""
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + last + words[-1]


def capital(text):
    """text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def _fields(lesions):
    """What a phrase may name of an abnormality's lesions: sizes, sides, lobes, levels."""
    sides = {lesion.get("side", "both") for lesion in lesions}
    side = sides.pop() if len(sides) == 1 else "both"
    size = round(max(lesion.get("size", 0) for lesion in lesions))
    lobes = [lesion["lobe"] for lesion in lesions if "lobe" in lesion]
    whats = [lesion["what"] for lesion in lesions if "what" in lesion]
    what = joined([CORONARIES.get(word, word) for word in whats]) if whats else ""
    ribs = [lesion["rib"] for lesion in lesions if "rib" in lesion]
    if ribs:
        ordinals = joined([f"{rib}{'rd' if rib == 3 else 'th'}" for rib in ribs])
        what = f"{side} {ordinals} rib{'s' * (len(ribs) > 1)}"
    return {
        "size": size,
        "size2": max(round(.8 * size), 3),
        "what": what,
        "side": "bilateral" if side == "both" else side,
        "on": "bilaterally" if side == "both" else f"on the {side}",
        "hemi": "in both hemithoraces" if side == "both" else f"in the {side} hemithorax",
        "at": f"in the {joined(lobes)}" if 0 < len(set(lobes)) < 4 else "in both lungs",
        "amount": "minimal" if size < 20 else "moderate" if size < 38 else "marked",
    }


def _affirmation(rng, phrases, frames, lesions):
    """A sentence that affirms an abnormality."""
    phrase = rng.choice(phrases).format(**_fields(lesions))
    if not phrase.endswith("."):
        plural, noun = phrase[0] == "+", phrase.removeprefix("+")
        be, was = ("are", "were") if plural else ("is", "was")
        phrase = rng.choice(frames).format(np=noun, Np=capital(noun), be=be, was=was)
    return capital(phrase)


def _denials(rng, organ, absent, wordings):
    """Up to two sentences (text, names affirmed, names denied) that deny absent abnormalities."""
    out = []
    for _ in range(rng.choice((0, 0, 1)) + (organ == "lungs")):
        names = rng.sample(absent, min(len(absent), rng.choice((1, 1, 2, 2, 3))))
        if names:
            terms = [rng.choice(GRAMMAR[name][wordings]["negated"]) for name in names]
            no = joined(terms, " or ")
            frame = rng.choice(FRAMES[wordings]["negated"])
            out.append((frame.format(no=no, No=capital(no)), [], names))
    return out


def _normal_statements(rng, organ, statements, found):
    """Up to two normal statements that are true, as sentences (text, [], names denied)."""
    true = []
    for statement in statements:
        unless = statement.get("unless", [])
        if found.keys().isdisjoint(unless):
            true.append((statement["text"], [], unless))
    talkative = (organ in ("abdomen", "bones", "lungs")) + 2 * (len(found) < 4)
    counts = ((0, 0, 1), (0, 1, 2), (0, 1, 1), (1, 2, 2))[talkative]
    return rng.sample(true, min(len(true), rng.choice(counts)))


def statements(found, rng, wordings="usual"):
    """The sentences of a report's Findings and of its Impressions, for `found` (see findings).

    Two lists of (sentence, names affirmed, names denied). rng: random.Random; wordings: "usual", or
    "held-out" (in no data set). Each abnormality found is affirmed in the findings and mostly in
    the impression; any other is left out, denied, or excluded by a statement that all is normal.
    """
    frames, all_sentences = FRAMES[wordings], []
    by_organ = {entry["organ"]: [] for entry in NORMAL}
    for name, entry in GRAMMAR.items():
        if name in found:
            phrases = entry[wordings]["findings"]
            text = _affirmation(rng, phrases, frames["findings"], found[name])
            by_organ[entry["organ"]].append((text, [name], []))
    for entry in NORMAL:
        organ = entry["organ"]
        absent = [name for name in ABNORMALITIES if name not in found]
        absent = [name for name in absent if GRAMMAR[name]["organ"] == organ]
        sentences = by_organ[organ] + _denials(rng, organ, absent, wordings)
        rng.shuffle(sentences)
        if organ != "devices" or rng.random() < .5:
            sentences = _normal_statements(rng, organ, entry["statements"], found) + sentences
        all_sentences += sentences

    impression = []
    for name in found:
        if rng.random() < .85:
            phrases = GRAMMAR[name][wordings]["impression"]
            text = _affirmation(rng, phrases, frames["impression"], found[name])
            impression.append((text, [name], []))
    rng.shuffle(impression)
    if not found:
        impression = [(rng.choice(TEXTS["no_findings"]), [], [])]
    return all_sentences, impression if rng.random() > .04 else []


def report(found, rng, wordings="usual"):
    """A report of `found` -> (Findings, Impressions), texts; arguments as of `statements`."""
    parts = statements(found, rng, wordings)
    return tuple(" ".join(text for text, _, _ in part) for part in parts)


def reports(n, seed, wordings="usual", enriched=False):
    """Yield n triples (report as in a manifest, names affirmed, names denied); nothing is drawn.

    enriched: the rare abnormalities at 6 to 10 %, as in the valid split. Independent of any scan
    that phantom.write writes.
    """
    for index in range(n):
        found = findings(seed, "reports", index, enriched)
        rng = random.Random(f"report {seed} reports {index} {wordings}")
        said = sum(statements(found, rng, wordings), [])
        text = " ".join(text for text, _, _ in said if text)
        denied = set()
        for _, _, names in said:
            denied.update(names)
        yield text, list(found), denied
