"""The synthetic benchmark's findings and what its reports say: which abnormalities a scan has, and a radiologist-like report of just those."""
import math
import random
import re
from statistics import NormalDist

CT_RATE = [
    "Medical material", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion", "Coronary artery wall calcification",
    "Hiatal hernia", "Lymphadenopathy", "Emphysema", "Atelectasis", "Lung nodule", "Lung opacity", "Pulmonary fibrotic sequela",
    "Pleural effusion", "Mosaic attenuation pattern", "Peribronchial thickening", "Consolidation", "Bronchiectasis",
    "Interlobular septal thickening"]
CT_RATE_LT = [
    "Pneumonia", "Pneumothorax", "Empyema", "Tuberculosis", "Pulmonary fibrosis", "Lung cyst", "Bronchial thickening", "Lung mass",
    "Osteophyte", "Rib fracture", "Atherosclerosis", "Pericardial calcification", "Spondylosis", "Pleural calcification",
    "Pneumomediastinum"]
ABNORMALITIES = CT_RATE + CT_RATE_LT

# ------------------------------------------------------------------------------------------------ what is found
COMMON_PREVALENCE = dict(zip(CT_RATE, (.12, .28, .11, .07, .25, .14, .26, .20, .26, .45, .37, .27, .12, .08, .11, .18, .11, .08)))
RARE_PREVALENCE = dict(zip(CT_RATE_LT, (.04, .02, .015, .02, .03, .04, .04, .03, .04, .03, .04, .015, .04, .025, .015)))
RARE_PREVALENCE_VALID = dict(zip(CT_RATE_LT, (.09, .07, .06, .06, .08, .09, .09, .08, .10, .08, .10, .06, .10, .08, .06)))
IMPLIES = {"Pneumonia": ("Consolidation", "Lung opacity"), "Empyema": ("Pleural effusion",),
           "Atherosclerosis": ("Arterial wall calcification",)}
CAUSES = {  # latent, shared by abnormalities (a Gaussian copula: prevalences stay, co-occurrence follows the loadings)
    "age": {"Arterial wall calcification": .75, "Coronary artery wall calcification": .7, "Atherosclerosis": .6, "Osteophyte": .5,
            "Spondylosis": .5, "Emphysema": .3, "Cardiomegaly": .35, "Hiatal hernia": .35, "Medical material": .3},
    "failure": {"Cardiomegaly": .6, "Pleural effusion": .5, "Interlobular septal thickening": .5, "Pericardial effusion": .45,
                "Atelectasis": .35, "Medical material": .25},
    "infection": {"Consolidation": .5, "Lung opacity": .5, "Lymphadenopathy": .3, "Pneumonia": .4, "Peribronchial thickening": .3,
                  "Tuberculosis": .3, "Empyema": .3},
    "airways": {"Bronchiectasis": .5, "Peribronchial thickening": .45, "Bronchial thickening": .5, "Mosaic attenuation pattern": .4,
                "Emphysema": .3},
    "scars": {"Pulmonary fibrotic sequela": .5, "Pulmonary fibrosis": .4, "Tuberculosis": .4, "Bronchiectasis": .3,
              "Pleural calcification": .4},
    "injury": {"Rib fracture": .5, "Pneumothorax": .5, "Pneumomediastinum": .4},
    "tumour": {"Lung mass": .5, "Lymphadenopathy": .3, "Lung nodule": .2}}
ACUTE = {"Pericardial effusion", "Lymphadenopathy", "Atelectasis", "Lung opacity", "Pleural effusion", "Consolidation", "Pneumonia",
         "Interlobular septal thickening", "Pneumothorax", "Empyema", "Pneumomediastinum"}
SIGN = {"right": -1, "left": 1}  # of x
SIDES = tuple(SIGN)
LOBES = ("right upper lobe", "right middle lobe", "right lower lobe", "left upper lobe", "left lower lobe")
LOWER, UPPER = (LOBES[2], LOBES[4]), (LOBES[0], LOBES[3])
DEVICES = ("a cardiac pacemaker with its leads", "a central venous catheter", "sternotomy wires", "an endotracheal tube",
           "a prosthetic aortic valve", "a chest tube", "a port catheter", "a nasogastric tube")
STATIONS = {"right paratracheal": (-19, 2, 172), "subcarinal": (0, 21, 136), "aortopulmonary": (31, 2, 156), "right hilar": (-44, 10, 134),
            "left hilar": (48, 12, 133), "prevascular": (4, -38, 162), "axillary": (118, -4, 196)}  # of lymph nodes, on the mean patient


