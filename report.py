"""What people look at: tables, pages and pictures."""
import base64
import io
import math
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from heatmap import heatmap, to_scan
from metrics import placements, auroc

PHANTOM_WARNING = "this model was trained on the phantom, synthetic scans; it knows nothing about patients"


def table(result, level="volume"):
    """The terminal's table of one level of an evaluation."""
    keys = ("auprc", "f1", "accuracy", "precision", "recall", "specificity")
    named = [(name, values["positives"], values) for name, values in result[level]["classes"].items()]
    named += [(f"macro {name} ({values['classes']} of {values['of']})", "", values) for name, values in result[level]["macro"].items()]
    width = max(len(name) for name, _, _ in named)
    lines = [f"{'per ' + level:{width}}  positive  AUROC  95 % interval " + "".join(f"{key:>13}" for key in keys)]
    for name, count, values in named:
        ends = " to ".join(f"{_percent(end):>5}" for end in values["auroc_95"])
        lines.append(f"{name:{width}}  {count:>8}  {_percent(values['auroc']):>5}  {ends:14} " + "".join(f"{_percent(values[key]):>13}" for key in keys))
    return "\n".join(lines)


def _percent(value):
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def evaluation_table(result):
    """What the terminal shows of an evaluation."""
    lines = [f"note: {PHANTOM_WARNING}"] if result.get("trained_on") == "phantom" else []
    lines += [f"{result['volumes']} volumes of {result['scans']} scans of {result['patients']} patients, split {result['split']}; {len(result['skipped'])} skipped"]
    lines += [table(result) if "volume" in result else "no labels, so no metrics"]
    for name, values in result.get("scan", {}).get("macro", {}).items():
        probe = f"; of a linear probe, per volume: {_percent(result['volume']['macro'][name]['probe_auroc'])}" if "probe" in result else ""
        lines.append(f"macro AUROC per scan, {name}: {_percent(values['auroc'])}{probe}")
    if "compare" in result:
        ends = " to ".join(f"{100 * end:+.1f}" for end in result["compare"]["macro_difference_95"])
        lines.append(f"macro AUROC difference to {result['compare']['with']}: {100 * result['compare']['macro_difference']:+.1f} ({ends})")
    for name, point in result.get("pointing", {}).items():
        lines.append(f"heat maps of {name.lower()} point at it in {_percent(point['hit'])} % of {point['volumes']} volumes; chance {_percent(point['chance'])} %")
    return "\n".join(lines)


def volume_table(result):
    """The terminal's table of one scan's findings."""
    width = max(len(finding["abnormality"]) for finding in result["findings"])
    lines = [f"note: {result['warning']}"] if "warning" in result else []
    lines += [f"higher than % of the {result['reference_scans']} training scans" if result["reference_scans"]
              else "no percentile: the run has no reference.safetensors, the training scans' embeddings"]
    for finding in result["findings"]:
        place = finding["percentile"]
        bar = "" if place is None else f"{place:6.1f}  {'#' * round(place / 5):20}"
        lines.append(f"{finding['abnormality']:{width}}  {bar}  {finding['score']:+.3f}")
    return "\n".join(lines)


def planes_png(heat, volume, title=""):
    """PNG bytes: axial, coronal and sagittal plane of a Volume through the maximum of its map (X, Y, Z), as a radiologist hangs them."""
    at, hu, (dx, dy, dz) = np.unravel_index(heat.argmax(), heat.shape), volume.hu, volume.spacing
    cuts = [((slice(None), slice(None), at[2]), dy / dx, at[0], at[1], "upper"), ((slice(None), at[1]), dz / dx, at[0], at[2], "lower"),
            ((at[0],), dz / dy, at[1], at[2], "lower")]
    figure = Figure(figsize=(9, 3.1), facecolor="black")
    for axes, (cut, aspect, column, row, origin) in zip(figure.subplots(1, 3), cuts):
        axes.imshow(hu[cut].T, cmap="gray", vmin=-1000, vmax=400, aspect=aspect, origin=origin)
        axes.imshow(heat[cut].T, cmap="inferno", vmin=0, vmax=1, alpha=0.6 * heat[cut].T, aspect=aspect, origin=origin)
        axes.plot(column, row, "+", color="cyan", markersize=12)
        axes.axis("off")
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.9 if title else 0.995, 0.01)
    figure.suptitle(title, color="white", fontsize=10)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=90)
    return png.getvalue()


# ---------------------------------------------------------------- pages: one file each, without network, scripts or other files

