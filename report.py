"""What people look at: tables for the terminal, pictures, and pages of one file each.

A page needs no network, no script and no other file; its style is resources/report.css. Its numbers
are those of metrics.json, as evaluate.py makes it:

    python evaluate.py runs/phantom --manifest runs/phantom-data/manifest.csv
    python evaluate.py runs/phantom --volume scan.nii.gz --heatmap
"""
import base64
import io
import math
from html import escape
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure

from heatmap import heatmap, to_scan
from metrics import METRICS, auroc, placements, roc_curve

PHANTOM_WARNING = (
    "this model was trained on the phantom, synthetic scans; it knows nothing about patients")
STYLE = Path(__file__).parent / "resources" / "report.css"
BLUE, ORANGE, GREY = "#2563b0", "#c8641b", "#c5ccd5"


# ---- tables for the terminal

def evaluation_table(result):
    """What the terminal shows of an evaluation."""
    lines = [f"note: {text}" for text in _notes(result)]
    lines.append(_counts(result))
    lines.append(table(result) if "volume" in result else "no labels, so no metrics")
    for name, values in result.get("scan", {}).get("macro", {}).items():
        line = f"macro AUROC per scan, {name}: {_percent(values['auroc'])}"
        if "probe" in result:
            probe = result["volume"]["macro"][name]["probe_auroc"]
            line += f"; of a linear probe, per volume: {_percent(probe)}"
        lines.append(line)
    for way, values in result.get("readouts", {}).items():
        shares = ", ".join(f"{name} {_percent(value)}" for name, value in values.items())
        above = ", as above" * (way == result["prompts_as"])
        lines.append(f"macro AUROC with prompts as {way}{above}: {shares}")
    if "compare" in result:
        difference = _difference(result["compare"])
        lines.append(f"macro AUROC difference to {result['compare']['with']}: {difference}")
    for name, values in result.get("pointing", {}).items():
        hit = f"{_percent(values['hit'])} % of {values['volumes']} volumes"
        chance = f"chance {_percent(values['chance'])} %"
        lines.append(f"heat maps of {name.lower()} point at it in {hit}; {chance}")
    return "\n".join(lines)


def table(result):
    """The volume level of an evaluation: a line a class and a line a macro mean."""
    keys = ("auprc", "f1", "accuracy", "precision", "recall", "specificity")
    macros, classes = _named(result["volume"])
    width = max(len(name) for name, _, _ in classes + macros)
    head = f"{'per volume':{width}}  positive  AUROC  95 % interval "
    lines = [head + "".join(f"{key:>13}" for key in keys)]
    for name, positives, values in classes + macros:
        ends = " to ".join(f"{_percent(end):>5}" for end in values["auroc_95"])
        line = f"{name:{width}}  {positives:>8}  {_percent(values['auroc']):>5}  {ends:14} "
        lines.append(line + "".join(f"{_percent(values[key]):>13}" for key in keys))
    return "\n".join(lines)


def volume_table(result):
    """What the terminal shows of one scan: its findings, ranked."""
    lines = [f"note: {text}" for text in _notes(result)]
    scale = "no percentile: the run has no reference.safetensors, the training scans' embeddings"
    if result["reference_scans"]:
        scale = f"higher than % of the {result['reference_scans']} training scans"
    lines.append(scale)
    width = max(len(finding["abnormality"]) for finding in result["findings"])
    for finding in result["findings"]:
        place, bar = finding["percentile"], ""
        if place is not None:
            bar = f"{place:6.1f}  {'#' * round(place / 5):20}"
        lines.append(f"{finding['abnormality']:{width}}  {bar}  {finding['score']:+.3f}")
    return "\n".join(lines)


def _notes(result):
    """What is to be known of a result before it is read."""
    phantom = "warning" in result or result.get("trained_on") == "phantom"
    notes = [PHANTOM_WARNING] if phantom else []
    return notes + [f"the scan: {text}" for text in result.get("problems", ())]


def _named(level):
    """(name, positives, values) of a level's macro means, and of its classes."""
    macros, classes = [], []
    for name, values in level["macro"].items():
        macros.append((f"macro {name} ({values['classes']} of {values['of']})", "", values))
    for name, values in level["classes"].items():
        classes.append((name, values["positives"], values))
    return macros, classes


