"""Studies: what was cut off goes on, time runs out; their rows, pages and pictures."""

import dataclasses
import gc
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from ranjax import FixedPoint, RANCell, report, solve, study
from ranjax.training.config import Config
from ranjax.data import load_corpus
from ranjax.data.builtin import markov_entropy
from ranjax.errors import UserError
from ranjax.evaluate import Evaluation, Run
from ranjax.interpret.memory import Memory
from ranjax.training.step import build_model
from harness.table import Table, chosen
from ranjax.train import train
from ranjax.data.vocabulary import Words

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of CPUs")
def test_the_device_is_the_cores_that_a_run_may_use(monkeypatch):
    for cores, device in (({3}, "1 CPU core"), ({0, 3}, "2 CPU cores")):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores, raising=False)
        assert report.device() == device


def test_seeds_go_one_after_another_on_a_cpu_and_together_elsewhere(monkeypatch):
    for backend, expected in (("cpu", [[0], [1], [2]]), ("gpu", [[0, 1, 2]])):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert study.rounds(3) == expected
    with pytest.raises(UserError, match="--seeds must be at least 1; got 0"):
        study.rounds(0)


def test_time_runs_out(pets, tmp_path):
    """Cut off by its budget, saved as by Ctrl-C, without a row; table and runs are where the flags say."""
    program = (
        "import pathlib, signal, sys, threading, time; from orbax.checkpoint import v1\n"
        "from ranjax import study; from ranjax.training.config import Config\n"
        f"config = Config(dataset={pets.dataset!r}, features=(8,), layers=1, batch_size=4, steps=7, epochs=4000)\n"
        "def hurry():\n"  # the minutes are over once it has begun to train, however slow the machine is
        "    while not any(path.stat().st_size for path in pathlib.Path('kept').glob('*/metrics.jsonl')):\n"
        "        time.sleep(0.1)\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0.01)\n"
        "threading.Thread(target=hurry, daemon=True).start()\n"
        "main = lambda options, table: print(table.folder, table.data_dir) or table.row(config, study='pets')\n"
        "study.run(main, study.Options, pathlib.Path('the study'))\n"
    )
    (tmp_path / "study.py").write_text(program)
    command = [sys.executable, "study.py", "--minutes", "5", "--runs", "kept", "--out", "~/cut", "--data-dir", "data"]
    home = os.environ | {"HOME": str(tmp_path)}
    first = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path, env=home)
    assert first.returncode == 143, first.stderr
    assert first.stdout.startswith(f"{tmp_path}/cut data\n")
    assert "saved. Go on with" in first.stdout
    assert first.stdout.endswith("The study was stopped; the same command goes on with it.\n")
    assert not list((tmp_path / "cut").iterdir())
    assert [path.name[:4] for path in (tmp_path / "kept").iterdir()] == ["pets"]


def test_a_budget_is_taken_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)]
    with study.budget(1):
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)] == before
    for minutes in (0, -1, math.inf, math.nan, 1e300):
        with pytest.raises(UserError, match=re.escape(f"--minutes must be above 0 and at most 1000000; got {minutes}")):
            study.budget(minutes).__enter__()


def test_time_that_runs_out_between_two_trainings_ends_the_program_in_order():
    with pytest.raises(SystemExit) as ended, study.budget(0.001):
        time.sleep(5)
    assert ended.value.code == 128 + signal.SIGTERM


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_time_that_runs_out_in_a_callback_of_the_garbage_collector_ends_the_program_a_second_later():
    def collect(*_):
        gc.callbacks.remove(collect)
        signal.raise_signal(signal.SIGALRM)

    def work():
        gc.callbacks.append(collect)
        gc.collect()
        time.sleep(5)

    with pytest.raises(SystemExit) as ended, study.budget(60):
        work()
    assert ended.value.code == 128 + signal.SIGTERM


def test_studies_are_short_and_their_rows_whole():
    promised = "dataset cell gates activation seed dropout test_perplexity valid_perplexity tokens config versions"
    for name in ("parity", "ablation", "long-context"):
        program = (EXPERIMENTS / name / "run.py").read_text("utf-8")
        assert len(program.splitlines()) < 120
        imported = re.findall(r"^ *(?:import|from) (\w+)", program, re.MULTILINE)
        assert set(imported) - sys.stdlib_module_names == {"ranjax"}
        rows = [json.loads(line) for line in (EXPERIMENTS / name / "results.jsonl").read_text().splitlines()]
        assert rows
        assert all({*promised.split(), "device", "date", "seconds"} <= row.keys() for row in rows)


