"""The synthetic benchmark's findings, and radiologist-like reports that affirm just those.

    import phantom_reports
    print(next(phantom_reports.reports(1, seed=0))[0])  # the text of one report

Everything follows from (seed, split, index of the scan). What there is to find, how often, and in
which words stands in resources/phantom.toml. An abnormality is present where its latent variable
exceeds the quantile of 1 - prevalence:

    z = sum over causes of (loading * cause) + sqrt(1 - sum of loading^2) * noise
"""
import math
import random
import tomllib
from functools import cache, partial
from pathlib import Path
from statistics import NormalDist

PHANTOM = tomllib.loads((Path(__file__).parent / "resources/phantom.toml").read_text("utf-8"))
GRAMMAR = PHANTOM["abnormality"]  # name -> what the file says about it
FRAMES = PHANTOM["frames"]
NORMAL = PHANTOM["normal"]
CAUSES = PHANTOM["causes"]
IMPLIES = PHANTOM["implies"]
STATIONS = PHANTOM["stations"]
SITUATIONS = PHANTOM["situations"]
TECHNIQUES = PHANTOM["techniques"]

CT_RATE = [name for name, about in GRAMMAR.items() if about["benchmark"] == "ct-rate"]
CT_RATE_LT = [name for name, about in GRAMMAR.items() if about["benchmark"] == "ct-rate-lt"]
ABNORMALITIES = CT_RATE + CT_RATE_LT

SIGN = {"right": -1, "left": 1}  # of x, which points to the left
SIDES = tuple(SIGN)
UPPER = ("right upper lobe", "left upper lobe")
LOBES = ("right upper lobe", "right middle lobe", "right lower lobe",
         "left upper lobe", "left lower lobe")


# ---------------------------------------------------------------- which abnormalities a scan has
def findings(seed, split, index, enriched=False):
    """Draw the abnormalities of a scan: dict name -> list of lesions, in ABNORMALITIES' order.

    A lesion is a dict of what it needs (side, lobe, size in mm ...) and `place`, three numbers in
    [0, 1) that seed its drawing. The split "valid", or enriched=True, has the rare abnormalities
    at 6 to 10 %. A patient's second scan keeps what is chronic.
    """
    patient, second = patient_of(seed, split, index)
    first, later = (random.Random(f"findings {seed} {split} {patient} {k}") for k in (0, 1))
    enriched = enriched or split == "valid"
    abnormalities = _sample(first, enriched)
    return _follow_up(abnormalities, later, enriched) if second else abnormalities


def patient_of(seed, split, index):
    """Scan index -> (patient number, whether it is that patient's second scan).

    Each 11 scans are of 10 patients: a random one of them has two scans, one after the other.
    """
    block, place = divmod(index, 11)
    twice = random.Random(f"patient {seed} {split} {block}").randrange(10)
    patient = 10 * block + (place if place <= twice else place - 1)
    return patient, place == twice + 1


def _sample(rng, enriched):
    """The abnormalities of one scan with their lesions, whatever other scans have."""
    present = _present(rng, enriched)
    abnormalities = {name: LESIONS[name](rng) for name in ABNORMALITIES if name in present}
    for lesions in abnormalities.values():
        for lesion in lesions:
            lesion["place"] = (rng.random(), rng.random(), rng.random())
    return abnormalities


def _present(rng, enriched):
    """The names of the abnormalities of one scan."""
    # A Gaussian copula: latent variables that share a cause (age, heart failure) are correlated,
    # so that the abnormalities of one cause occur together more often than by chance. Each variable
    # stays standard normal, so that each abnormality, present above its threshold, keeps its
    # prevalence.
    latent = {name: _noise(name) * rng.gauss(0, 1) for name in ABNORMALITIES}
    for loadings in CAUSES.values():
        cause = rng.gauss(0, 1)
        for name, loading in loadings.items():
            latent[name] += loading * cause

    threshold = _thresholds(enriched)
    present = {name for name in ABNORMALITIES if latent[name] > threshold[name]}
    for cause, effects in IMPLIES.items():
        if cause in present:
            present.update(effects)
    return present


@cache
def _noise(name):
    """The standard deviation of a latent variable's own part: with its causes the variance is 1."""
    return math.sqrt(1 - sum(loadings.get(name, 0) ** 2 for loadings in CAUSES.values()))


@cache
def _thresholds(enriched):
    """Name -> threshold that its latent variable exceeds as often as its prevalence says."""
    key = "prevalence_valid" if enriched else "prevalence"
    share = {name: about.get(key, about["prevalence"]) for name, about in GRAMMAR.items()}
    # An effect also comes with its cause, so less of it is to come by itself.
    for cause, effects in IMPLIES.items():
        for effect in effects:
            share[effect] = (share[effect] - share[cause]) / (1 - share[cause])
    return {name: NormalDist().inv_cdf(1 - share[name]) for name in ABNORMALITIES}


