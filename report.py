"""What people look at: the terminal's tables, self-contained HTML pages, pictures.

    page = report_page(result, scores, labels, classes, rows, study)      # of evaluate.evaluate
    print(evaluation_table(result))
"""
import base64
import io
import math
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from heatmap import heatmap, to_scan
from metrics import auroc, placements, roc_curve

PHANTOM_WARNING = (
    "this model was trained on the phantom, synthetic scans; it knows nothing about patients"
)
STYLE = Path(__file__).with_name("resources").joinpath("report.css").read_text("utf-8")
BLUE, ORANGE = "#2563b0", "#c8641b"


def percent(value):
    """A share as text, in per cent; - where it is NaN."""
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def macro_name(name, values):
    return f"macro {name} ({values['classes']} of {values['of']})"


# ---- the terminal --------------------------------------------------------------------------------

def table(result, level="volume"):
    """The metrics of one level ("volume" or "scan") of an evaluation, as text."""
    keys = ("auprc", "f1", "accuracy", "precision", "recall", "specificity")
    named, result = [], result[level]
    for name, values in result["classes"].items():
        named.append((name, values["positives"], values))
    for name, values in result["macro"].items():
        named.append((macro_name(name, values), "", values))
    width = max(len(name) for name, _, _ in named)
    head = f"{'per ' + level:{width}}  positive  AUROC  95 % interval "
    lines = [head + "".join(f"{key:>13}" for key in keys)]
    for name, count, values in named:
        low, high = (f"{percent(end):>5}" for end in values["auroc_95"])
        line = f"{name:{width}}  {count:>8}  {percent(values['auroc']):>5}  {low} to {high} "
        lines.append(line + "".join(f"{percent(values[key]):>13}" for key in keys))
    return "\n".join(lines)


def evaluation_table(result):
    """What the terminal shows of an evaluation."""
    lines = [f"note: {PHANTOM_WARNING}"] if result.get("trained_on") == "phantom" else []
    lines.append(counts(result) + f", split {result['split']}; {len(result['skipped'])} skipped")
    lines.append(table(result) if "volume" in result else "no labels, so no metrics")
    for name, values in result.get("scan", {}).get("macro", {}).items():
        line = f"macro AUROC per scan, {name}: {percent(values['auroc'])}"
        if "probe" in result:
            probe = result["volume"]["macro"][name]["probe_auroc"]
            line += f"; of a linear probe, per volume: {percent(probe)}"
        lines.append(line)
    if "compare" in result:
        other = result["compare"]
        lines.append(f"macro AUROC difference to {other['with']}: {difference(other)}")
    for name, point in result.get("pointing", {}).items():
        hit = f"point at it in {percent(point['hit'])} % of {point['volumes']} volumes"
        lines.append(f"heat maps of {name.lower()} {hit}; chance {percent(point['chance'])} %")
    return "\n".join(lines)


def counts(result):
    volumes, scans, patients = result["volumes"], result["scans"], result["patients"]
    return f"{volumes} volumes of {scans} scans of {patients} patients"


def difference(other):
    low, high = (f"{100 * end:+.1f}" for end in other["macro_difference_95"])
    return f"{100 * other['macro_difference']:+.1f} ({low} to {high})"


def volume_table(result):
    """What the terminal shows of one scan's findings."""
    width = max(len(finding["abnormality"]) for finding in result["findings"])
    lines = [f"note: {result['warning']}"] if "warning" in result else []
    if result["reference_scans"]:
        lines.append(f"higher than % of the {result['reference_scans']} training scans")
    else:
        lines.append("no percentile: the run lacks reference.safetensors, its training scans")
    for finding in result["findings"]:
        place, bar = finding["percentile"], ""
        if place is not None:
            bar = f"{place:6.1f}  {'#' * round(place / 5):20}"
        lines.append(f"{finding['abnormality']:{width}}  {bar}  {finding['score']:+.3f}")
    return "\n".join(lines)


# ---- pictures ------------------------------------------------------------------------------------

def png_of(figure, dpi=90):
    """PNG bytes of a matplotlib figure."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=dpi)
    return png.getvalue()


def heat_figure(png, caption, alt="heat map"):
    """A figure with an embedded PNG; the caption is HTML."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    caption = f"<figcaption>{caption}</figcaption>"
    return f'<figure><img alt="{alt}" src="{source}">{caption}</figure>'