STYLE = """
:root{--ink:#1c2430;--soft:#66707d;--line:#dde2e8;--blue:#2563b0;--orange:#c8641b;--pale:#dbe7f5}
*{box-sizing:border-box} body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:#fff;max-width:68rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0} h2{font-size:1.15rem;margin:2rem 0 .5rem;border-bottom:2px solid var(--line)}
p{max-width:46rem} small,.soft{color:var(--soft)} .note{background:#fdf1e0;padding:.5rem .8rem;border-left:4px solid var(--orange)}
.wide{overflow-x:auto} table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .5rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap} th:first-child,td:first-child{text-align:left}
tr.macro{font-weight:600;background:#f4f6f9} .big{display:flex;flex-wrap:wrap;gap:.6rem 2.5rem} .big b{font-size:2rem;display:block;line-height:1.2}
.bar{position:relative;display:block;width:9rem;height:.9rem;background:linear-gradient(var(--line),var(--line)) 50%/1px 100% no-repeat #f4f6f9}
.bar i,.bar b{position:absolute;top:.2rem;height:.5rem;background:#8db4de} .bar b{top:0;height:.9rem;width:3px;margin-left:-1px;background:var(--blue)}
.bar b.probe{background:var(--orange)} .grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.5rem,1fr));gap:.8rem}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(17rem,1fr));gap:1rem} figure{margin:0;font-size:.8rem;break-inside:avoid}
svg,img{width:100%;height:auto;display:block} code{font-size:.78rem;overflow-wrap:anywhere} dt{font-weight:600} dd{margin:0 0 .3rem}
@media print{body{max-width:none;padding:0;font-size:11px}h2{break-after:avoid}tr{break-inside:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def page(title, *parts):
    """One self-contained HTML page."""
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{''.join(parts)}</body></html>\n")


def html_table(head, lines, macro=()):
    """Cells are HTML; the lines whose number is in `macro` are set apart."""
    body = "".join(f"<tr{' class=macro' if i in macro else ''}>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for i, line in enumerate(lines))
    return f"<div class=wide><table><thead><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr></thead><tbody>{body}</tbody></table></div>"


def _bar(value, ends, probe=None):
    if math.isnan(value):
        return ""
    low, high = (100 * end for end in ends)
    marks = f'<i style="left:{low:.1f}%;width:{high - low:.1f}%"></i><b style="left:{100 * value:.1f}%"></b>'
    if probe is not None and not math.isnan(probe):
        marks += f'<b class=probe style="left:{100 * probe:.1f}%"></b>'
    return f"<span class=bar>{marks}</span>"


def metrics_table(result):
    """The volume level's classes and macro means, AUROC as bars with their intervals."""
    probe = "probe" in result
    keys = ("auprc", "f1", "f1_weighted", "accuracy", "precision", "recall", "specificity")
    head = ["", "positive", "AUROC", "95 % interval", "0 <small>(chance ½)</small> 1", *(["linear probe"] if probe else []), *keys]
    macros, classes = result["volume"]["macro"], result["volume"]["classes"]
    named = [(f"macro {name} ({values['classes']} of {values['of']})", "", values) for name, values in macros.items()]
    lines = []
    for name, count, values in named + [(name, values["positives"], values) for name, values in classes.items()]:
        lines.append([escape(name), count, f"<b>{_percent(values['auroc'])}</b>", "–".join(map(_percent, values["auroc_95"])),
                      _bar(values["auroc"], values["auroc_95"], values.get("probe_auroc")),
                      *([_percent(values["probe_auroc"])] if probe else []), *(_percent(values[key]) for key in keys)])
    return html_table(head, lines, range(len(named)))