@pytest.mark.parametrize("name", ["parity", "ablation", "long-context"])
def test_a_page_states_what_its_rows_say(name):
    """The figure of every row, to its digits."""
    page = set(re.findall(r"\d+\.\d+", (EXPERIMENTS / name / "README.md").read_text("utf-8")))
    for row in map(json.loads, (EXPERIMENTS / name / "results.jsonl").read_text("utf-8").splitlines()):
        if row["dataset"] in ("text8", "enwik8"):
            figure, digits = row["test_bits"], 3
        elif "recalled" in row:
            figure, digits = abs(row["recalled"]), 2  # no "-0.00"
        else:
            short = row.get("study", "").endswith("-grid")
            figure, digits = row["valid_perplexity" if short else "test_perplexity"], 3 if "length" in row else 2
        assert figure is None or f"{figure:.{digits}f}" in page, row  # None: it diverged


def test_the_table_of_tasks_has_the_figures_of_its_rows():
    folder = EXPERIMENTS / "long-context"
    page, study = (folder / "README.md").read_text("utf-8"), runpy.run_path(str(folder / "run.py"))
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text("utf-8").splitlines()]
    recalled = {(row["task"], row["model"], row["length"]): row["recalled"] for row in rows if "recalled" in row}
    for model in study["MODELS"]:
        cells = [
            f"{abs(recalled[task, model, distance]):.2f}"
            for task, distances in study["DISTANCES"].items()
            for distance in distances
        ]
        assert f"| {model} | {' | '.join(cells)} |" in page


def test_the_readme_has_the_figures_of_the_page():
    page = (EXPERIMENTS / "parity" / "README.md").read_text("utf-8")
    table = re.search(r"\| \| seeds \|.*?\n\n", (EXPERIMENTS.parent / "README.md").read_text("utf-8"), re.DOTALL)[0]
    assert len(figures := re.findall(r"\d+\.\d+", table)) > 10
    assert set(figures) <= set(re.findall(r"\d+\.\d+", page))


def test_a_table_of_parity_has_its_figures_in_the_line_of_their_model():
    """But for the tables whose columns are the models, and what stands in prose."""
    lines = (EXPERIMENTS / "parity" / "README.md").read_text("utf-8").splitlines()
    parity = runpy.run_path(str(EXPERIMENTS / "parity" / "run.py"))
    rows = [json.loads(line) for line in (EXPERIMENTS / "parity" / "results.jsonl").read_text("utf-8").splitlines()]
    checked = 0
    for study_ in parity["STUDIES"].keys() - {"ptb-small-35-columns", "ptb-small-reach", "text8-wide"}:
        for model in parity["MODELS"]:
            name = "RAN (tanh, recurrent gates)" if model == "RAN" else model
            figures = re.findall(r"\d+\.\d+", " ".join(line for line in lines if line.startswith(f"| {name}")))
            for row in chosen(rows, study=study_, model=model):
                if row["test_perplexity"] is not None:
                    bits = row["dataset"] in ("text8", "enwik8")
                    assert (f"{row['test_bits']:.3f}" if bits else f"{row['test_perplexity']:.2f}") in figures, row
                    checked += 1
    assert checked > 40


@pytest.mark.parametrize(("name", "what", "least"), [("parity", ("study", "model"), 8), ("ablation", ("variant",), 13)])
def test_means_and_deviations_are_those_of_the_seeds(name, what, least):
    page = (EXPERIMENTS / name / "README.md").read_text("utf-8")
    rows = [json.loads(line) for line in (EXPERIMENTS / name / "results.jsonl").read_text("utf-8").splitlines()]
    several = 0
    for labels in {tuple(row[key] for key in what) for row in rows}:
        of = chosen(rows, **dict(zip(what, labels, strict=True)))
        if len(of) > 1 and all(row["test_perplexity"] for row in of):
            several += 1
            test, valid, digits = [row["test_perplexity"] for row in of], [row["valid_perplexity"] for row in of], 2
            if of[0]["dataset"] in ("text8", "enwik8"):  # bits
                test, valid, digits = np.log2(test), np.log2(valid), 3
            seeds = ", ".join(f"{figure:.{digits}f}" for figure in test)
            mean = f"**{np.mean(test):.{digits}f}** +- {np.std(test, ddof=1):.{digits}f}"
            assert f"{np.mean(valid):.{digits}f} | {seeds} | {mean}" in page
    assert several >= least


