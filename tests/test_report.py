"""Tables and pages: whole, self-contained, and true to the numbers."""
import numpy as np
import pytest
from test_evaluate import CLASSES, Page, make_bench

import data
import evaluate
import report


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return make_bench(tmp_path_factory.mktemp("bench"))


def test_the_report_is_one_whole_page_that_fetches_nothing_and_shows_every_class(bench, tmp_path):
    result = evaluate.evaluate(*bench, out=tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.fetched and "@import" not in text and "url(" not in text and "<script" not in text
    assert all(link.startswith("data:image/png;base64,") for link in page.fetched)
    shown = [*CLASSES, "Retrieval", "Modality gap", "Most wrong", "ROC curves"]
    for part in [*shown, result["model_sha256"], result["prompts_sha256"]]:
        assert part in text
    assert result["retrieval"]["volume_to_report"]["candidates"] == 12
    assert set(result["gap"]) == {"before", "after"}
    assert "finding 3" not in text  # no report's text


def test_the_banks_entries_are_shown_only_where_the_bank_is_scored(bench, tmp_path):
    bank = evaluate.evaluate(*bench, out=tmp_path)["bank"]
    shares = [entry["share"] for entry in bank["most_used"]]
    assert len(shares) == 10 and shares == sorted(shares, reverse=True) and sum(shares) < 1
    assert bank["size"] == 32 and 1 <= bank["perplexity_of_one"] <= bank["perplexity"] <= 32
    prompts = [prompt for prompt, _ in bank["most_used"][0]["prompts"]]
    assert sorted(prompts) == sorted(f"There is {name}" for name in CLASSES)
    heading = "What the bank's entries stand for"
    assert heading in (tmp_path / "report.html").read_text()
    plain = evaluate.evaluate(*bench, out=tmp_path, pairs=["v-t"])
    assert "bank" not in plain and heading not in (tmp_path / "report.html").read_text()


def test_names_are_escaped(bench, tmp_path):
    rows = data.read_manifest(bench[1])
    names, classes = [row.name for row in rows], ["<b>Fever", *CLASSES]
    scores = np.random.default_rng(0).normal(size=(24, 4))
    evaluate.write_scores(tmp_path / "scores.csv", names, classes, scores)
    for row in rows:
        row.labels["<b>Fever"] = row.labels[CLASSES[0]]
    data.write_manifest(rows, tmp_path / "manifest.csv")
    evaluate.evaluate(None, tmp_path / "manifest.csv", scores=tmp_path / "scores.csv")
    text = (tmp_path / "evaluation" / "report.html").read_text()
    Page(text)
    assert "&lt;b&gt;Fever" in text and "<b>Fever" not in text


def test_the_most_wrong_are_the_worst_ranked_cases_one_a_class_and_scan():
    labels = np.array([[1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0]], float).T
    scores = np.array([[9, 2, 3, 1, 0, 0], [5, 4, 0, 3, 2, 1]], float).T
    rows = [data.Row(f"v{i}", f"v{i}", scan=f"s{i}") for i in range(6)]
    chosen = report.most_wrong(scores, labels, rows)
    assert [(int(i), int(c)) for i, c, _ in chosen] == [(2, 1), (1, 0)]
    assert chosen[0][2] == 1.0 and chosen[1][2] == pytest.approx(1 / 4)