def _counts(result):
    return (
        f"{result['volumes']} volumes of {result['scans']} scans of {result['patients']} patients, "
        f"split {result['split']}; {len(result['skipped'])} skipped"
    )


def _percent(value):
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _difference(compare):
    low, high = (f"{100 * end:+.1f}" for end in compare["macro_difference_95"])
    return f"{100 * compare['macro_difference']:+.1f} ({low} to {high})"


# ---- pictures, as the bytes of a PNG

def planes_png(heat, volume, title=""):
    """Axial, coronal and sagittal plane of a Volume through the maximum of its map (X, Y, Z).

    As a radiologist hangs them: the patient's right on the left, the head up.
    """
    maximum = np.unravel_index(heat.argmax(), heat.shape)
    planes = ((2, 0, 1), (1, 0, 2), (0, 1, 2))  # the axis that is cut, the ones across and up
    figure = Figure(figsize=(9, 3.1), facecolor="black")
    for axes, (axis, across, up) in zip(figure.subplots(1, 3), planes):
        hu, plane = (np.take(whole, maximum[axis], axis).T for whole in (volume.hu, heat))
        aspect = volume.spacing[up] / volume.spacing[across]
        view = {"aspect": aspect, "origin": "upper" if axis == 2 else "lower"}
        axes.imshow(hu, cmap="gray", vmin=-1000, vmax=400, **view)
        axes.imshow(plane, cmap="inferno", vmin=0, vmax=1, alpha=0.6 * plane, **view)
        axes.plot(maximum[across], maximum[up], "+", color="cyan", markersize=12)
        axes.axis("off")
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.9 if title else 0.995, 0.01)
    figure.suptitle(title, color="white", fontsize=10)
    return _png(figure, 90)


def roc_png(scores, labels, classes):
    """The ROC curves of scores (N, C), labels (N, C): one small plot a class that has one."""
    values = auroc(scores, labels)
    known = np.flatnonzero(~np.isnan(values))
    lines = math.ceil(len(known) / 6)
    figure = Figure(figsize=(11, 2.2 * lines), layout="constrained")
    for place, c in enumerate(known, 1):
        axes = figure.add_subplot(lines, 6, place)
        axes.set(xticks=[0, 1], yticks=[0, 1], aspect="equal")
        axes.plot([0, 1], "--", color=GREY)
        axes.plot(*roc_curve(scores[:, c], labels[:, c]), color=BLUE)
        title = f"{fill(classes[c], 22)}\n{_percent(values[c])}"
        axes.set_title(title, fontsize=9, parse_math=False)
    figure.supxlabel("1 - specificity", fontsize=9)
    figure.supylabel("sensitivity", fontsize=9)
    return _png(figure, 100)


def gap_png(planes):
    """Volumes and texts, each (N, 2), in a plane before the bank and in one after it."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    titles = ("before the bank: v, t", "after the bank: v_hat, t_hat")
    for axes, title, sides in zip(figure.subplots(1, 2), titles, planes.values()):
        draw_clouds(axes, sides)
        axes.set_title(title, fontsize=10)
        axes.legend(frameon=False)
    return _png(figure, 100)


def draw_clouds(axes, sides):
    """Draw volumes and texts, each (N, 2), into a plot."""
    for points, colour, name in zip(sides, (BLUE, ORANGE), ("volumes", "texts")):
        axes.scatter(*np.transpose(points), s=9, alpha=0.6, color=colour, label=name)
    axes.set_aspect("equal", "datalim")


def _png(figure, dpi):
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    return content.getvalue()


# ---- pieces of HTML

def page(title, result, *parts):
    """One self-contained HTML page, which begins with what is to be known of its result."""
    title = escape(title)
    notes = [f"<p class=note>Note: {escape(text)}.</p>" for text in _notes(result)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{STYLE.read_text()}</style></head>"
        f"<body><h1>{title}</h1>{''.join([*notes, *parts])}</body></html>\n"
    )


def html_table(head, lines, macros=0):
    """A table whose cells are HTML; its first lines, as many as `macros`, are set apart."""
    head = "".join(f"<th>{cell}</th>" for cell in head)
    body = ""
    for i, line in enumerate(lines):
        cells = "".join(f"<td>{cell}</td>" for cell in line)
        body += f"<tr{' class=macro' if i < macros else ''}>{cells}</tr>"
    table = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f"<div class=wide><table>{table}</table></div>"


def heat_figure(png, caption, alt="heat map"):
    """A figure with an embedded PNG; the caption is HTML."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<figure><img alt="{alt}" src="{source}"><figcaption>{caption}</figcaption></figure>'


