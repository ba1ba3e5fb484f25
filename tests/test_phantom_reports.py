"""The synthetic benchmark's findings and reports: as often as they should be, in words that fit."""
import hashlib
import itertools
import random
import re

import pytest

import data
import phantom_reports
from phantom_reports import ABNORMALITIES, FRAMES, GRAMMAR, IMPLIES, LESIONS, LOBES

# Words of which an affirming sentence has one, written without a look at the grammar.
TERMS = {
    "Medical material": r"pacemaker|venous catheter|sternotomy|endotracheal|aortic valve"
    r"|chest tube|port catheter|nasogastric|medical material|medical device",
    "Arterial wall calcification": r"calcif\w+.*(aort|arterial)|(aort|arterial).*calcif",
    "Cardiomegaly": r"cardiomegaly|heart is larger|heart size|cardiothoracic"
    r"|enlargement of the heart|cardiac silhouette|cardiac enlargement",
    "Pericardial effusion": r"pericardial (effusion|fluid|space|leaves)|in the pericardium up to",
    "Coronary artery wall calcification": r"calcif.*(coronary|anterior descending|circumflex)"
    r"|(coronary|descending artery|circumflex).*calcif",
    "Hiatal hernia": r"herni|hiatus",
    "Lymphadenopathy": r"lymphadenopath|(enlarged|pathological|multiple) .*lymph node"
    r"|lymph nodes? (in|exceeding|have reached)|nodal enlargement",
    "Emphysema": r"emphysem",
    "Atelectasis": r"atelecta(?!tic sequela)|collapse",
    "Lung nodule": r"(pulmonary|lung|solid|mm) nodul|nodul(es? (of|up|in the lungs)|ar)"
    r"|nodule in the lungs",
    "Lung opacity": r"opacit|ground[- ]glass",
    "Pulmonary fibrotic sequela": r"sequela",
    "Pleural effusion": r"pleural (effusion|fluid|space|leaves)"
    r"|effusion reaching \d+ mm in thickness",
    "Mosaic attenuation pattern": r"mosaic",
    "Peribronchial thickening": r"peribronchial",
    "Consolidation": r"consolidat",
    "Bronchiectasis": r"bronchiecta|bronchial dilatation|bronchi .*dilated",
    "Interlobular septal thickening": r"interlobular",
    "Pneumonia": r"pneumoni",
    "Pneumothorax": r"pneumothorax|air (in|between) the pleural",
    "Empyema": r"empyema|infected pleural",
    "Tuberculosis": r"tubercul",
    "Pulmonary fibrosis": r"fibrosis|honeycomb",
    "Lung cyst": r"air cyst|lung cyst|cyst measuring|cystic air|cyst of \d+ mm (in|\.)",
    "Bronchial thickening": r"bronchial wall|thickening of the bronch|thickened bronchial"
    r"|walls of the segmental|tram-track",
    "Lung mass": r"\bmass\b|tumou?ral|tumor-like",
    "Osteophyte": r"osteophyt",
    "Rib fracture": r"ribs?\b.*|fracture",
    "Atherosclerosis": r"athero",
    "Pericardial calcification": r"pericardi.*calcif|calcif.*pericardi",
    "Spondylosis": r"spondylo",
    "Pleural calcification": r"pleura.*calcif|calcif.*pleura",
    "Pneumomediastinum": r"pneumomediastinum|air (densities |collection |)?.*mediasti"
    r"|mediastinal air",
}
OTHER = {  # a sentence with these words isn't about the abnormality, though it matches its terms
    "Arterial wall calcification": r"coronary|circumflex|pericardi|pleura",
    "Pleural effusion": r"pericardi|empyema|infected|pneumothorax|air|pus",
    "Pulmonary fibrosis": r"sequela",
    "Bronchial thickening": r"peribronchial",
    "Pericardial effusion": r"calcif",
    "Atelectasis": r"fibroatelectatic",
    "Pneumothorax": r"^Pneumomediastinum",
    "Lung nodule": r"cavit",
    "Lung cyst": r"honeycomb cysts",
}
NEGATED = re.compile(r"\bno\b|\bnot\b|absent|lacking|disappeared|resolved|neither", re.I)
NORMAL = list(itertools.chain(*phantom_reports.NORMAL.values()))
NORMAL_SENTENCES = {normal["text"].rstrip(".;") + "." for normal in NORMAL}
NORMAL_SENTENCES.add("No active infiltrative pathology was detected.")
SECTIONS = ["findings", "impression", "negated"]


def affirming_sentences(report):
    """The sentences of a report that neither deny something nor say that something is normal."""
    sentences = re.split(r"(?<=[.;]) ", report)
    affirming = [sentence for sentence in sentences if not NEGATED.search(sentence)]
    return [text for text in affirming if text.rstrip(".;") + "." not in NORMAL_SENTENCES]


def is_about(sentence, name):
    other = OTHER.get(name)
    if other and re.search(other, sentence, re.I):
        return False
    return bool(re.search(TERMS[name], sentence, re.I))


def test_the_classes_are_those_of_the_data_sets():
    assert phantom_reports.CT_RATE == list(data.CT_RATE)
    assert phantom_reports.CT_RATE_LT == list(data.CT_RATE_LT)
    assert list(GRAMMAR) == ABNORMALITIES == list(TERMS)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_prevalences_are_those_asked_for(split):
    n = 4000
    counts = dict.fromkeys(ABNORMALITIES, 0)
    for index in range(n):
        for name in phantom_reports.findings(0, split, index):
            counts[name] += 1
    for name, about in GRAMMAR.items():
        wanted = about["prevalence"]
        if split == "valid":
            wanted = about.get("prevalence_valid", wanted)
        assert abs(counts[name] / n - wanted) < 0.016 + 0.07 * wanted, (name, counts[name], wanted)
    for name in phantom_reports.CT_RATE_LT:
        assert 0.01 <= counts[name] / n <= 0.12