def _follow_up(before, rng, enriched):
    """A patient's second scan: what is acute is drawn anew, what is chronic stays."""
    anew = _sample(rng, enriched)
    growth = rng.uniform(0.8, 1.3)
    now = {}
    for name, about in GRAMMAR.items():
        source = anew if about.get("acute") else before
        if name in source:
            now[name] = source[name]
    for nodule in now.get("Lung nodule", []):
        nodule["size"] = min(30, round(nodule["size"] * growth))
    return now


# ---------------------------------------------------------------- which lesions an abnormality has
# phantom.toml names one of these for each abnormality, and its arguments after rng.
def each(rng, places=({},), **fields):
    """One lesion in each place; where none is named, one lesion."""
    return [place | _values(rng, fields) for place in places]


def one_side_or_both(rng, both, **fields):
    """One lesion on a random side or, in a share `both` of the patients, one on each."""
    sides = SIDES if rng.random() < both else [rng.choice(SIDES)]
    return [{"side": side} | _values(rng, fields) for side in sides]


def in_lobes(rng, number, lobes=LOBES, **fields):
    """Lesions in random lobes; no lobe has a second one before each has one."""
    n = rng.choice(number) if len(number) > 1 else number[0]
    chosen = []
    while len(chosen) < n:
        chosen += rng.sample(lobes, len(lobes))
    places = [{"lobe": lobe, "side": lobe.split()[0]} for lobe in chosen[:n]]
    return each(rng, places, **fields)


def atelectasis(rng, **fields):
    """Lesions in random lobes: two of three are bands, the third a lobe without air."""
    lesions = in_lobes(rng, **fields)
    for lesion in lesions:
        lesion["what"] = rng.choice(("linear", "linear", "lobar"))
    return lesions


def some_of(rng, what, number, ordered=False, **fields):
    """One lesion for each of some random things or places, mixed or ordered as the list is."""
    chosen = _some(rng, what, number)
    if ordered:
        chosen.sort(key=what.index)
    return [{"what": thing} | _values(rng, fields) for thing in chosen]


def spondylosis(rng, first, number):
    """Worn discs at neighbouring thoracic vertebrae."""
    start = rng.choice(first)
    return [{"what": f"T{level}"} for level in range(start, start + rng.choice(number))]


def rib_fractures(rng, first, number, **fields):
    """Fractures of neighbouring ribs."""
    side = rng.choice(SIDES)
    start = rng.choice(first)
    ribs = range(start, start + rng.choice(number))
    return [{"side": side, "rib": rib} | _values(rng, fields) for rib in ribs]


def _values(rng, fields):
    """A random value for each field of a lesion, in their order."""
    return {field: _value(rng, field, options) for field, options in fields.items()}


def _value(rng, field, options):
    """One of the options for a side, else a number from options[0] to options[1]."""
    if field == "side":
        return rng.choice(options)
    if field == "n":
        return rng.randint(*options)
    number = rng.uniform(*options)
    return round(number) if isinstance(options[0], int) else number


def _some(rng, items, numbers):
    """Random items, none twice: as many as a random one of `numbers`, if there are so many."""
    return rng.sample(items, min(len(items), rng.choice(numbers)))


DRAWN_BY = {function.__name__: function for function in (
    each, one_side_or_both, in_lobes, atelectasis, some_of, spondylosis, rib_fractures)}
LESIONS = {  # name -> function: rng -> list of lesions
    name: partial(DRAWN_BY[about["drawn_by"]], **about["lesions"])
    for name, about in GRAMMAR.items()}


# ---------------------------------------------------------------- what a report says
def reports(n, seed, wordings="usual", enriched=False):
    """Yield n reports of no scan: (text as in a manifest, names affirmed, set of names denied)."""
    for index in range(n):
        abnormalities = findings(seed, "reports", index, enriched)
        rng = random.Random(f"report {seed} reports {index} {wordings}")
        sentences = sum(statements(abnormalities, rng, wordings), [])
        denied = {name for _, _, names in sentences for name in names}
        yield _text(sentences), list(abnormalities), denied


def report(abnormalities, rng, wordings="usual"):
    """The texts of a report's findings and impression; the arguments are those of `statements`."""
    body, impression = statements(abnormalities, rng, wordings)
    return _text(body), _text(impression)


def statements(abnormalities, rng, wordings="usual"):
    """A report's findings and its impression: lists of (sentence, names affirmed, names denied).

    abnormalities: as `findings` gives them; rng: random.Random; wordings: "usual", or "held-out",
    which no training report has. The findings affirm each abnormality, the impression most. All
    others are left out, denied, or excluded by a statement that something is normal.
    """
    organs = {organ: [] for organ in NORMAL}
    for name, lesions in abnormalities.items():
        sentence = _affirm(rng, name, lesions, "findings", wordings)
        organs[GRAMMAR[name]["organ"]].append(sentence)

    # Organ by organ: what is normal; then what is there and what isn't, mixed.
    body = []
    for organ, sentences in organs.items():
        sentences += _denials(rng, organ, abnormalities, wordings)
        rng.shuffle(sentences)
        body += _normal(rng, organ, abnormalities) + sentences
    return body, _impression(rng, abnormalities, wordings)