def planes_png(heat, volume, title=""):
    """PNG: the three planes of a Volume through the maximum of its map (X, Y, Z), over the scan.

    Axial, coronal and sagittal, as a radiologist hangs them.
    """
    x, y, z = np.unravel_index(heat.argmax(), heat.shape)
    hu, (dx, dy, dz) = volume.hu, volume.spacing
    planes = [
        (hu[:, :, z], heat[:, :, z], dy / dx, (x, y), "upper"),
        (hu[:, y], heat[:, y], dz / dx, (x, z), "lower"),
        (hu[x], heat[x], dz / dy, (y, z), "lower"),
    ]
    figure = Figure(figsize=(9, 3.1), facecolor="black")
    for axes, (scan, hot, aspect, peak, origin) in zip(figure.subplots(1, 3), planes):
        place = dict(aspect=aspect, origin=origin)
        axes.imshow(scan.T, cmap="gray", vmin=-1000, vmax=400, **place)
        axes.imshow(hot.T, cmap="inferno", vmin=0, vmax=1, alpha=0.6 * hot.T, **place)
        axes.plot(*peak, "+", color="cyan", markersize=12)
        axes.axis("off")
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.9 if title else 0.995, 0.01)
    figure.suptitle(title, color="white", fontsize=10)
    return png_of(figure)


def roc_png(scores, labels, classes, areas):
    """PNG: the ROC curve of each class that has one, as small multiples."""
    shown = [c for c in range(len(classes)) if not math.isnan(areas[c])]
    lines = max(1, math.ceil(len(shown) / 7))
    figure = Figure(figsize=(13, 2.05 * lines), layout="constrained")
    panels = figure.subplots(lines, 7, squeeze=False).flat
    for axes in panels:
        axes.set(xticks=[], yticks=[], aspect="equal")
        axes.axis("off")
    for axes, c in zip(figure.axes, shown):
        axes.axis("on")
        axes.plot([0, 1], [0, 1], "--", color="#c5ccd5", linewidth=1)
        axes.plot(*roc_curve(scores[:, c], labels[:, c]), color=BLUE)
        axes.set_title(f"{classes[c]}\n{percent(areas[c])}", fontsize=8)
    return png_of(figure)


def gap_png(pictures):
    """PNG: volumes and texts in the plane, before and after the bank."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    titles = {"before": "before the bank (v, t)", "after": "after it (v_hat, t_hat)"}
    for axes, (when, title) in zip(figure.subplots(1, 2), titles.items()):
        for points, colour, label in zip(pictures[when], (BLUE, ORANGE), ("volumes", "texts")):
            x, y = np.transpose(points)
            axes.scatter(x, y, s=9, c=colour, alpha=0.55, linewidths=0, label=label)
        axes.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim", title=title)
    figure.axes[0].legend(frameon=False)
    return png_of(figure)


# ---- pages: one file each, without network, scripts or other files -------------------------------

def page(title, *parts):
    """One self-contained HTML page."""
    title = escape(title)
    viewport = '<meta name="viewport" content="width=device-width,initial-scale=1">'
    head = f'<meta charset="utf-8">{viewport}<title>{title}</title><style>{STYLE}</style>'
    body = f"<h1>{title}</h1>{''.join(parts)}"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def html_table(head, lines, macro=0):
    """Cells are HTML; the first `macro` lines are set apart."""
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    body = ""
    for i, line in enumerate(lines):
        body += "<tr class=macro>" if i < macro else "<tr>"
        body += "".join(f"<td>{cell}</td>" for cell in line) + "</tr>"
    table = f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class=wide>{table}</div>"


def bar(value, ends, probe=math.nan):
    """A value from 0 to 1 as a mark on a line, its interval as a bar, another value in orange."""
    if math.isnan(value):
        return ""
    low, high = (100 * end for end in ends)
    marks = f'<i style="left:{low:.1f}%;width:{high - low:.1f}%"></i>'
    marks += f'<b style="left:{100 * value:.1f}%"></b>'
    if not math.isnan(probe):
        marks += f'<b class=probe style="left:{100 * probe:.1f}%"></b>'
    return f"<span class=bar>{marks}</span>"


def metrics_table(result):
    """The volume level's macro means and classes, AUROC as bars with their intervals."""
    has_probe, volume = "probe" in result, result["volume"]
    keys = ("auprc", "f1", "f1_weighted", "accuracy", "precision", "recall", "specificity")
    head = ["", "positive", "AUROC", "95 % interval", "0 <small>(chance ½)</small> 1"]
    head += (["linear probe"] if has_probe else []) + list(keys)
    named = [(macro_name(name, values), "", values) for name, values in volume["macro"].items()]
    for name, values in volume["classes"].items():
        named.append((name, values["positives"], values))
    lines = []
    for name, count, values in named:
        probe, ends = values.get("probe_auroc", math.nan), values["auroc_95"]
        line = [escape(name), count, f"<b>{percent(values['auroc'])}</b>"]
        line += ["–".join(map(percent, ends)), bar(values["auroc"], ends, probe)]
        line += [percent(probe)] if has_probe else []
        lines.append(line + [percent(values[key]) for key in keys])
    return html_table(head, lines, macro=len(volume["macro"]))