def test_abnormalities_of_one_cause_occur_together():
    scans = [phantom_reports.findings(0, "train", index) for index in range(2000)]
    old = [scan for scan in scans if "Coronary artery wall calcification" in scan]
    share = sum("Arterial wall calcification" in scan for scan in scans) / len(scans)
    share_of_old = sum("Arterial wall calcification" in scan for scan in old) / len(old)
    assert share_of_old > 1.5 * share


def test_findings_are_the_same_each_time_and_in_the_order_of_the_classes():
    for index in range(40):
        scan = phantom_reports.findings(1, "train", index)
        assert scan == phantom_reports.findings(1, "train", index)
        assert list(scan) == [name for name in ABNORMALITIES if name in scan]


def test_a_second_scan_keeps_what_is_chronic():
    indices = range(1, 440)
    seconds = [index for index in indices if phantom_reports.patient_of(2, "train", index)[1]]
    assert len(seconds) == 40
    chronic = [name for name, about in GRAMMAR.items() if not about.get("acute")]
    chronic.remove("Lung nodule")
    for index in seconds:
        before = phantom_reports.findings(2, "train", index - 1)
        scan = phantom_reports.findings(2, "train", index)
        patient, _ = phantom_reports.patient_of(2, "train", index)
        assert phantom_reports.patient_of(2, "train", index - 1) == (patient, False)
        for name in chronic:
            assert scan.get(name) == before.get(name)
        sizes = [nodule["size"] for nodule in scan.get("Lung nodule", [])]
        assert len(sizes) == len(before.get("Lung nodule", [])) and max(sizes, default=0) <= 30


def test_an_abnormality_comes_with_what_it_implies():
    for index in range(440):
        scan = phantom_reports.findings(2, "valid", index)
        for cause in IMPLIES.keys() & scan.keys():
            assert set(IMPLIES[cause]) <= set(scan)


def test_what_comes_with_an_abnormality_is_as_acute():
    """So a second scan takes both from the same draw, and never has one without the other."""
    for cause, effects in IMPLIES.items():
        for effect in effects:
            assert GRAMMAR[cause].get("acute") == GRAMMAR[effect].get("acute")


def test_every_place_and_name_in_the_grammar_exists():
    assert GRAMMAR["Lymphadenopathy"]["lesions"]["what"] == list(phantom_reports.STATIONS)
    coronaries = GRAMMAR["Coronary artery wall calcification"]["lesions"]["what"]
    assert coronaries == list(phantom_reports.PHANTOM["coronaries"])
    assert {about["organ"] for about in GRAMMAR.values()} <= set(phantom_reports.NORMAL)
    names = set(itertools.chain(IMPLIES, *IMPLIES.values(), *phantom_reports.CAUSES.values()))
    names.update(*(normal.get("unless", []) for normal in NORMAL))
    assert names <= set(ABNORMALITIES)
    for name in ABNORMALITIES:
        for lesion in LESIONS[name](random.Random(name)):
            assert lesion.get("lobe", LOBES[0]) in LOBES
            assert lesion.get("side", "both") in ("right", "left", "both")


@pytest.mark.parametrize("wordings", ["usual", "held-out"])
def test_reports_affirm_what_was_found_and_nothing_else(wordings):
    for text, names, denied in phantom_reports.reports(800, 7, wordings, enriched=True):
        assert denied and not denied & set(names)
        assert 25 < len(text.split()) < 450
        assert "{" not in text and " ," not in text
        affirming = affirming_sentences(text)
        for name in ABNORMALITIES:
            affirmed = any(is_about(sentence, name) for sentence in affirming)
            assert affirmed == (name in names), (name, names, text)


def test_negating_terms_and_normal_statements_never_contradict_what_was_found():
    rng = random.Random(0)
    for index in range(400):
        scan = phantom_reports.findings(5, "valid", index)
        text, _ = phantom_reports.report(scan, rng)
        negated = [sentence for sentence in text.split(". ") if NEGATED.search(sentence)]
        negated = " ".join(negated).lower()
        for name in scan:
            for term in GRAMMAR[name]["usual"]["negated"]:
                assert term.lower() not in negated, (name, negated)
        for normal in NORMAL:
            if normal["text"] in text:
                assert scan.keys().isdisjoint(normal.get("unless", []))


def test_held_out_wordings_are_not_among_the_usual_ones():
    for section in SECTIONS:
        usual, held_out = FRAMES["usual"][section], FRAMES["held-out"][section]
        if section != "impression":  # its frames are the findings' in part
            assert not set(usual) & set(held_out)
        for name, about in GRAMMAR.items():
            assert not set(about["usual"][section]) & set(about["held-out"][section]), name
    for about in GRAMMAR.values():
        assert len(about["usual"]["findings"]) >= 5
        assert len(about["held-out"]["findings"]) >= 2


@pytest.mark.parametrize("wordings, sha256", [
    ("usual", "86323720faaa6d8758a3456e853807fd2f04b631b63997c5b0ea0fe711a0a80c"),
    ("held-out", "1c1b8d12ffc1c40226e09e01bd3c739d488cdcd683d8e57b06af76de026b3775"),
])
def test_the_reports_of_a_seed_stay_as_they_are(wordings, sha256):
    """Another hash means other bytes for a seed: raise phantom.VERSION, and note the hash here."""
    texts = [text for text, _, _ in phantom_reports.reports(200, 0, wordings, enriched=True)]
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest() == sha256
