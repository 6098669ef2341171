"""Studies: rows that are there are not trained for again, what was cut off goes on, time runs out."""

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

from ranjax import evaluate, report, study
from ranjax.config import Config
from ranjax.data import load_corpus
from ranjax.embedded import markov_entropy
from ranjax.errors import DivergedError, UserError
from ranjax.evaluate import Evaluation, Run
from ranjax.step import build_model

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


@pytest.fixture
def config(tmp_path):
    (tmp_path / "pets.txt").write_text("the cat sat on the mat\nthe dog sat on the log\n" * 80)
    return Config(dataset=str(tmp_path / "pets.txt"), features=(8,), layers=1, batch_size=4, steps=7, epochs=1)


def test_a_row_is_trained_for_once(config, tmp_path, capsys):
    options = study.Options(runs=str(tmp_path / "runs"))
    table = study.Table(tmp_path, options)
    row = table.row(config, study="pets", model="RAN, input gates")
    promised = (
        "dataset cell gates activation seed dropout test_perplexity valid_perplexity tokens config versions device"
    )
    assert set(promised.split()) | {"date", "seconds", "study", "model"} <= set(row)
    assert row["test_perplexity"] > 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [
        "pets-RAN-input-gates-1-epochs-dropout-0.2-rate-0.002-seed-0"
    ]
    assert "== pets, RAN, input gates, 1 epochs" in capsys.readouterr().out

    again = study.Table(tmp_path, options)
    assert again.rows == [json.loads(json.dumps(row))]
    assert again.row(config, study="pets", model="RAN, input gates") == again.rows[0]
    assert capsys.readouterr().out.startswith(f"1 rows are in {tmp_path / 'results.jsonl'}: not trained for again")
    assert again.row(config, study="pets", model="another")["model"] == "another"
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2

    (tmp_path / "results.jsonl").unlink()  # a run that is there goes on: this one is at its end
    assert row["valid_perplexities"] == [row["valid_perplexity"]]  # of the one epoch
    once_more = study.Table(tmp_path, options).row(config, study="pets", model="RAN, input gates")
    assert once_more["test_perplexity"] == row["test_perplexity"]
    assert once_more["seconds"] == row["seconds"]


def test_rows_of_another_text_are_not_joined(config, tmp_path):
    elsewhere = study.Options(runs=str(tmp_path / "runs"), out=str(tmp_path / "new" / "table"))
    table = study.Table(tmp_path / "the study", elsewhere)
    table.row(config)
    assert [path.name for path in (tmp_path / "new" / "table").iterdir()] == ["results.jsonl"]
    Path(config.dataset).write_text("the cat sat on the mat\n" * 100)
    tokens = len(load_corpus(config.dataset).test) - 1
    with pytest.raises(
        UserError, match=rf"are of another text: {table.rows[0]['tokens']} test tokens, .* {tokens} .*--out"
    ):
        table.row(dataclasses.replace(config, seed=1))
    assert [row["seed"] for row in study.Table(tmp_path / "the study", elsewhere).rows] == [0]


def test_a_table_that_another_program_writes_to_is_read_anew(config, tmp_path, monkeypatch):
    """Before a training and after it."""
    table, file = study.Table(tmp_path, study.Options(runs=str(tmp_path))), tmp_path / "results.jsonl"
    others = {"model": "RAN", "config": vars(config), "valid_perplexity": 3.0, "tokens": None}
    file.write_text(json.dumps(others) + "\n")
    assert table.row(config, model="RAN")["valid_perplexity"] == 3.0

    def trained(_):
        with file.open("a") as added:
            added.write(json.dumps(others | {"model": "GRU"}) + "\n")
        raise DivergedError("not finite")

    monkeypatch.setattr(study, "train_together", trained)
    table.row(config, model="LSTM")
    assert [row["model"] for row in table.rows] == ["RAN", "GRU", "LSTM"]