def report_page(result, scores, labels, classes, rows, study=None):
    """report.html of an evaluation; the heat maps of the most wrong scans need the study's model."""
    parts, skipped = [], f"{len(result['skipped'])} volumes skipped"
    if result.get("trained_on") == "phantom":
        parts.append(f"<p class=note>Note: {PHANTOM_WARNING}.</p>")
    parts.append(f"<p>{counts(result)}, split {escape(result['split'])}; {skipped}.</p>")
    if "volume" in result:
        parts += [headline(result), "<h2>Zero-shot diagnosis</h2>", metrics_table(result)]
        parts.append(explanation(result))
        areas = [values["auroc"] for values in result["volume"]["classes"].values()]
        picture = roc_png(scores, labels, classes, areas)
        parts += ["<h2>ROC curves</h2>", heat_figure(picture, "AUROC in per cent", "ROC curves")]
    for section in (comparison_section, retrieval_section, gap_section, bank_section):
        parts.append(section(result))
    parts.append(pointing_section(result))
    if study and "volume" in result:
        parts += ["<h2>Most wrong</h2><div class=pair>"]
        parts += wrong_figures(scores, labels, classes, rows, study) + ["</div>"]
    parts.append("<h2>What was evaluated</h2><dl>")
    for key in ("run", "model_sha256", "manifest", "manifest_sha256", "benchmark",
                "prompts_sha256", "pairs", "threshold"):
        if result.get(key):
            value = f"<code>{escape(str(result[key]))}</code>"
            parts.append(f"<dt>{key.replace('_', ' ')}</dt><dd>{value}</dd>")
    return page("BrgSA: zero-shot evaluation", *parts, "</dl>")


def headline(result):
    out = "<div class=big>"
    for name, values in result["volume"]["macro"].items():
        per_scan = result["scan"]["macro"].get(name, {}).get("auroc", math.nan)
        low, high = map(percent, values["auroc_95"])
        of = f"{values['classes']} of {values['of']} classes"
        small = f"95 % interval {low} to {high}; per scan {percent(per_scan)}"
        out += f"<div><b>{percent(values['auroc'])}</b>macro AUROC, {name}, {of}<br>"
        out += f"<small>{small}</small></div>"
    return out + "</div>"


def explanation(result):
    sources = {
        "split-half": "the other half of the patients",
        "oracle": "the very labels that are scored, which flatters",
    }
    threshold = sources.get(result["threshold"], escape(result["threshold"]))
    probe = ""
    if "probe" in result:
        probe = "; orange: a linear classifier trained on the labels of other patients"
    text = (
        "In per cent, per volume. Bars: AUROC with its 95 % interval over 1,000 resamples of "
        f"patients{probe}. Thresholds come from {threshold}. A class that lacks positive or "
        "negative cases has no AUROC and is left out of the mean."
    )
    top = result["scan"]["top_k"]
    lines = [["per scan", *map(percent, top.values())]]
    return f"<p class=soft>{text}</p>" + html_table(["of a scan's highest classes", *top], lines)


def comparison_section(result):
    if "compare" not in result:
        return ""
    other, lines = result["compare"], []
    for name, c in other["classes"].items():
        lines.append([escape(name), percent(c["auroc"]), percent(c["other"]), f"{c['p']:.2g}"])
    test = f"Macro AUROC difference {difference(other)}; p: DeLong's test over patients."
    head = f"<h2>Beside {escape(other['with'])}</h2><p>{test}</p>"
    return head + html_table(["", "this", "other", "p"], lines)


def retrieval_section(result):
    if "retrieval" not in result:
        return ""
    out = "<h2>Retrieval</h2>"
    for way, values in result["retrieval"].items():
        line, head = [way.replace("_", " ")], ["", *(key.replace("_", " ") for key in values)]
        for key, value in values.items():
            is_number = key in ("median_rank", "candidates")
            line.append(f"{value:g}" if is_number else percent(value))
        out += html_table(head, [line])
    right = "Volume to volume: right is another patient's volume that shares an abnormality."
    return out + f"<p class=soft>Recall in per cent, by the scores' cosines. {right}</p>"


def gap_section(result):
    if "gap" not in result:
        return ""
    lines = []
    for when, numbers in result["gap"].items():
        lines.append([f"{when} the bank", *(f"{value:.2f}" for value in numbers.values())])
    head = ["", *(key.replace("_", " ") for key in result["gap"]["before"])]
    text = (
        "Two principal components. Linear separability: held-out accuracy of telling volumes from "
        "texts, 0.5 = no gap."
    )
    picture = heat_figure(gap_png(result["gap_picture"]), text, "modality gap")
    return "<h2>Modality gap</h2>" + picture + html_table(head, lines)