def capital(text):
    """The text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def _text(sentences):
    return " ".join(text for text, _, _ in sentences if text)


def _affirm(rng, name, lesions, section, wordings):
    """A sentence that says that an abnormality is there."""
    phrase = rng.choice(GRAMMAR[name][wordings][section]).format(**_slots(lesions))
    if not phrase.endswith("."):
        # A noun phrase, with a "+" if it is a plural: a frame makes it a sentence.
        be, was = ("are", "were") if phrase.startswith("+") else ("is", "was")
        noun = phrase.removeprefix("+")
        frame = rng.choice(FRAMES[wordings][section])
        phrase = frame.format(np=noun, Np=capital(noun), be=be, was=was)
    return capital(phrase), [name], []


def _denials(rng, organ, abnormalities, wordings):
    """One sentence or none, for the lungs one or two, about what an organ doesn't have."""
    names = [name for name, about in GRAMMAR.items() if about["organ"] == organ]
    absent = [name for name in names if name not in abnormalities]
    denials = []
    for _ in range(rng.choice((1, 1, 2) if organ == "lungs" else (0, 0, 1))):
        names = _some(rng, absent, (1, 1, 2, 2, 3))
        if names:
            terms = [rng.choice(GRAMMAR[name][wordings]["negated"]) for name in names]
            no = _join(terms, " or ")
            frame = rng.choice(FRAMES[wordings]["negated"])
            denials.append((frame.format(no=no, No=capital(no)), [], names))
    return denials


def _normal(rng, organ, abnormalities):
    """Sentences about what is normal in an organ, as far as true; more where little is wrong."""
    if organ == "devices" and rng.random() >= 0.5:
        return []
    true = []
    for normal in NORMAL[organ]:
        excluded = normal.get("unless", [])
        if abnormalities.keys().isdisjoint(excluded):
            true.append((normal["text"], [], excluded))
    wordy = organ in ("abdomen", "bones", "lungs")
    numbers = (1, 2, 2) if wordy else (0, 1, 1)
    if len(abnormalities) >= 4:
        numbers = (0, 1, 2) if wordy else (0, 0, 1)
    return _some(rng, true, numbers)


def _impression(rng, abnormalities, wordings):
    """Most of the abnormalities once more; one report of 25 has no impression."""
    impression = []
    for name, lesions in abnormalities.items():
        if rng.random() < 0.85:
            impression.append(_affirm(rng, name, lesions, "impression", wordings))
    rng.shuffle(impression)
    if not abnormalities:
        impression = [(rng.choice(PHANTOM["no_findings"]), [], [])]
    return impression if rng.random() > 0.04 else []


# ---------------------------------------------------------------- what a phrase says about lesions
def _slots(lesions):
    """The values of a phrase's {fields}, from the lesions of its abnormality."""
    size = round(max(lesion.get("size", 0) for lesion in lesions))
    lobes = [lesion["lobe"] for lesion in lesions if "lobe" in lesion]
    return {
        "size": size, "size2": max(round(0.8 * size), 3),
        "amount": "minimal" if size < 20 else "moderate" if size < 38 else "marked",
        "at": f"in the {_join(lobes)}" if 0 < len(set(lobes)) < 4 else "in both lungs",
        "what": _what(lesions),
        **_side(lesions),
    }


def _side(lesions):
    sides = {lesion.get("side", "both") for lesion in lesions}
    if len(sides) > 1 or "both" in sides:
        return {"side": "bilateral", "on": "bilaterally", "hemi": "in both hemithoraces"}
    side = sides.pop()
    return {"side": side, "on": f"on the {side}", "hemi": f"in the {side} hemithorax"}


def _what(lesions):
    """Devices, arteries, lymph node stations, vertebrae or ribs; empty if lesions have none."""
    if "what" in lesions[0]:
        names = [lesion["what"] for lesion in lesions]
        return _join(PHANTOM["coronaries"].get(name, name) for name in names)
    if "rib" in lesions[0]:
        ribs = ["3rd" if lesion["rib"] == 3 else f"{lesion['rib']}th" for lesion in lesions]
        return f"{lesions[0]['side']} {_join(ribs)} {'rib' if len(ribs) == 1 else 'ribs'}"
    return ""


def _join(words, last=" and "):
    """["a", "b", "c", "a"] -> "a, b and c"."""
    *first, final = dict.fromkeys(words)
    return ", ".join(first) + last + final if first else final