def test_a_perplexity_beyond_all_figures_is_none_in_the_row():
    names = (
        "dataset test_bits tokens_per_second parameters training_seconds side_by_side device date versions test_tokens"
    )
    result = dict.fromkeys(names.split(), 1) | {
        "valid_perplexities": [2.0, evaluate.MOST],
        "train_perplexities": [evaluate.MOST, 3.0],
        "config": dataclasses.asdict(Config()),
    }
    row = study._row(result | {"valid_perplexity": 2.0, "test_perplexity": evaluate.perplexity(800.0)})
    assert (row["valid_perplexity"], row["valid_perplexities"], row["test_perplexity"]) == (2.0, [2.0, None], None)
    assert row["train_perplexities"] == [None, 3.0]


def test_a_row_that_was_cut_off_is_named(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text('{"model": "RAN"}\n{"model": "LS')
    with pytest.raises(
        UserError, match=re.escape(f'line 2 of {file} must be the JSON of one row; got \'{{"model": "LS\'')
    ):
        study.Table(tmp_path, study.Options())
    assert file.read_text() == '{"model": "RAN"}\n{"model": "LS'


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of CPUs")
def test_the_device_is_the_cores_that_a_run_may_use(monkeypatch):
    for cores, device in (({3}, "1 CPU core"), ({0, 3}, "2 CPU cores")):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores, raising=False)
        assert report.device() == device


def test_seeds_are_trained_together_and_one_that_diverges_has_its_row(config, tmp_path, monkeypatch, capsys):
    calls = []

    def trained(configs):
        calls.append([c.seed for c in configs])
        if 1 in calls[-1]:
            raise DivergedError("not finite")
        names = ("test_perplexity", "valid_perplexity", "test_bits", "tokens_per_second", "parameters")
        rest = {"training_seconds": 1.0, "device": "", "date": "", "versions": {}, "side_by_side": len(configs)}
        rest |= {
            "test_tokens": len(load_corpus(config.dataset).test) - 1,
            "valid_perplexities": [],
            "train_perplexities": [],
        }
        return [dict.fromkeys(names, c.seed) | rest | {"dataset": "", "config": vars(c)} for c in configs]

    monkeypatch.setattr(study, "train_together", trained)
    table = study.Table(tmp_path, study.Options(runs=str(tmp_path)))
    table.row(dataclasses.replace(config, seed=3), model="RAN")
    rows = table.rows_of_seeds(config, [0, 2, 3], model="RAN")
    assert [(row["seed"], row["test_perplexity"], row["side_by_side"]) for row in rows] == [
        (0, 0, 2),
        (2, 2, 2),
        (3, 3, 1),
    ]
    rows = table.rows_of_seeds(config, [1, 4], model="RAN")
    assert calls == [[3], [0, 2], [1, 4], [1], [4]]
    assert [(row["seed"], row["test_perplexity"]) for row in rows] == [(1, None), (4, 4)]
    assert rows[0].keys() == rows[1].keys()
    assert "diverged: not finite" in capsys.readouterr().out
    assert [study.value(row, "valid_perplexity") for row in rows] == [math.inf, 4]
    written = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in written] == [3, 0, 2, 1, 4]

    again = study.Table(tmp_path, study.Options(runs=str(tmp_path)))
    assert again.rows_of_seeds(config, [1, 4], model="RAN") == written[3:]  # it is not tried anew
    assert len(calls) == 5


def test_seeds_go_one_after_another_on_a_cpu_and_together_elsewhere(monkeypatch):
    for backend, expected in (("cpu", [[0], [1], [2]]), ("gpu", [[0, 1, 2]])):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert study.rounds(3) == expected
    with pytest.raises(UserError, match="--seeds must be at least 1; got 0"):
        study.rounds(0)


def test_the_settings_that_came_out_best_are_those_of_the_first_seed(config):
    tried = [(0, 0.1, 109.0), (0, 0.4, 111.0), (0, 0.2, None), (1, 0.1, 112.0), (1, 0.4, 90.0), (2, 0.1, None)]
    rows = [
        {"model": "RAN", "config": vars(dataclasses.replace(config, seed=seed, dropout=rate)), "valid_perplexity": p}
        for seed, rate, p in tried
    ]
    other_steps = {"model": "RAN", "config": vars(dataclasses.replace(config, seed=1, dropout=0.1, steps=3))}
    assert study.chosen([*rows, other_steps], model="RAN") == [rows[0], rows[3], rows[5]]
    assert study.chosen(rows, model="LSTM") == []
    assert study.chosen(rows[3:]) == []  # none of the first seed yet