def test_the_overview_claims_what_its_pages_state():
    overview = (EXPERIMENTS / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| (.*?) \|.*\]\(([\w-]+)/?[\w.]*\) \|$", overview, re.MULTILINE)
    assert len(rows) >= 11
    for claim, folder in rows:
        page = (EXPERIMENTS / folder / "README.md").read_text("utf-8")
        assert [figure for figure in re.findall(r"\d+\.\d\d+", claim) if figure not in page] == []


def test_tuning_takes_the_best_of_the_grid(monkeypatch, tmp_path):
    parity = runpy.run_path(str(EXPERIMENTS / "parity" / "run.py"))
    tried = []

    def row(config, **labels):
        tried.append((config.dropout, config.learning_rate, config.epochs))
        short = "-grid" if config.epochs == 4 else ""
        assert labels == {"study": f"ptb-small-tuned{short}", "model": "LSTM"}
        return {"valid_perplexity": abs(config.dropout - 0.25) + abs(config.learning_rate - 2)}

    table = Table(tmp_path, tmp_path)
    monkeypatch.setattr(table, "row", row)
    best = parity["settings"](table, "ptb-small-tuned", "LSTM")
    assert (best.cell, best.dropout, best.learning_rate, best.epochs) == ("lstm", 0.25, 2.0, 8)
    short, full = [(0.25, rate, 4) for rate in (0.5, 1.0, 2.0)], [(dropout, 2.0, 8) for dropout in (0.1, 0.25, 0.4)]
    assert tried == [*short, *short, (0.25, 4.0, 4), *full]  # the highest was the best: a higher one too

    at, lowest = 0.25, []

    def unstable(config, **labels):
        lowest.append(config.learning_rate)
        return {"valid_perplexity": None if config.learning_rate > at else abs(config.learning_rate - at)}

    monkeypatch.setattr(table, "row", unstable)
    assert parity["settings"](table, "ptb-small-tuned", "S-RNN").learning_rate == 0.25
    assert min(lowest) == 0.125  # until the lowest is not the best
    at = 0.001
    assert parity["settings"](table, "ptb-small-tuned", "S-RNN").learning_rate == 0.0625  # three times at most
    assert parity["settings"](None, "ptb-large", "RAN, identity").learning_rate == 0.5
    assert parity["settings"](None, "text8", "RAN, identity").learning_rate == 2e-3
    assert parity["settings"](None, "ptb-medium", "S-RNN").learning_rate == 0.25
    assert parity["settings"](None, "ptb-large", "S-RNN").learning_rate == 0.25
    assert parity["settings"](None, "ptb-medium", "LSTM").learning_rate == 1.0


def test_the_study_of_reach_changes_the_reach_alone():
    studies = runpy.run_path(str(EXPERIMENTS / "parity" / "run.py"))["STUDIES"]
    reach, whole = studies["ptb-small-reach"], studies["ptb-small-tuned"]
    assert reach.steps == studies["ptb-small-20-tuned"].steps
    assert reach.batch_size * reach.steps == whole.batch_size * whole.steps
    sums = whole.steps / reach.steps  # the gradient is a sum over time: so much shorter where there are fewer steps
    assert reach.learning_rate == sums * whole.learning_rate
    assert reach.clip * sums == whole.clip
    same = {"batch_size": 35, "steps": 20, "learning_rate": 1.75, "clip": 5 / 1.75}
    assert dataclasses.replace(whole, **same) == reach
    assert dataclasses.replace(reach, learning_rate=1.0, clip=5.0) == studies["ptb-small-35-columns"]


def test_wikitext_is_trained_at_what_came_out_best_on_penn_treebank():
    parity = runpy.run_path(str(EXPERIMENTS / "parity" / "run.py"))
    rows = [json.loads(line) for line in (EXPERIMENTS / "parity" / "results.jsonl").read_text("utf-8").splitlines()]
    for model in parity["MODELS"]:
        best = chosen(rows, study="ptb-small-tuned", model=model)[0]
        config = parity["settings"](None, "wikitext-2", model)
        assert (config.learning_rate, config.dropout) == (best["learning_rate"], best["dropout"])