def _bar(value, ends, probe=math.nan):
    """A bar from 0 to 1: a pale interval, a mark at the value, another at the probe's."""
    if math.isnan(value):
        return ""
    low, high = (100 * end for end in ends)
    marks = f'<i style="left:{low:.1f}%;width:{high - low:.1f}%"></i>'
    marks += f'<b style="left:{100 * value:.1f}%"></b>'
    if not math.isnan(probe):
        marks += f'<b class=probe style="left:{100 * probe:.1f}%"></b>'
    return f"<span class=bar>{marks}</span>"


def _words(key):
    return key.replace("_", " ")


# ---- the page of an evaluation

def report_page(result, scores, labels, rows, study=None):
    """report.html of an evaluation: scores, labels (N, C) of the rows; with a study, heat maps."""
    parts = [f"<p>{escape(_counts(result))}.</p>"]
    if "volume" in result:
        parts += [_headline(result), _readouts(result), _diagnosis(result)]
        if result["volume"]["macro"]:
            curves = roc_png(scores, labels, list(result["volume"]["classes"]))
            caption = "Dashed: chance. Above each curve: its AUROC in per cent."
            parts.append(f"<h2>ROC curves</h2>{heat_figure(curves, caption, 'ROC curves')}")
    sections = {
        "compare": _compare, "retrieval": _retrieval, "prompts_picture": _prompts,
        "gap_picture": _gap_picture, "gap": _gap, "bank": _bank, "pointing": _pointing,
    }
    for key, section in sections.items():
        if result.get(key):
            parts.append(section(result[key]))
    if study and "volume" in result:
        figures = "".join(wrong_figures(result, scores, labels, rows, study))
        parts.append(f"<h2>Most wrong</h2><div class=pair>{figures}</div>")
    return page("BrgSA: zero-shot evaluation", result, *parts, _about(result))


def _headline(result):
    parts = []
    for name, values in result["volume"]["macro"].items():
        per_scan = result["scan"]["macro"].get(name, {}).get("auroc", math.nan)
        ends = " to ".join(map(_percent, values["auroc_95"]))
        parts.append(
            f"<div><b>{_percent(values['auroc'])}</b>macro AUROC, {name}, "
            f"{values['classes']} of {values['of']} classes<br>"
            f"<small>95 % interval {ends}; per scan {_percent(per_scan)}</small></div>"
        )
    return f"<div class=big>{''.join(parts)}</div>"


def _readouts(result):
    """The macro AUROCs of each way to read out, and of the linear probe, side by side."""
    ways, groups = result.get("readouts", {}), result["volume"]["macro"]
    lines = []
    for way, values in ways.items():
        name = f"prompts as {way}" + ", as above" * (way == result["prompts_as"])
        lines.append([name, *(_percent(values[group]) for group in groups)])
    if "probe" in result:
        values = [_percent(values["probe_auroc"]) for values in groups.values()]
        lines.append(["linear probe, trained on labels", *values])
    if not lines:
        return ""
    return html_table(["macro AUROC", *groups], lines) + (
        "<p class=soft>No prompt uses a label. Plain and contrast use the model alone, context and "
        "prototype the summaries of the training reports, too.</p>"
    )


def _prompts(picture):
    classes, matrices = picture
    size = 1.5 + 0.17 * len(classes)
    figure = Figure(figsize=(size * len(matrices) + 2, size), layout="constrained")
    plots = np.ravel(figure.subplots(1, len(matrices), sharey=True))
    for axes, (when, cosines) in zip(plots, matrices.items()):
        image = axes.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1)
        axes.set_title(f"{when} the training", fontsize=10)
        numbers = range(len(classes))
        axes.set_xticks(numbers, classes, fontsize=6, rotation=90, parse_math=False)
        axes.set_yticks(numbers, classes, fontsize=6, parse_math=False)
    figure.colorbar(image, ax=plots, shrink=0.6)
    caption = "Cosines of the prompts' embeddings: what is red is drawn together."
    return f"<h2>Are the prompts told apart?</h2>{heat_figure(_png(figure, 100), caption)}"