def bank_section(result):
    """What the bank's entries stand for: the most used, with the prompts nearest to them."""
    if "bank" not in result:
        return ""
    bank, lines = result["bank"], []
    for entry in bank["most_used"]:
        prompts = [f"{escape(text)} ({cosine:.2f})" for text, cosine in entry["prompts"]]
        lines.append([entry["entry"], percent(entry["share"]), ", ".join(prompts)])
    use = (
        f"Of {bank['size']} entries, {bank['perplexity']:.0f} are in use over all volumes "
        f"(perplexity), {bank['perplexity_of_one']:.0f} for a single one."
    )
    head = ["entry", "share, %", "nearest prompts (cosine)"]
    return f"<h2>What the bank's entries stand for</h2><p>{use}</p>" + html_table(head, lines)


def pointing_section(result):
    if not result.get("pointing"):
        return ""
    lines = []
    for name, p in result["pointing"].items():
        shares = [percent(p[key]) for key in ("hit", "chance", "elsewhere")]
        lines.append([escape(name), p["volumes"], *shares])
    text = "How often, in per cent, a map's maximum lies within one patch of the drawn lesion."
    head = ["", "volumes", "this volume's map", "chance", "another volume's map"]
    return f"<h2>Do heat maps point?</h2><p>{text}</p>" + html_table(head, lines)


def most_wrong(scores, labels, classes, rows, n=3):
    """The n worst misses and n worst false alarms, one a class and scan.

    A list of (row number, class number, share of the opposite cases ranked wrong). Classes that the
    model knows count more (times AUROC): an error of a class at chance says nothing.
    """
    areas, cases = auroc(scores, labels), {1: [], 0: []}
    for c in np.flatnonzero(~np.isnan(areas)):
        places = placements(scores[:, c], labels[:, c] == 1, labels[:, c] == 0)
        for truth, place in zip((1, 0), places):
            worst = np.argmin(place)
            row, wrong = np.flatnonzero(labels[:, c] == truth)[worst], 1 - place[worst]
            cases[truth].append((areas[c] * wrong, row, c, wrong))
    chosen, scans = [], set()
    for truth in (1, 0):
        left = n
        for _, row, c, wrong in sorted(cases[truth], reverse=True):
            if left and rows[row].scan not in scans:
                scans.add(rows[row].scan)
                chosen.append((row, c, wrong))
                left -= 1
    return chosen


def wrong_figures(scores, labels, classes, rows, study):
    """The most wrong scans, each with the heat map of the abnormality that was missed or seen."""
    figures = []
    for i, c, wrong in most_wrong(scores, labels, classes, rows):
        prompts = study.asked[classes[c]]["positive"]
        grid = heatmap(study.model, study.cache.read(rows[i]), prompts, pairs=study.pairs)
        volume = rows[i].read()
        if labels[i, c]:
            kind = f"missed: scored below {percent(wrong)} % of the scans without it"
        else:
            kind = f"false alarm: scored above {percent(wrong)} % of the scans with it"
        name = f"<br><code>{escape(rows[i].name)}</code>"
        png = planes_png(to_scan(grid, volume, study.model.config), volume)
        figures.append(heat_figure(png, f"<b>{escape(classes[c])}</b>, {kind}{name}"))
    return figures


def volume_page(result, figures=()):
    """report.html of one scan: the ranked findings and the heat maps' figures."""
    parts, lines = [], []
    if "warning" in result:
        parts.append(f"<p class=note>Note: {result['warning']}.</p>")
    ranked = "No percentile: the run lacks its training scans."
    if result["reference_scans"]:
        scans = f"{result['reference_scans']} training scans"
        ranked = f"Findings ranked by their place among the scores of {scans}."
    for finding in result["findings"]:
        place, line = finding["percentile"], [escape(finding["abnormality"]), "–", ""]
        if place is not None:
            line[1:] = [f"{place:.0f}", bar(place / 100, [0, place / 100])]
        lines.append([*line, f"{finding['score']:+.3f}"])
    parts.append(f"<p>{ranked} A research tool, not a medical device.</p>")
    parts.append(html_table(["", "higher than %", "", "score"], lines))
    parts += ["<h2>Where</h2><div class=pair>", *figures, "</div>"]
    parts.append(f"<h2>Model</h2><p><code>{escape(result['model'])}</code></p>")
    return page(f"BrgSA: {Path(result['volume']).name}", *parts)