def roc_svg(scores, labels):
    """ROC curve of one class, thinned to at most some 100 points."""
    labels, scores = labels[~np.isnan(labels)], scores[~np.isnan(labels)]
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.r_[np.diff(scores[order]) != 0, True])
    found = np.cumsum(labels[order])[last]
    x, y = np.r_[0, (last + 1 - found) / (labels == 0).sum()], np.r_[0, found / labels.sum()]
    keep = np.unique(np.r_[np.arange(0, len(x), max(1, len(x) // 100)), len(x) - 1])
    points = " ".join(f"{100 * x[i]:.1f},{100 - 100 * y[i]:.1f}" for i in keep)
    return ('<svg viewBox="-2 -2 104 104"><rect width="100" height="100" fill="#f8f9fb" stroke="#dde2e8"/>'
            '<path d="M0 100L100 0" stroke="#c5ccd5" stroke-dasharray="2"/>'
            f'<polyline points="{points}" fill="none" stroke="#2563b0" stroke-width="1.8"/></svg>')


def gap_svg(images, texts):
    """Scatter picture of two sets of points in the plane: images blue, texts orange."""
    both = np.array(images + texts)
    low, size = both.min(0), max(np.ptp(both, axis=0).max(), 1e-9)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.1" fill="{colour}" fill-opacity=".55"/>'
            for points, colour in ((images, "#2563b0"), (texts, "#c8641b")) for x, y in (np.array(points) - low) * (150 / size)]
    height = 8 + 150 * np.ptp(both, axis=0)[1] / size
    return f'<svg viewBox="-4 -4 158 {height:.0f}"><rect x="-4" y="-4" width="158" height="158" fill="#f8f9fb"/>{"".join(dots)}</svg>'


def most_wrong(scores, labels, classes, rows, n=3):
    """The n worst misses and n worst false alarms, one a class and scan: (row number, class number, share of the opposite cases ranked wrong).

    Classes that the model knows count more (times AUROC): an error of a class at chance says nothing.
    """
    known, cases = auroc(scores, labels), {1: [], 0: []}
    for c in np.flatnonzero(~np.isnan(known)):
        places = placements(scores[:, c], labels[:, c] == 1, labels[:, c] == 0)
        for truth, place in ((1, places[0]), (0, places[1])):
            worst = np.argmin(place)
            cases[truth].append((known[c] * (1 - place[worst]), np.flatnonzero(labels[:, c] == truth)[worst], c, 1 - place[worst]))
    chosen, scans = [], set()
    for truth in (1, 0):
        for _, i, c, wrong in sorted(cases[truth], reverse=True):
            if rows[i].scan not in scans and sum(labels[j, d] == truth for j, d, _ in chosen) < n:
                scans.add(rows[i].scan)
                chosen.append((i, c, wrong))
    return chosen


def heat_figure(png, caption):
    """A figure with an embedded PNG; the caption is HTML."""
    return f'<figure><img alt="heat map" src="data:image/png;base64,{base64.b64encode(png).decode()}"><figcaption>{caption}</figcaption></figure>'


def report_page(result, scores, labels, classes, rows, study=None):
    """report.html of an evaluation; the heat maps of the most wrong scans need the study's model."""
    parts = [f"<p class=note>Note: {PHANTOM_WARNING}.</p>" if result.get("trained_on") == "phantom" else "",
             f"<p>{result['volumes']} volumes of {result['scans']} scans of {result['patients']} patients, split {escape(result['split'])}; "
             f"{len(result['skipped'])} volumes skipped.</p>"]
    if "volume" in result:
        parts += [*_headline(result), "<h2>Zero-shot diagnosis</h2>", metrics_table(result), *_explain(result), "<h2>ROC curves</h2><div class=grid>"]
        for c, (name, values) in enumerate(result["volume"]["classes"].items()):
            if not math.isnan(values["auroc"]):
                caption = f"<figcaption>{escape(name)} <b>{_percent(values['auroc'])}</b></figcaption>"
                parts.append(f"<figure>{roc_svg(scores[:, c], labels[:, c])}{caption}</figure>")
        parts.append("</div>")
    parts += [*_compare(result), *_retrieval(result), *_gap(result), *_pointing(result)]
    if study and "volume" in result:
        parts += ["<h2>Most wrong</h2><div class=pair>", *wrong_figures(scores, labels, classes, rows, study), "</div>"]
    about = ("run", "model_sha256", "manifest", "manifest_sha256", "benchmark", "prompts_sha256", "pairs", "threshold")
    about = [f"<dt>{key.replace('_', ' ')}</dt><dd><code>{escape(str(result[key]))}</code></dd>" for key in about if result.get(key)]
    parts += ["<h2>What was evaluated</h2><dl>", *about, "</dl>"]
    return page("BrgSA: zero-shot evaluation", *parts)


def _headline(result):
    yield "<div class=big>"
    for name, values in result["volume"]["macro"].items():
        per_scan = result["scan"]["macro"].get(name, {}).get("auroc", math.nan)
        yield (f"<div><b>{_percent(values['auroc'])}</b>macro AUROC, {name}, {values['classes']} of {values['of']} classes<br>"
               f"<small>95 % interval {' to '.join(map(_percent, values['auroc_95']))}; per scan {_percent(per_scan)}</small></div>")
    yield "</div>"


def _explain(result):
    how = {"split-half": "the other half of the patients", "oracle": "the very labels that are scored, which flatters"}
    probe = "; orange: a linear classifier trained on the labels of other patients" if "probe" in result else ""
    yield (f"<p class=soft>In per cent, per volume. Bars: AUROC with its 95 % interval over 1,000 resamples of patients{probe}. "
           f"Thresholds come from {how.get(result['threshold'], escape(result['threshold']))}. "
           "A class that lacks positive or negative cases has no AUROC and is left out of the mean.</p>")
    top = result["scan"]["top_k"]
    yield html_table(["of a scan's highest classes", *top], [["per scan", *map(_percent, top.values())]])


def _compare(result):
    if "compare" in result:
        other = result["compare"]
        yield (f"<h2>Beside {escape(other['with'])}</h2><p>Macro AUROC difference {100 * other['macro_difference']:+.1f} "
               f"(95 % interval {' to '.join(f'{100 * end:+.1f}' for end in other['macro_difference_95'])}); p: DeLong's test over patients.</p>")
        lines = [[escape(name), _percent(c["auroc"]), _percent(c["other"]), f"{c['p']:.2g}"] for name, c in other["classes"].items()]
        yield html_table(["", "this", "other", "p"], lines)


def _retrieval(result):
    if "retrieval" in result:
        yield "<h2>Retrieval</h2>"
        for way, values in result["retrieval"].items():
            cells = [f"{value:g}" if key in ("median_rank", "candidates") else _percent(value) for key, value in values.items()]
            yield html_table(["", *(key.replace("_", " ") for key in values)], [[way.replace("_", " "), *cells]])
        yield ("<p class=soft>Recall in per cent, by the same cosines as the scores. Volume to volume: right is another patient's volume that "
               "shares an abnormality.</p>")


def _gap(result):
    if "gap" in result:
        yield "<h2>Modality gap</h2><div class=pair>"
        for when, what in (("before", "before the bank (v, t)"), ("after", "after it (v_hat, t_hat)")):
            numbers = ", ".join(f"{key.replace('_', ' ')} {value:.2f}" for key, value in result["gap"][when].items())
            yield f"<figure>{gap_svg(*result['gap_picture'][when])}<figcaption>{what}: {numbers}</figcaption></figure>"
        yield ('</div><p class=soft>Two principal components; <span style="color:#2563b0">volumes</span>, <span style="color:#c8641b">texts</span>. '
               "Separability: held-out accuracy of telling one from the other, 0.5 = no gap.</p>")


def _pointing(result):
    if result.get("pointing"):
        lines = [[escape(name), p["volumes"], *(_percent(p[key]) for key in ("hit", "chance", "elsewhere"))] for name, p in result["pointing"].items()]
        yield "<h2>Do heat maps point?</h2><p>How often, in per cent, a map's maximum lies within one patch of the drawn lesion.</p>"
        yield html_table(["", "volumes", "this volume's map", "chance", "another volume's map"], lines)


def wrong_figures(scores, labels, classes, rows, study):
    """The most wrong scans, each with the heat map of the abnormality that was missed or seen."""
    for i, c, wrong in most_wrong(scores, labels, classes, rows):
        volume = rows[i].read()
        grid = heatmap(study.model, study.cache.read(rows[i]), study.asked[classes[c]]["positive"], pairs=study.pairs)
        kind = "missed: scored below {} % of the scans without it" if labels[i, c] else "false alarm: scored above {} % of the scans with it"
        caption = f"<b>{escape(classes[c])}</b>, {kind.format(_percent(wrong))}<br><code>{escape(rows[i].name)}</code>"
        yield heat_figure(planes_png(to_scan(grid, volume, study.model.config), volume), caption)


def volume_page(result, figures=()):
    """report.html of one scan: the ranked findings and the heat maps' figures."""
    lines = [[escape(finding["abnormality"]), "–" if finding["percentile"] is None else f"{finding['percentile']:.0f}",
              "" if finding["percentile"] is None else _bar(finding["percentile"] / 100, [0, finding["percentile"] / 100]), f"{finding['score']:+.3f}"]
             for finding in result["findings"]]
    ranked = f"Findings ranked by their place among the scores of {result['reference_scans']} training scans."
    return page(f"BrgSA: {Path(result['volume']).name}", f"<p class=note>Note: {result['warning']}.</p>" if "warning" in result else "",
                f"<p>{ranked if result['reference_scans'] else 'No percentile: the run lacks its training scans.'} A research tool, not a medical device.</p>",
                html_table(["", "higher than %", "", "score"], lines), "<h2>Where</h2><div class=pair>", *figures, "</div>",
                f"<h2>Model</h2><p><code>{escape(result['model'])}</code></p>")