def _diagnosis(result):
    threshold = result["threshold"]
    sources = {
        "split-half": "the other half of the patients",
        "oracle": "the very labels that are scored, which flatters",
        "authors": "the very labels that are scored, as the authors choose them",
    }
    resamples = "5,000 resamples of volumes"
    if threshold != "authors":
        resamples = "1,000 resamples of patients"
    probe = "; orange: a linear classifier trained on the labels of other patients"
    top = result["scan"]["top_k"]
    line = ["of a scan's highest classes", *map(_percent, top.values())]
    return (
        f"<h2>Zero-shot diagnosis</h2>{metrics_table(result)}"
        "<p class=soft>In per cent, per volume. Bars: AUROC with its 95 % interval over "
        f"{resamples}{probe if 'probe' in result else ''}. "
        f"Thresholds come from {sources.get(threshold, escape(threshold))}. "
        "A class that lacks positive or negative cases has no AUROC and is left out of the mean."
        f"</p>{html_table(['per scan', *top], [line])}"
    )


def metrics_table(result):
    """The volume level's macro means and classes as HTML, AUROC as bars with their intervals."""
    columns = {key: _words(key) for key in METRICS[1:]}
    if "probe" in result:
        columns = {"probe_auroc": "linear probe"} | columns
    head = ["", "positive", "AUROC", "95 % interval", "0 <small>(chance ½)</small> 1"]
    macros, classes = _named(result["volume"])
    lines = []
    for name, positives, values in macros + classes:
        ends = values["auroc_95"]
        bar = _bar(values["auroc"], ends, values.get("probe_auroc", math.nan))
        interval = "–".join(map(_percent, ends))
        line = [escape(name), positives, f"<b>{_percent(values['auroc'])}</b>", interval, bar]
        lines.append(line + [_percent(values[key]) for key in columns])
    return html_table([*head, *columns.values()], lines, len(macros))


def _compare(other):
    lines = []
    for name, values in other["classes"].items():
        *aurocs, p = values.values()
        lines.append([escape(name), *map(_percent, aurocs), f"{p:.2g}"])
    return (
        f"<h2>Beside {escape(other['with'])}</h2>"
        f"<p>Macro AUROC difference, with its 95 % interval: {_difference(other)}; "
        f"p: DeLong's test over patients.</p>{html_table(['', 'this', 'other', 'p'], lines)}"
    )


def _retrieval(ways):
    tables = {}
    for way, values in ways.items():
        line = [_words(way)]
        for key, value in values.items():
            count = key in ("median_rank", "candidates")
            line.append(f"{value:g}" if count else _percent(value))
        tables.setdefault(tuple(map(_words, values)), []).append(line)
    tables = [html_table(["", *head], lines) for head, lines in tables.items()]
    return (
        f"<h2>Retrieval</h2>{''.join(tables)}<p class=soft>Recall in per cent, by the same cosines "
        "as the scores. Volume to volume: right is another patient's volume that shares an "
        "abnormality.</p>"
    )


def _gap(gap):
    lines = []
    for when, values in gap.items():
        lines.append([f"{when} the bank", *(f"{value:.2f}" for value in values.values())])
    head = ["", *map(_words, gap["before"])]
    return (
        f"{html_table(head, lines)}<p class=soft>Separability: "
        "held-out accuracy of telling volumes from texts, 0.5 = no gap.</p>"
    )


def _gap_picture(planes):
    caption = "Embeddings in the plane of their two first principal components."
    points = heat_figure(gap_png(planes), caption, "volumes and texts in the plane")
    return f"<h2>Modality gap</h2>{points}"


def _bank(bank):
    lines = []
    for entry in bank["most_used"]:
        nearest = []
        for prompt, cosine in entry["prompts"]:
            nearest.append(f"{escape(prompt.removeprefix('There is '))} ({cosine:.2f})")
        lines.append([entry["entry"], _percent(entry["share"]), ", ".join(nearest)])
    return (
        "<h2>What the bank's entries stand for</h2><p>All volumes together use "
        f"{bank['perplexity']:.1f} of the {bank['size']} entries (perplexity), a single one "
        f"{bank['perplexity_of_one']:.1f} on average; {bank['dead']} entries get less than a tenth "
        "of an equal share. The ten most used:</p><div class=text>"
        + html_table(["entry", "share, %", "nearest prompts (cosine)"], lines) + "</div>"
    )