def _in_lobes(rng, n, among, size):
    """n lesions in lobes drawn without replacement while there are any: side, lobe, size in mm."""
    lobes = [lobe for _ in range(-(-n // len(among))) for lobe in rng.sample(among, len(among))][:n]
    return [{"lobe": lobe, "side": lobe.split()[0], "size": round(rng.uniform(*size))} for lobe in lobes]


def _on_sides(rng, both, size):
    """One lesion on a random side, or one on each."""
    sides = SIDES if rng.random() < both else (rng.choice(SIDES),)
    return [{"side": side, "size": round(rng.uniform(*size))} for side in sides]


LESIONS = {  # rng -> list of lesions (dicts); sizes in mm
    "Medical material": lambda r: [{"what": what, "side": r.choice(SIDES)} for what in r.sample(DEVICES, r.choice((1, 1, 2)))],
    "Arterial wall calcification": lambda r: [{"size": round(r.uniform(8, 22)), "n": r.randint(4, 12)}],
    "Cardiomegaly": lambda r: [{"scale": r.uniform(1.22, 1.45)}],
    "Pericardial effusion": lambda r: [{"size": round(r.uniform(7, 20))}],
    "Coronary artery wall calcification": lambda r: [{"what": w, "size": round(r.uniform(14, 45))} for w in
                                                     r.sample(("LAD", "LCX", "RCA"), r.choice((1, 2, 3)))],
    "Hiatal hernia": lambda r: [{"size": round(r.uniform(34, 75))}],
    "Lymphadenopathy": lambda r: [{"what": w, "side": r.choice(SIDES), "size": round(r.uniform(14, 30))} for w in
                                  r.sample(tuple(STATIONS), r.randint(2, 4))],
    "Emphysema": lambda r: [{"side": s, "lobe": s + " upper lobe", "size": round(r.uniform(8, 22)), "n": r.randint(30, 90)} for s in SIDES],
    "Atelectasis": lambda r: [dict(lesion, what=r.choice(("linear", "linear", "lobar"))) for lesion in
                              _in_lobes(r, r.choice((1, 1, 2)), LOWER + (LOBES[1], LOBES[3]), (35, 70))],
    "Lung nodule": lambda r: _in_lobes(r, r.choice((1, 1, 2, 3, 4)), LOBES, (8, 28)),
    "Lung opacity": lambda r: _in_lobes(r, r.randint(1, 4), LOBES, (32, 80)),
    "Pulmonary fibrotic sequela": lambda r: _in_lobes(r, r.choice((1, 2, 2)), UPPER + LOWER, (30, 60)),
    "Pleural effusion": lambda r: _on_sides(r, .5, (14, 60)),
    "Mosaic attenuation pattern": lambda r: [{"side": s} for s in SIDES],
    "Peribronchial thickening": lambda r: [{"side": s, "size": r.uniform(3.2, 5.8)} for s in SIDES],
    "Consolidation": lambda r: _in_lobes(r, r.choice((1, 1, 2)), LOBES, (38, 80)),
    "Bronchiectasis": lambda r: _in_lobes(r, r.choice((1, 2, 2)), LOBES[1:], (6, 11)),
    "Interlobular septal thickening": lambda r: [{"side": s} for s in SIDES],
    "Pneumonia": lambda r: _in_lobes(r, r.choice((2, 3)), LOBES, (40, 70)),
    "Pneumothorax": lambda r: _on_sides(r, .05, (14, 45)),
    "Empyema": lambda r: _on_sides(r, 0, (32, 60)),
    "Tuberculosis": lambda r: _in_lobes(r, r.choice((1, 2)), UPPER, (24, 45)),
    "Pulmonary fibrosis": lambda r: [{"side": s, "size": round(r.uniform(14, 30))} for s in SIDES],
    "Lung cyst": lambda r: _in_lobes(r, r.randint(2, 5), LOBES, (14, 42)),
    "Bronchial thickening": lambda r: [{"side": s, "size": r.uniform(1.8, 3)} for s in SIDES],
    "Lung mass": lambda r: _in_lobes(r, 1, LOBES, (36, 75)),
    "Osteophyte": lambda r: [{"what": f"T{n}", "side": r.choice((*SIDES, "both")), "size": round(r.uniform(5, 11))} for n in
                             sorted(r.sample(range(5, 12), r.randint(3, 6)))],
    "Rib fracture": lambda r: [{"side": side, "rib": rib, "size": r.uniform(6, 12)} for side, first, n in
                               [(r.choice(SIDES), r.randint(3, 7), r.randint(1, 4))] for rib in range(first, first + n)],
    "Atherosclerosis": lambda r: [{"size": round(r.uniform(4, 8)), "scale": r.uniform(1.2, 1.4)}],
    "Pericardial calcification": lambda r: [{"size": r.uniform(2.5, 4.5)}],
    "Spondylosis": lambda r: [{"what": f"T{n}"} for first in [r.randint(4, 6)] for n in range(first, first + r.randint(4, 6))],
    "Pleural calcification": lambda r: _on_sides(r, .5, (30, 70)),
    "Pneumomediastinum": lambda r: [{"size": r.uniform(4, 8)}]}


def findings(seed, split, index, enriched=False):
    """Draw which abnormalities scan `index` of a split has: dict name -> list of lesions, in ABNORMALITIES' order.

    split "valid" (or enriched) has the rare ones at 6 to 10 %. A patient's second scan keeps what is chronic, a little larger or smaller.
    """
    patient, second = patient_of(seed, split, index)
    rngs = [random.Random(f"findings {seed} {split} {patient} {scan}") for scan in (0, 1)]
    first = _sample(rngs[0], enriched or split == "valid")
    if not second:
        return first
    fresh = _sample(rngs[1], enriched or split == "valid")
    growth = rngs[1].uniform(.8, 1.3)
    merged = {name: lesions for name, lesions in fresh.items() if name in ACUTE}
    merged |= {name: [dict(lesion, size=min(30, round(lesion["size"] * growth))) if name == "Lung nodule" else lesion for lesion in lesions]
               for name, lesions in first.items() if name not in ACUTE}
    for cause, effects in IMPLIES.items():  # what a new acute cause brings along
        merged |= {effect: fresh.get(effect) or first[effect] for effect in effects if cause in merged and effect not in merged}
    return {name: merged[name] for name in ABNORMALITIES if name in merged}


def patient_of(seed, split, index):
    """Scan index -> (patient number, whether it is that patient's second scan): in each 11 scans, one of 10 patients has two."""
    block, place = divmod(index, 11)
    twice = random.Random(f"patient {seed} {split} {block}").randrange(10)
    return 10 * block + place - (place > twice), place == twice + 1


def _thresholds(rare):
    prevalence = COMMON_PREVALENCE | rare
    for cause, effects in IMPLIES.items():  # leave room for those that the rare ones bring along
        for effect in effects:
            prevalence[effect] = (prevalence[effect] - prevalence[cause]) / (1 - prevalence[cause])
    return {name: NormalDist().inv_cdf(1 - p) for name, p in prevalence.items()}


THRESHOLDS = {False: _thresholds(RARE_PREVALENCE), True: _thresholds(RARE_PREVALENCE_VALID)}  # keys: enriched or not
OWN = {name: math.sqrt(1 - sum(loading.get(name, 0)**2 for loading in CAUSES.values())) for name in ABNORMALITIES}


def _sample(rng, enriched):
    latent = {name: OWN[name] * rng.gauss(0, 1) for name in ABNORMALITIES}
    for loading in CAUSES.values():
        strength = rng.gauss(0, 1)
        for name, weight in loading.items():
            latent[name] += weight * strength
    present = {name for name in ABNORMALITIES if latent[name] > THRESHOLDS[enriched][name]}
    present |= {effect for name in present for effect in IMPLIES.get(name, ())}
    found = {name: LESIONS[name](rng) for name in ABNORMALITIES if name in present}
    return {name: [lesion | {"place": tuple(rng.random() for _ in range(3))} for lesion in lesions] for name, lesions in found.items()}


# ------------------------------------------------------------------------------------------------ what is said
def entries(text):
    """Lines "name: body", indented ones go on -> pairs (name, body)."""
    return [" ".join(entry.split()).split(": ", 1) for entry in re.split(r"\n(?=\S)", text.strip())]


# Abnormality: organ; then phrases split by "|" in pairs (usual; held-out): findings, impression, terms that negate it.
# A phrase ending in "." is a sentence of its own; any other is a noun phrase for FRAMES ("+" marks a plural).
GRAMMAR = {name: body.split("; ") for name, body in entries("""
Medical material: devices; {what}|{what} in its expected position|{what} placed earlier|{what} belonging to a previous intervention|medical
  material: {what}; foreign medical material, namely {what}|an appearance of {what}; {what}|medical material ({what}); medical device:
  {what}; catheter or pacemaker|medical material; implanted medical device
Arterial wall calcification: vessels; +calcifications in the wall of the thoracic aorta|+calcified plaques in the aortic arch and
  descending aorta|+arterial wall calcifications|Calcification is present in the aortic wall.|+wall calcifications in the aorta and its
  branches; +calcific foci along the aortic wall|The wall of the arcus aorta is partly calcified.; +calcified plaques in the aorta|arterial
  wall calcification|calcification of the aortic wall; +calcific foci of the aortic wall; arterial wall calcification|calcified plaque in
  the aorta; calcific focus in the aortic wall
Cardiomegaly: heart; cardiomegaly|The heart is larger than normal.|Heart size has increased.|an increase in heart size|The cardiothoracic
  index has increased in favor of the heart.; global enlargement of the heart|The cardiac silhouette exceeds normal dimensions.;
  cardiomegaly|increased heart size; enlargement of the heart; cardiomegaly|increase in heart size; cardiac enlargement
Pericardial effusion: heart; pericardial effusion reaching {size} mm in thickness|an effusion measuring {size} mm in the pericardial
  space|Pericardial effusion reaches {size} mm.|fluid in the pericardium up to {size} mm|{amount} pericardial effusion; fluid surrounding
  the heart in the pericardial space|The pericardial leaves are separated by {size} mm of fluid.; pericardial effusion|{amount} pericardial
  effusion; pericardial fluid; pericardial effusion|pericardial fluid; fluid in the pericardial space
Coronary artery wall calcification: heart; +calcifications in the {what}|+calcified plaques in the walls of the coronary arteries|coronary
  artery wall calcification|+coronary calcifications along the {what}|Calcification is observed in the coronary arteries.; +calcific foci
  in the course of the {what}|The coronary arteries have calcified walls.; coronary artery calcification|+calcified plaques in the coronary
  arteries; +calcific coronary foci; coronary artery calcification|calcified plaque in the coronary arteries; calcific coronary focus
Hiatal hernia: oesophagus; a hiatal hernia of {size} mm|a sliding type hiatal hernia at the lower end of the esophagus|hiatal hernia|Part
  of the stomach is herniated through the hiatus.|a hiatal hernia containing gastric air; herniation of the gastric fundus into the lower
  mediastinum|The hiatus is wide and the stomach protrudes into the thorax.; hiatal hernia|sliding hiatal hernia; gastric herniation
  through the hiatus; hiatal hernia|herniation through the hiatus; gastric herniation
Lymphadenopathy: nodes; +enlarged lymph nodes, the largest measuring {size}x{size2} mm at the {what} level|+pathological lymph nodes in the
  {what} region|lymphadenopathy up to {size} mm|+lymphadenopathies with a short axis of {size2} mm|+multiple lymph nodes exceeding 1 cm in
  the {what} area; nodal enlargement at the {what} station|Lymph nodes have reached pathological dimensions, up to {size} mm.;
  lymphadenopathy|+pathologically enlarged lymph nodes|+mediastinal or axillary lymphadenopathies; nodal enlargement;
  lymphadenopathy|pathologically enlarged lymph node|lymph node in pathological size and appearance; nodal enlargement
Emphysema: lungs; +emphysematous changes in both lungs|emphysema, more prominent in the upper lobes|+centriacinar emphysematous areas|+low
  density areas in keeping with emphysema|+paraseptal and centrilobular emphysematous changes; emphysematous destruction of the upper
  zones|The upper lobes are emphysematous.; emphysema|+emphysematous changes in both lungs; +emphysematous lungs; emphysema|emphysematous
  change; emphysematous destruction
Atelectasis: lungs; +atelectatic changes {at}|atelectasis {at}|+linear or subsegmental atelectasis areas {at}|volume loss with atelectasis
  {at}|a band-like atelectasis {at}; an airless atelectatic segment {at}|The lung {at} has collapsed in part, as in atelectasis.;
  atelectasis {at}|+atelectatic changes; partial collapse {at}; atelectasis|atelectatic change; collapse of a lobe or segment
Lung nodule: lungs; a nodule of {size} mm {at}|+pulmonary nodules, the largest {size} mm in size, {at}|a solid nodule measuring
  {size}x{size2} mm {at}|+nodules up to {size} mm in diameter {at}|A {size} mm nodule was detected {at}.; a round nodular lesion of {size}
  mm {at}|Nodular formation is present {at}, {size} mm in diameter.; lung nodule {at}|+pulmonary nodules|nodule of {size} mm, follow-up is
  recommended; nodular lesion {at}; lung nodule|nodule in the lungs|nodular lesion in the lungs; nodular formation in the lungs
Lung opacity: lungs; +ground glass opacities {at}|+patchy ground-glass density increases {at}|an area of opacity {at}|+opacities in ground
  glass density {at}|+hazy parenchymal opacities {at}; increased parenchymal density of ground glass type {at}|The parenchyma {at} is hazy,
  with ground glass opacity.; +ground glass opacities {at}|lung opacity; +hazy ground glass areas; ground glass opacity|opacity in the lung
  parenchyma; ground glass density increase
Pulmonary fibrotic sequela: lungs; +sequela fibrotic changes {at}|+fibrotic sequelae {at}|+fibroatelectatic sequela bands
  {at}|+pleuroparenchymal sequela density increases {at}|+sequelae of previous disease with fibrotic bands {at}; sequela scarring with
  fibrotic strands {at}|Old sequela change has left fibrotic recessions {at}.; +sequela changes {at}|+pleuroparenchymal fibrotic sequelae;
  sequela scarring {at}; fibrotic sequela|sequela change; sequela scarring
Pleural effusion: pleura; {side} pleural effusion measuring {size} mm|{amount} pleural effusion {on}|an effusion reaching {size} mm in
  thickness {hemi}|Pleural effusion is observed {on}.|free pleural fluid {on}; a {size} mm layer of fluid between the pleural leaves
  {on}|Fluid has collected in the pleural space {on}.; {side} pleural effusion|{amount} pleural effusion {on}; pleural fluid {on}; pleural
  effusion|pleural fluid; fluid in the pleural space
Mosaic attenuation pattern: lungs; mosaic attenuation pattern in both lungs|a mosaic attenuation pattern|mosaic perfusion in both lungs|The
  lungs have a mosaic pattern of attenuation.|a mosaic density difference in the parenchyma; inhomogeneous aeration in a mosaic
  pattern|Attenuation of the parenchyma varies like a mosaic.; mosaic attenuation pattern|mosaic pattern, small airway or small vessel
  disease; mosaic aeration; mosaic attenuation|mosaic pattern; mosaic aeration
Peribronchial thickening: airways; peribronchial thickening|+peribronchial thickness increases at the hilar level|+peribronchial
  thickenings in both lungs|peribronchial cuffing|+central peribronchial sheath thickenings; peribronchial thickness around the central
  bronchi|The peribronchial sheaths are thickened.; peribronchial thickening|+peribronchial thickness increases; peribronchial cuffing at
  the hila; peribronchial thickening|peribronchial cuffing; peribronchial sheath thickening
Consolidation: lungs; consolidation {at}|+consolidated areas {at}|+consolidations with air bronchograms {at}|a consolidation area of {size}
  mm {at}|an area of consolidation containing air bronchograms {at}; alveolar filling with consolidation {at}|The parenchyma {at} is
  consolidated.; consolidation {at}|+consolidation areas; consolidated parenchyma {at}; consolidation|consolidated area; consolidated
  parenchyma
Bronchiectasis: airways; bronchiectasis {at}|+bronchiectatic changes {at}|+cylindrical bronchiectasis areas {at}|+dilated bronchi
  consistent with bronchiectasis {at}|+tubular and cystic bronchiectasis {at}; bronchial dilatation {at}|The bronchi {at} are dilated and
  fail to taper.; bronchiectasis {at}|+bronchiectatic changes; bronchial dilatation {at}; bronchiectasis|bronchiectatic change; bronchial
  dilatation
Interlobular septal thickening: lungs; interlobular septal thickening|+interlobular septal thickenings, prominent in the bases|smooth
  thickening of the interlobular septa|+thickened interlobular septa in both lungs|Interlobular septa are thickened.; prominence of the
  interlobular septa|Kerley lines make the thickened interlobular septa stand out.; interlobular septal thickening|thickening of the
  interlobular septa; prominence of the interlobular septa; interlobular septal thickening|thickened interlobular septum; prominence of the
  interlobular septa
Pneumonia: lungs; +findings consistent with pneumonia {at}|a pneumonic infiltration {at}|+pneumonic infiltrates {at}|The appearance {at} is
  compatible with pneumonia.|multifocal pneumonia {at}; an infectious process of pneumonia type {at}|Pneumonic involvement is present
  {at}.; pneumonia|+findings compatible with pneumonia; pneumonic involvement; pneumonia|pneumonic infiltration; pneumonic involvement
Pneumothorax: pleura; pneumothorax {on}|{side} pneumothorax reaching {size} mm|{amount} pneumothorax {hemi}|free air in the pleural space
  {on}, pneumothorax|A {side} pneumothorax was detected.; air between the pleural leaves {on}|The lung has separated from the chest wall by
  a pneumothorax {on}.; {side} pneumothorax|pneumothorax; pneumothorax air {on}; pneumothorax|free air in the pleural space; air between
  the pleural leaves
Empyema: pleura; empyema {on}|a loculated collection with thick pleural leaves consistent with empyema {on}|{side} empyema measuring {size}
  mm|a collection compatible with empyema {hemi}|The loculated fluid {on} is consistent with empyema.; an infected pleural collection
  {on}|A thick-walled pleural pus collection suggests empyema {on}.; {side} empyema|empyema; infected pleural collection; empyema|loculated
  empyema; infected pleural collection
Tuberculosis: lungs; +findings consistent with tuberculosis {at}|a cavitary lesion {at} compatible with tuberculosis|active pulmonary
  tuberculosis {at}|tuberculosis with a thick-walled cavity {at}|The cavitary appearance {at} suggests tuberculosis.; tuberculous
  involvement with cavitation {at}|Cavitation of tuberculous type is present {at}.; pulmonary tuberculosis|+findings compatible with
  tuberculosis; tuberculous involvement; tuberculosis|cavitary lesion of tuberculosis; tuberculous involvement
Pulmonary fibrosis: lungs; pulmonary fibrosis with honeycombing|+subpleural reticulations and honeycomb areas consistent with pulmonary
  fibrosis|interstitial fibrosis at the lung bases|diffuse pulmonary fibrosis|+fibrosis findings with honeycomb pattern; an interstitial
  lung disease with fibrosis|Honeycomb cysts mark pulmonary fibrosis of the lower zones.; pulmonary fibrosis|interstitial pulmonary
  fibrosis; fibrosis of the interstitium; pulmonary fibrosis|honeycombing; interstitial fibrosis
Lung cyst: lungs; a thin-walled air cyst of {size} mm {at}|+parenchymal air cysts {at}|+lung cysts, the largest {size} mm, {at}|an air cyst
  {at}|a cyst measuring {size} mm in the lung parenchyma {at}; cystic air space with a thin wall {at}|A thin wall encloses a cyst of {size}
  mm {at}.; +air cysts {at}|lung cyst; cystic air space {at}; lung cyst|air cyst; cystic air space
Bronchial thickening: airways; bronchial wall thickening|+thickened bronchial walls|diffuse thickening of the bronchial walls|+bronchial
  wall thickness increases in both lungs|Bronchial walls are thickened.; tram-track thickening of the bronchi|The walls of the segmental
  bronchi have become thick.; bronchial wall thickening|+thickened bronchial walls; thickening of the bronchi; bronchial wall
  thickening|thickened bronchial wall; tram-track bronchial thickening
Lung mass: lungs; a mass of {size}x{size2} mm {at}|a mass lesion measuring {size} mm {at}|a spiculated mass {at}|A {size} mm lung mass was
  detected {at}.|a solid mass lesion {at} suspicious for malignancy; a tumoral mass formation of {size} mm {at}|Tumor-like mass is present
  {at}.; lung mass {at}|mass lesion, histopathological correlation is recommended; mass formation {at}; mass lesion|lung mass; tumoral
  formation
Osteophyte: bones; +osteophytes in the vertebral corners|osteophyte formation at the {what} level|+osteophytic taperings at the vertebral
  corpus corners|+marginal osteophytes at {what}|+bridging osteophytes in the thoracic vertebrae; bony beaking at {what}, in the form of
  osteophytes|Osteophytic spurs project from the endplates.; +osteophytes|+osteophytes in the thoracic vertebrae; +osteophytic spurs;
  osteophyte|osteophyte formation; osteophytic spur
Rib fracture: bones; +fracture lines in the {what}|a displaced fracture of the {what}|discontinuity consistent with fracture in the
  {what}|A fracture was detected in the {what}.|a rib fracture with a step in the cortex ({what}); cortical discontinuity with fracture of
  the {what}|Cortical step and discontinuity show a fracture of the {what}.; rib fracture {on}|fracture of the {what}; fractured {what};
  rib fracture|fracture of the ribs; cortical discontinuity of the ribs
Atherosclerosis: vessels; +atherosclerotic changes in the aorta|atherosclerosis of the thoracic aorta|+diffuse atherosclerotic wall
  changes|an elongated aorta with atherosclerotic plaques|Atherosclerotic changes are observed in the aorta and its branches.; atheromatous
  disease of the aorta|The aorta is atherosclerotic and ectatic.; +atherosclerotic changes|atherosclerosis; atheromatous aorta;
  atherosclerosis|atherosclerotic change; atheromatous disease
Pericardial calcification: heart; +pericardial calcifications|calcification of the pericardium|+calcified plaques in the pericardium|coarse
  pericardial calcification|The pericardium is calcified.; an eggshell-like calcific pericardium|Calcific thickening surrounds the heart in
  the pericardium.; pericardial calcification|calcification in the pericardium; calcific pericardium; pericardial
  calcification|calcification of the pericardium; calcific pericardium
Spondylosis: bones; +spondylotic changes in the thoracic spine|thoracic spondylosis|+degenerative disc space narrowings consistent with
  spondylosis|spondylosis at the {what} levels|Spondylotic changes are seen in the vertebrae.; a spondylotic spine with narrowed disc
  spaces|Disc heights have decreased with spondylosis.; spondylosis|+spondylotic changes; spondylotic spine; spondylosis|spondylotic
  change; spondylotic narrowing of the discs
Pleural calcification: pleura; +pleural calcifications {on}|+calcified pleural plaques {on}|{side} pleural calcification|calcification of
  the pleura {hemi}|The pleura is calcified {on}.; calcific pleural thickening {on}|Calcific plaques line the pleura {on}.; +calcified
  pleural plaques|{side} pleural calcification; calcific pleura; pleural calcification|calcified pleural plaque; calcific pleura
Pneumomediastinum: mediastinum; pneumomediastinum|free air in the mediastinum, pneumomediastinum|+air densities in the mediastinum
  consistent with pneumomediastinum|Pneumomediastinum is observed around the trachea.|free mediastinal air; an air collection tracking
  through the mediastinum|Air has dissected around the mediastinal vessels.; pneumomediastinum|free air in the mediastinum; mediastinal
  air; pneumomediastinum|free air in the mediastinum; mediastinal air collection
""")}
FRAMES = {  # {Np} and {np} are one noun phrase, {be} and {was} agree with it
    "usual": "There {be} {np}.|{Np} {be} observed.|{Np} {was} detected.|{Np} {be} present.|{Np} {be} seen.|{Np} {was} observed."
             "|{Np} {be} noteworthy.|In this examination, {np} {be} observed.|{Np} {was} evaluated as existing.|{Np} {be} remarkable.",
    "held-out": "The examination reveals {np}.|{Np} {be} identified.|Also visible {be} {np}.|{Np} can be distinguished."}
IMPRESSION_FRAMES = {
    "usual": "{Np}.|{Np}.|{Np}.|{Np} {be} observed.|Findings: {np}.", "held-out": "{Np} {be} identified.|Conclusion: {np}."}
NEGATIONS = {
    "usual": "No {no} was detected.|No {no} was observed.|There is no {no}.|There is no sign of {no}.|{No} was not detected."
             "|{No} is not observed.|No {no} is seen.|The {no} described in the previous study has disappeared."
             "|No {no} was found in the sections.",
    "held-out": "Evidence of {no} is lacking.|{No} is absent.|Neither this study nor the former one reveals {no}."
                "|{No} has resolved completely."}
# Organ: normal statements, each [with the abnormalities that must be absent for it to be true].
NORMAL = {organ: [(text, unless.rstrip("]").split(", ") if unless else []) for text, _, unless in
                  (statement.partition(" [") for statement in body.split("|"))] for organ, body in entries("""
airways: Trachea and both main bronchi are open.|No obstructive pathology was observed in the trachea and both main bronchi.|Trachea, both
  main bronchi are in the midline and their calibrations are normal. [Bronchiectasis, Bronchial thickening]|The lumens of the trachea and
  main bronchi are patent.
mediastinum: Mediastinal structures were evaluated as suboptimal since contrast material was not given.|The mediastinum is in the
  midline.|As far as can be observed, the main mediastinal vascular structures are natural. [Atherosclerosis, Arterial wall
  calcification]|Mediastinal structures cannot be evaluated optimally because of the unenhanced technique.
heart: Heart contour and size are normal. [Cardiomegaly]|Heart size is within normal limits. [Cardiomegaly]|Pericardial thickness is
  normal. [Pericardial effusion, Pericardial calcification]|Cardiac chambers cannot be evaluated without contrast.
vessels: Calibration of the thoracic aorta and pulmonary arteries is natural. [Atherosclerosis]|The pulmonary trunk is of normal
  caliber.|Thoracic aorta diameter is normal. [Atherosclerosis]
oesophagus: Thoracic esophagus calibration was normal. [Hiatal hernia]|No pathological wall thickening was observed in the esophagus.|The
  esophagus is within normal limits. [Hiatal hernia]
nodes: Lymph nodes not reaching pathological size are seen in the mediastinum. [Lymphadenopathy]|Axillary and mediastinal lymph nodes are
  smaller than 1 cm in short axis. [Lymphadenopathy]|Both supraclavicular fossae are natural. [Lymphadenopathy]
lungs: When examined in the lung parenchyma window;|Both lungs were evaluated in the parenchymal window.|Respiratory motion is seen in the
  lower zones.|Aeration of both lung parenchyma is normal and no infiltrative lesion is detected. [Emphysema, Atelectasis, Lung nodule,
  Lung opacity, Consolidation, Mosaic attenuation pattern, Pneumonia, Tuberculosis, Pulmonary fibrosis, Lung mass, Lung cyst, Pneumothorax,
  Pulmonary fibrotic sequela, Interlobular septal thickening]
pleura: Pleural leaves are of natural thickness. [Pleural effusion, Empyema, Pleural calcification, Pneumothorax]|The diaphragm is in its
  usual place.
abdomen: Upper abdominal organs included in the sections are normal.|Liver density has decreased in line with steatosis.|The gallbladder
  was operated.|No space-occupying lesion was detected in the liver that entered the cross-sectional area.|There is a hypodense cyst of 12
  mm in the liver.|Bilateral adrenal glands were normal and no space-occupying lesion was detected.|An accessory spleen of 9 mm is seen in
  the splenic hilum.|A 4 mm stone was observed in the left kidney.|A cortical cyst of 21 mm is present in the upper pole of the right
  kidney.
bones: Bone structures in the study area are natural. [Osteophyte, Rib fracture, Spondylosis]|Vertebral corpus heights are preserved.|No
  lytic-destructive lesion was detected in the bones.|Vertebral corpus heights, alignments and densities are normal. [Osteophyte,
  Spondylosis]|Bone density has decreased in line with age.
devices: A hypodense nodule of 8 mm is observed in the left thyroid lobe.|Thyroid gland is heterogeneous.|Bilateral breast tissue is
  symmetrical.|The chest wall soft tissues are natural.|The study was compared with the examination of the previous year.|No previous study
  is available for comparison.
""")}
NO_FINDINGS = ("No active infiltrative pathology was detected.", "Findings within normal limits.",
               "Examination without pathological findings.", "")
CORONARIES = {"LAD": "left anterior descending artery", "LCX": "left circumflex artery", "RCA": "right coronary artery"}
SITUATIONS = ("Not given.", "Not given.", "Cough, shortness of breath", "Control.", "Chest pain", "Pneumonia?", "Nodule follow-up",
              "Dyspnea, malignancy?", "Fever and cough", "Trauma", "Preoperative evaluation", "Covid?")
TECHNIQUES = ("Sections were taken in the axial plane without contrast material and reconstructed in the workstation.",
              "Non-contrast images were taken in the axial plane.", "1.5 mm thick non-contrast sections were taken in the axial plane.",
              "Not given.")


def _join(words, last=" and "):
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + last + words[-1]


def capital(text):
    """text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def _slots(lesions):
    """What a phrase may name: sizes, sides, lobes, levels of one abnormality's lesions."""
    sides = {lesion.get("side", "both") for lesion in lesions}
    side = sides.pop() if len(sides) == 1 else "both"
    size = round(max(lesion.get("size", 0) for lesion in lesions))
    lobes = [lesion["lobe"] for lesion in lesions if "lobe" in lesion]
    ribs = [f"{lesion['rib']}{'rd' if lesion['rib'] == 3 else 'th'}" for lesion in lesions if "rib" in lesion]
    what = [CORONARIES.get(lesion["what"], lesion["what"]) for lesion in lesions if "what" in lesion]
    return {"size": size, "size2": max(round(.8 * size), 3), "side": "bilateral" if side == "both" else side,
            "what": _join(what) if what else f"{side} {_join(ribs)} rib{'s' * (len(ribs) > 1)}" if ribs else "",
            "at": f"in the {_join(lobes)}" if 0 < len(set(lobes)) < 4 else "in both lungs",
            "on": "bilaterally" if side == "both" else f"on the {side}",
            "hemi": "in both hemithoraces" if side == "both" else f"in the {side} hemithorax",
            "amount": "minimal" if size < 20 else "moderate" if size < 38 else "marked"}


def _say(rng, phrases, frames, lesions):
    phrase = rng.choice(phrases.split("|")).format(**_slots(lesions))
    if not phrase.endswith("."):
        noun, be, was = (phrase[1:], "are", "were") if phrase[0] == "+" else (phrase, "is", "was")
        phrase = rng.choice(frames.split("|")).format(np=noun, Np=capital(noun), be=be, was=was)
    return capital(phrase)


def statements(found, rng, wordings="usual"):
    """The sentences of a report of `found` (see findings), of Findings and of Impressions: lists of (sentence, names affirmed, names denied).

    rng: random.Random; wordings: "usual", or "held-out" (in no data set). Each abnormality found is affirmed in the findings and mostly in the
    impression; any other is left out, negated, or excluded by a statement that all is normal.
    """
    held = wordings == "held-out"
    organs = {organ: [] for organ in NORMAL}
    for name, (organ, *phrases) in GRAMMAR.items():
        if name in found:
            organs[organ].append((_say(rng, phrases[held], FRAMES[wordings], found[name]), [name], []))
    for organ, sentences in organs.items():
        absent = [name for name in ABNORMALITIES if name not in found and GRAMMAR[name][0] == organ]
        for _ in range(rng.choice((0, 0, 1)) + (organ == "lungs")):
            names = rng.sample(absent, min(len(absent), rng.choice((1, 1, 2, 2, 3))))
            if names:
                no = _join((rng.choice(GRAMMAR[name][5 + held].split("|")) for name in names), " or ")
                sentences.append((rng.choice(NEGATIONS[wordings].split("|")).format(no=no, No=capital(no)), [], names))
        rng.shuffle(sentences)
        if organ != "devices" or rng.random() < .5:
            true = [(text, [], unless) for text, unless in NORMAL[organ] if not any(name in found for name in unless)]
            talkative = (organ in ("abdomen", "bones", "lungs")) + 2 * (len(found) < 4)
            sentences[:0] = rng.sample(true, min(len(true), rng.choice(((0, 0, 1), (0, 1, 2), (0, 1, 1), (1, 2, 2))[talkative])))
    impression = [(_say(rng, GRAMMAR[name][3 + held], IMPRESSION_FRAMES[wordings], found[name]), [name], []) for name in found if rng.random() < .85]
    rng.shuffle(impression)
    if not found:
        impression = [(rng.choice(NO_FINDINGS), [], [])]
    return [sentence for sentences in organs.values() for sentence in sentences], impression if rng.random() > .04 else []


def report(found, rng, wordings="usual"):
    """A report of `found` -> (Findings, Impressions); the arguments are those of `statements`, whose sentences it joins."""
    return tuple(" ".join(text for text, _, _ in part) for part in statements(found, rng, wordings))


def reports(n, seed, wordings="usual", enriched=False):
    """Yield n triples (report text as in a manifest: findings then impression, names affirmed, names denied); no volume is drawn.

    enriched=True has the rare abnormalities at 6 to 10 %, as the valid split. Independent of any scan that `write` writes.
    """
    for index in range(n):
        found = findings(seed, "reports", index, enriched)
        said = sum(statements(found, random.Random(f"report {seed} reports {index} {wordings}"), wordings), [])
        yield " ".join(text for text, _, _ in said if text), list(found), {name for _, _, denied in said for name in denied}
