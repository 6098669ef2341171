"""The pages of the experiments: their figures are those of the rows."""

import re
from pathlib import Path

import harness
import numpy as np
import pytest
from harness.table import chosen

EXPERIMENTS = Path(harness.__file__).parents[1]

BITS = ("text8", "enwik8")  # data sets whose figures are in bits


@pytest.mark.parametrize("name", ["parity", "ablation", "long-context", "on-par"])
def test_a_page_states_the_figure_of_every_row(name, page, recorded):
    stated = set(re.findall(r"\d+\.\d+", page(name)))
    for row in recorded(name):
        if row["dataset"] in BITS:
            figure, digits = row["test_bits"], 3
        elif "recalled" in row:
            figure, digits = abs(row["recalled"]), 2  # no "-0.00"
        else:
            short = row.get("study", "").endswith("-grid")
            figure, digits = row["valid_perplexity" if short else "test_perplexity"], 3 if "length" in row else 2
        assert figure is None or f"{figure:.{digits}f}" in stated, row  # None: it diverged


def test_the_table_of_tasks_has_the_figures_of_its_rows(script, page, recorded):
    study, rows = script("long-context"), recorded("long-context")
    recalled = {(row["task"], row["model"], row["length"]): row["recalled"] for row in rows if "recalled" in row}
    for model in study.MODELS:
        cells = [
            f"{abs(recalled[task, model, distance]):.2f}"
            for task, distances in study.DISTANCES.items()
            for distance in distances
        ]
        assert f"| {model} | {' | '.join(cells)} |" in page("long-context")


def test_the_readme_and_the_recipes_have_the_figures_of_the_page(page):
    found = []
    for path in ("README.md", "docs/recipes.md"):
        text = (EXPERIMENTS.parent / path).read_text("utf-8")
        rows = re.findall(r"^\| (?:Penn Treebank|the same with|the same, rate|text8).*", text, re.MULTILINE)
        found += re.findall(r"\d+\.\d+", " ".join(rows))
    assert len(found) > 10
    assert set(found) <= set(re.findall(r"\d+\.\d+", page("parity")))


def test_a_table_of_parity_has_its_figures_in_the_line_of_their_model(script, page, recorded):
    """Except for tables whose columns are the models, and figures in prose."""
    lines, parity, rows = page("parity").splitlines(), script("parity"), recorded("parity")
    checked = 0
    for study in parity.STUDIES.keys() - {"ptb-small-35-columns", "ptb-small-reach", "text8-wide"}:
        for model in parity.MODELS:
            name = "RAN (tanh, recurrent gates)" if model == "RAN" else model
            figures = re.findall(r"\d+\.\d+", " ".join(line for line in lines if line.startswith(f"| {name}")))
            for row in chosen(rows, study=study, model=model):
                if row["test_perplexity"] is not None:
                    bits = row["dataset"] in BITS
                    assert (f"{row['test_bits']:.3f}" if bits else f"{row['test_perplexity']:.2f}") in figures, row
                    checked += 1
    assert checked > 40


@pytest.mark.parametrize(("name", "what", "least"), [("parity", ("study", "model"), 8), ("ablation", ("variant",), 13)])
def test_means_and_deviations_are_those_of_the_seeds(name, what, least, page, recorded):
    rows, several = recorded(name), 0
    for labels in {tuple(row[key] for key in what) for row in rows}:
        of = chosen(rows, **dict(zip(what, labels, strict=True)))
        if len(of) > 1 and all(row["test_perplexity"] for row in of):
            several += 1
            test, valid, digits = [row["test_perplexity"] for row in of], [row["valid_perplexity"] for row in of], 2
            if of[0]["dataset"] in BITS:
                test, valid, digits = np.log2(test), np.log2(valid), 3
            seeds = ", ".join(f"{figure:.{digits}f}" for figure in test)
            mean = f"**{np.mean(test):.{digits}f}** +- {np.std(test, ddof=1):.{digits}f}"
            assert f"{np.mean(valid):.{digits}f} | {seeds} | {mean}" in page(name)
    assert several >= least


def test_the_overview_claims_what_its_pages_state(page):
    overview = (EXPERIMENTS / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| (.*?) \|.*\]\(([\w-]+)/?[\w.]*\) \|$", overview, re.MULTILINE)
    assert len(rows) >= 11
    for claim, folder in rows:
        assert [figure for figure in re.findall(r"\d+\.\d\d+", claim) if figure not in page(folder)] == []