def test_time_runs_out(config, tmp_path):
    """Cut off by its budget, saved as by Ctrl-C, without a row."""
    program = (
        "import sys; from pathlib import Path; from orbax.checkpoint import v1\n"
        "from ranjax import study; from ranjax.config import Config\n"
        "minutes = float(sys.argv[2]) if len(sys.argv) > 2 else None\n"
        "table = study.Table(Path(sys.argv[1]), study.Options(runs=sys.argv[1] + '/runs'))\n"
        f"config = Config(dataset={config.dataset!r}, features=(8,), layers=1, batch_size=4, steps=7, epochs=400)\n"
        "with study.budget(minutes):\n"
        "    table.row(config, study='pets')\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "cut")]
    first = subprocess.run([*command, "0.12"], capture_output=True, text=True, check=False, timeout=120)
    assert first.returncode == 143, first.stderr
    assert "saved. Go on with" in first.stdout
    assert not (tmp_path / "cut" / "results.jsonl").exists()
    assert list((tmp_path / "cut" / "runs").iterdir())


def test_a_budget_is_taken_back(config):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)]
    with study.budget(0.001):
        pass
    time.sleep(0.1)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)] == before
    with pytest.raises(UserError, match="--minutes must be above 0; got 0"), study.budget(0):
        pass


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
        assert len((EXPERIMENTS / name / "run.py").read_text().splitlines()) < 120
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


@pytest.mark.parametrize(("name", "what", "least"), [("parity", ("study", "model"), 7), ("ablation", ("variant",), 13)])
def test_means_and_deviations_are_those_of_the_seeds(name, what, least):
    page = (EXPERIMENTS / name / "README.md").read_text("utf-8")
    rows = [json.loads(line) for line in (EXPERIMENTS / name / "results.jsonl").read_text("utf-8").splitlines()]
    several = 0
    for labels in {tuple(row[key] for key in what) for row in rows}:
        of = study.chosen(rows, **dict(zip(what, labels, strict=True)))
        if len(of) > 1 and all(row["test_perplexity"] for row in of):
            several += 1
            test = [row["test_perplexity"] for row in of]
            valid = np.mean([row["valid_perplexity"] for row in of])
            seeds = ", ".join(f"{figure:.2f}" for figure in test)
            mean = f"**{np.mean(test):.2f}** +- {np.std(test, ddof=1):.2f}"
            assert f"{valid:.2f} | {seeds} | {mean}" in page
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

    table = study.Table(tmp_path, study.Options())
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
        best = study.chosen(rows, study="ptb-small-tuned", model=model)[0]
        config = parity["settings"](None, "wikitext-2", model)
        assert (config.learning_rate, config.dropout) == (best["learning_rate"], best["dropout"])


def test_three_models_have_several_seeds(tmp_path):
    main, trained = runpy.run_path(str(EXPERIMENTS / "parity" / "run.py"))["main"], []

    class Rows(study.Table):
        def rows_of_seeds(self, config, seeds, measure=None, **labels):
            trained.extend((labels["model"], seed) for seed in seeds)

    main.__globals__.update(Table=Rows, draw=lambda *_: None)
    models = ("RAN", "GRU", "LSTM")
    for seeds, more in ((1, []), (2, [("RAN", 1), ("LSTM", 1)])):
        trained.clear()
        main(main.__globals__["Parity"](study="wikitext-2", models=models, seeds=seeds, out=str(tmp_path)))
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
    parity["draw"](rows, tmp_path / "some.svg")
    drawn = (tmp_path / "some.svg").read_text("utf-8")  # its texts are in comments, as they are in its paths
    for axis in ("test perplexity", "test bits per character", "test bits per byte"):
        assert drawn.count(f"<!-- {axis} -->") == 1


@pytest.mark.parametrize(
    ("name", "flags"),
    [("parity", ["--study", "ptb"]), ("ablation", ["--variants", "GRU"]), ("long-context", ["--models", "GRU"])],
)
def test_what_a_study_does_not_know_is_refused(name, flags):
    program = [sys.executable, str(EXPERIMENTS / name / "run.py"), *flags]
    ended = subprocess.run(program, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "invalid choice" in ended.stderr
    assert flags[1] in ended.stderr
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