def test_three_models_have_several_seeds(tmp_path):
    main, trained = runpy.run_path(str(EXPERIMENTS / "parity" / "run.py"))["main"], []

    class Rows(Table):
        def rows_of_seeds(self, config, seeds, measure=None, **labels):
            trained.extend((labels["model"], seed) for seed in seeds)

    main.__globals__["draw"] = lambda *_: None
    models = ("RAN", "GRU", "LSTM")
    for seeds, more in ((1, []), (2, [("RAN", 1), ("LSTM", 1)])):
        trained.clear()
        options = main.__globals__["Parity"](study="wikitext-2", models=models, seeds=seeds)
        main(options, Rows(tmp_path, tmp_path))
        assert trained == [*((model, 0) for model in models), *more]


def test_models_of_bytes_stay_within_forty_million_parameters():
    parity = runpy.run_path(str(EXPERIMENTS / "parity" / "run.py"))
    for name in parity["MODELS"]:
        model = build_model(parity["settings"](None, "enwik8", name), 205)
        init = partial(model.init, deterministic=True)
        shapes = jax.eval_shape(init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
        assert 8e6 < sum(leaf.size for leaf in jax.tree.leaves(shapes)) <= 40e6


def test_the_parity_study_draws_what_there_is(tmp_path):
    parity = runpy.run_path(str(EXPERIMENTS / "parity" / "run.py"))
    base = parity["STUDIES"]["ptb-small-tuned"]
    rows = [
        {"study": "ptb-small-tuned", "model": model, "test_perplexity": test, "valid_perplexity": valid}
        | {"config": vars(dataclasses.replace(base, seed=seed, dropout=dropout))}
        for model, seed, dropout, valid, test in (
            ("RAN", 0, 0.1, 109.0, 105.0), ("RAN", 0, 0.4, 111.0, 107.0), ("RAN", 1, 0.1, None, None),
            ("LSTM", 0, 0.4, 104.0, 100.0),
        )
    ]  # fmt: skip
    for study_ in ("text8", "enwik8-small"):
        tested = {"test_bits": 2.0, "valid_perplexity": 4.0}
        rows.append({"study": study_, "model": "RAN", "config": vars(parity["STUDIES"][study_])} | tested)
    rows.append(rows[-1] | {"model": "RAN, identity", "test_bits": None, "valid_perplexity": None})
    for some in ([row for row in rows if row["study"] == "enwik8-small"], rows):
        parity["draw"](some, tmp_path / "some.svg")
        drawn = (tmp_path / "some.svg").read_text("utf-8")  # its texts are in comments, as they are in its paths
        marks = [float(x) for x in re.findall(r'<use [^>]*x="([\d.]+)"', drawn)]
        assert max(marks) + 4 < float(re.search(r'viewBox="0 0 ([\d.]+)', drawn)[1])  # a mark is 6 points wide
    for axis in ("test perplexity", "test bits per character", "test bits per byte"):
        assert drawn.count(f"<!-- {axis} -->") == 1


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("parity", ["--study", "ptb"], "invalid choice"),
        ("ablation", ["--variants", "GRU"], "invalid choice"),
        ("long-context", ["--models", "GRU"], "invalid choice"),
        ("parity", ["--models"], "--models must be followed by at least one name."),
    ],
)
def test_what_a_study_does_not_know_is_refused(name, flags, message):
    program = [sys.executable, str(EXPERIMENTS / name / "run.py"), *flags]
    ended = subprocess.run(program, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert message in ended.stderr
    assert flags[-1] in ended.stderr
    assert "Traceback" not in ended.stderr


def test_every_variant_of_the_ablation_is_a_model(tmp_path):
    ablation = runpy.run_path(str(EXPERIMENTS / "ablation" / "run.py"))
    for name, options in ablation["VARIANTS"].items():
        build_model(Config(**options), 50)
        assert (name == "RAN") == (not options)
    rows = [
        {"variant": name, "test_perplexity": 80.0 + n, "parameters": 10} for n, name in enumerate(ablation["VARIANTS"])
    ]
    rows.append({"variant": name, "test_perplexity": None, "parameters": None})  # it diverged
    ablation["draw"](rows[3:], tmp_path / "some.png")  # the study has just begun
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")


def test_long_contexts_take_the_same_tokens_an_update(tmp_path):
    study = runpy.run_path(str(EXPERIMENTS / "long-context" / "run.py"))
    for length in study["LENGTHS"]:
        config = study["windows"](study["TEXT"], length)
        assert config.steps == length
        assert 0.99 * study["UPDATE"] < config.steps * config.batch_size <= study["UPDATE"]
    for task, distances in study["DISTANCES"].items():
        assert all(load_corpus(f"{task}-{distance}").train.size for distance in distances[:1])
    rows = [{"model": "RAN", "task": "copy", "length": n, "recalled": 1 / n} for n in (16, 8)]
    rows.append({"model": "RAN", "task": "copy", "length": 32})  # it diverged
    study["draw"](rows, "recalled", ["copy", "recall"], tmp_path / "some.svg")
    assert "RAN" in re.findall(
        "<!-- (.*?) -->", (tmp_path / "some.svg").read_text()
    )  # in the legend, with a panel empty


@pytest.mark.parametrize("name", ["recall-3", "markov-2"])
def test_what_is_recalled_is_0_for_a_guess_and_1_for_an_answer(name, tmp_path, monkeypatch):
    study = runpy.run_path(str(EXPERIMENTS / "long-context" / "run.py"))
    corpus = load_corpus(name)
    for nats, recalled in ((math.log(8), 0.0), (0.0 if name == "recall-3" else markov_entropy(), 1.0)):

        def evaluator(_, nats=nats):
            def evaluate(params, ids, counted):
                np.testing.assert_array_equal(ids, corpus.test)
                assert (counted is None) == (name == "markov-2")
                assert counted is None or counted.sum() * 5 == len(ids)  # one answer for every "!ab?a"
                return Evaluation(nats, 10)

            return evaluate

        functions = study["recalled"].__globals__
        run = Run(Config(dataset=name), corpus.vocabulary, None, None)
        monkeypatch.setitem(functions, "load_run", lambda _, run=run: run)
        monkeypatch.setitem(functions, "make_evaluator", evaluator)
        assert study["recalled"](tmp_path)["recalled"] == pytest.approx(recalled)


def test_a_study_finds_its_own_rows():
    """Settings that drift from those of the rows would be trained for anew, beside figures that they are not of."""
    found = []

    class Frozen(Table):
        def rows_of_seeds(self, config, seeds, measure=None, **labels):
            rows = [self._found(dataclasses.replace(config, seed=seed), labels) for seed in seeds]
            assert None not in rows, (labels, config)
            found.extend(map(id, rows))
            return rows

    def calls(name, study, rows):
        if name == "ablation":
            return [study["Ablation"]()]
        if name == "long-context":
            return [study["LongContext"](study=part) for part in ("truncation", "tasks")]
        seeds = {}
        for row in rows:
            if row["study"] in study["STUDIES"]:
                label = row["study"], row["model"]
                seeds[label] = max(seeds.get(label, 1), row["seed"] + 1)
        return [study["Parity"](study=part, models=(model,), seeds=n) for (part, model), n in seeds.items()]

    for name, others in (
        ("parity", 1),
        ("ablation", 0),
        ("long-context", 0),
    ):  # one RAN of another dropout: see the page
        found.clear()
        study, table = runpy.run_path(str(EXPERIMENTS / name / "run.py")), Frozen(EXPERIMENTS / name, EXPERIMENTS)
        study["main"].__globals__["draw"] = lambda *_: None
        for options in calls(name, study, table.rows):
            study["main"](options, table)
        assert len(set(found)) == len(table.rows) - others


def test_what_a_study_of_a_run_cannot_use_is_refused_before_anything_is_written(pets, tmp_path, monkeypatch):
    for name in ("convergence", "weights"):
        monkeypatch.syspath_prepend(EXPERIMENTS / name)
    config = dataclasses.replace(pets, gates="input", out=str(tmp_path / "run"))
    train(config)
    kept = tmp_path / "out" / "passes.jsonl"
    kept.parent.mkdir()
    kept.write_text("kept")
    convergence, weights = (runpy.run_path(str(EXPERIMENTS / name / "run.py")) for name in ("convergence", "weights"))
    for checkpoint, options, message in (
        ((), {}, "at least one directory"),
        ((config.out,), {}, "must be a RAN with recurrent gates"),
        ((config.out,), {"lengths": ()}, "--lengths must be whole numbers, each at least 1; got nothing"),
        ((config.out,), {"lengths": (35, -5)}, "--lengths must be .*; got 35, -5"),
        ((config.out,), {"most": 0}, "--most must be .*; got 0"),
    ):
        with pytest.raises(UserError, match=message):
            convergence["main"](convergence["Options"](checkpoint, out=kept.parent, **options))
    words, others = (
        dataclasses.replace(pets, tokenizer="word", cell=cell, out=str(tmp_path / cell)) for cell in ("ran", "lstm")
    )
    for run in (words, others):
        train(run)
    for out, options, message in (
        (config.out, {}, "must be a RAN on words; got one of --cell ran with --tokenizer character"),
        (others.out, {}, "must be a RAN on words; got one of --cell lstm"),
        (config.out, {"most": 0}, "--most must be a whole"),
        (words.out, {"passage": 0}, r"--contexts \+ --length must be below \d+, the tokens for validation; got 250"),
    ):
        with pytest.raises(UserError, match=message):
            weights["main"](weights["Options"](out, out=str(kept.parent), **options))
    assert [path.read_text() for path in kept.parent.iterdir()] == ["kept"]


def test_the_passes_counted_are_those_of_the_solver(monkeypatch, x64):
    monkeypatch.syspath_prepend(EXPERIMENTS / "convergence")
    passes = runpy.run_path(str(EXPERIMENTS / "convergence" / "passes.py"))
    x = jax.random.normal(jax.random.key(0), (1, 60, 5), jax.numpy.float64)
    cell = RANCell(12, param_dtype=jax.numpy.float64)
    params = cell.init(jax.random.key(1), jax.numpy.zeros((1, 12)), x[:, 0])["params"]
    params["gates"]["recurrent_kernel"] *= 3
    with jax.numpy_rank_promotion("allow"):
        rows = {name: count() for name, count in passes["variants"](params, x, "tanh", 40, x).items()}
    for name in ("diagonal", "frozen"):
        _, record = solve(params, x, gates="recurrent", solver=FixedPoint(name, rtol=1e-4))
        assert rows[name]["passes_0.0001"] == int(record.iterations) - 1  # the last one checks
    for name, row in rows.items():
        assert name == "bfloat16 products" or row["passes_0.0001"] is not None, name


def test_passes_of_an_untrained_network_are_of_the_ablated_one(pets, tmp_path, monkeypatch, x64):
    monkeypatch.syspath_prepend(EXPERIMENTS / "convergence")
    (tmp_path / "pets.txt").write_text("the cat sat on the mat\nthe dog sat on the log\n" * 500)
    config = dataclasses.replace(pets, ablation="complement", out=str(tmp_path / "run"))
    train(config)
    convergence, cells = runpy.run_path(str(EXPERIMENTS / "convergence" / "run.py")), []
    convergence["main"].__globals__.update(study=lambda cell, *_: cells.append(cell) or [], draw=lambda *_: None)
    convergence["main"](convergence["Options"]((config.out,), lengths=(35,), out=tmp_path / "out"))
    for cell in cells:
        kernel = cell["gates"]["recurrent_kernel"]
        np.testing.assert_array_equal(kernel[:, 0], -kernel[:, 1])
    assert len(cells) == 2


def test_what_a_model_of_words_remembers_is_measured(pets, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS / "weights")
    (tmp_path / "text").mkdir()
    for split, times in (("train", 200), ("valid", 400), ("test", 20)):
        text = "the cat sat on the mat\nthe dog sat on the log of a dog\n"
        (tmp_path / "text" / f"{split}.txt").write_text(text * times)
    config = dataclasses.replace(pets, dataset=str(tmp_path / "text"), out=str(tmp_path / "run"))
    train(config)
    weights = runpy.run_path(str(EXPERIMENTS / "weights" / "run.py"))
    sizes = {"contexts": 3, "length": 5, "most": 16, "passage": 0}
    weights["main"](weights["Options"](config.out, out=str(tmp_path / "out"), **sizes))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "half-lives.png", "layer-1.png"}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["passage"].startswith("the cat sat on the mat")
    assert results["attribution"]["largest_completeness_error"]["shares"] < 1e-4
    assert {row["rule"] for row in results["attribution"]["rank_correlation"]} == {
        "shares", "integrated_gradients", "weights of layer 1, l2", "nearness"
    }  # fmt: skip


def test_spans_of_ranks_that_a_vocabulary_does_not_have_are_left_out(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS / "weights")
    by_frequency = runpy.run_path(str(EXPERIMENTS / "weights" / "measures.py"))["by_frequency"]
    words, text = Words(("<eos>", "a", "b")), np.array([1, 2, 1, 0])
    layer = Memory(np.ones((4, 1), int), np.array([3, 1, 5]))
    rows = by_frequency(layer, text, text, words)
    assert [(row["ranks"], row["tokens"], row["mean"]) for row in rows] == [("1 to 10", 3, 3.0)]