def _pointing(lesions):
    lines = []
    for name, values in lesions.items():
        volumes, *shares = values.values()  # hit, chance, elsewhere
        lines.append([escape(name), volumes, *map(_percent, shares)])
    return (
        "<h2>Do heat maps point?</h2><p>How often, in per cent, a map's maximum lies within one "
        "patch of the drawn lesion.</p>" + html_table(
            ["", "volumes", "this volume's map", "chance", "another volume's map"], lines)
    )


def _about(result):
    keys = ("run", "model_sha256", "manifest", "manifest_sha256", "benchmark", "prompts_sha256",
            "pairs", "threshold")
    parts = []
    for key in keys:
        if result.get(key):
            value = escape(str(result[key]))
            parts.append(f"<dt>{_words(key)}</dt><dd><code>{value}</code></dd>")
    return f"<h2>What was evaluated</h2><dl>{''.join(parts)}</dl>"


# ---- the most wrong scans, each with the map of what was missed or seen

def wrong_figures(result, scores, labels, rows, study):
    """A figure (HTML) of each of the most wrong scans, with a heat map of the abnormality."""
    classes = list(result["volume"]["classes"])
    for i, c, share in most_wrong(scores, labels, rows):
        volume = rows[i].read()
        texts = study.prompts[classes[c]]["positive"]
        grid = heatmap(study.model, study.cache.read(rows[i]), texts, pairs=study.pairs)
        png = planes_png(to_scan(grid, volume, study.model.config), volume)
        if labels[i, c]:
            what = f"missed: scored below {_percent(share)} % of the scans without it"
        else:
            what = f"false alarm: scored above {_percent(share)} % of the scans with it"
        name, scan = escape(classes[c]), escape(rows[i].name)
        yield heat_figure(png, f"<b>{name}</b>, {what}<br><code>{scan}</code>")


def most_wrong(scores, labels, rows):
    """The worst three misses, then false alarms: (row number, class number, share wrong).

    Wrong is the share of the opposite cases that are ranked on the wrong side. At most one miss and
    one false alarm a class, and one of all a scan. An error weighs as much as the class's AUROC:
    one of a class at chance says nothing.
    """
    values, chosen = auroc(scores, labels), {}
    for label in (1, 0):
        cases, most = [], len(chosen) + 3
        for c in np.flatnonzero(~np.isnan(values)):
            members = np.flatnonzero(labels[:, c] == label)
            right = placements(scores[:, c], labels[:, c])[members]
            worst = right.argmin()
            wrong = 1 - right[worst]
            cases.append((values[c] * wrong, members[worst], c, wrong))
        for _, i, c, wrong in sorted(cases, reverse=True):
            if len(chosen) < most:
                chosen.setdefault(rows[i].scan, (i, c, wrong))
    return list(chosen.values())


# ---- the page of one scan

def volume_page(result, pngs=()):
    """report.html of one scan: the findings, ranked, and the heat maps of the first of them."""
    lines, figures = [], []
    ranked = "No percentile: the run lacks its training scans."
    if result["reference_scans"]:
        scans = result["reference_scans"]
        ranked = f"Findings ranked by their place among the scores of {scans} training scans."
    for finding in result["findings"]:
        place, bar = "–", ""
        if finding["percentile"] is not None:
            share = finding["percentile"] / 100
            place, bar = f"{finding['percentile']:.0f}", _bar(share, [0, share])
        name = escape(finding["abnormality"])
        lines.append([name, place, bar, f"{finding['score']:+.3f}"])
    for finding, png in zip(result["findings"], pngs):
        figures.append(heat_figure(png, escape(finding["heatmap"])))
    return page(
        f"BrgSA: {Path(result['volume']).name}",
        result,
        f"<p>{ranked} A research tool, not a medical device.</p>",
        html_table(["", "higher than %", "", "score"], lines),
        f"<h2>Where</h2><div class=pair>{''.join(figures)}</div>",
        f"<h2>Model</h2><p><code>{escape(result['model'])}</code></p>",
    )
