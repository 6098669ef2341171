"""Tables of studies: recorded runs are skipped, others are trained and recorded."""

import dataclasses
import doctest
import json
import math
import os
import re
import signal
from pathlib import Path

import jax
import pytest
from harness import table as tables
from harness.table import Table, chosen, value

from ranjax.cli import Stop, Stopped
from ranjax.data import load_corpus
from ranjax.errors import DivergedError, UserError
from ranjax.training import report
from ranjax.training.config import Config
from ranjax.training.metrics import MOST, perplexity


def test_examples():
    failed, attempted = doctest.testmod(tables)
    assert (failed, attempted > 0) == (0, True)


def test_a_row_is_trained_for_once(pets, tmp_path, capsys):
    table = Table(tmp_path, tmp_path / "runs")
    row = table.row(pets, study="pets", model="RAN, input gates")
    promised = (
        "dataset cell gates activation seed dropout test_perplexity valid_perplexity tokens config versions device"
    )
    assert set(promised.split()) | {"date", "seconds", "study", "model"} <= set(row)
    assert row["test_perplexity"] > 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [
        "pets-RAN-input-gates-1-epochs-dropout-0.2-rate-0.002-seed-0"
    ]
    assert "== pets, RAN, input gates, 1 epochs" in capsys.readouterr().out

    again = Table(tmp_path, tmp_path / "runs")
    assert again.rows == [json.loads(json.dumps(row))]
    assert again.row(pets, study="pets", model="RAN, input gates") == again.rows[0]
    assert capsys.readouterr().out.startswith(f"Recorded runs are skipped: 1 rows in {tmp_path / 'results.jsonl'}")
    assert again.row(pets, study="pets", model="another")["model"] == "another"
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2

    (tmp_path / "results.jsonl").unlink()  # a run that is there goes on: this one is at its end
    assert row["valid_perplexities"] == [row["valid_perplexity"]]  # of the one epoch
    once_more = Table(tmp_path, tmp_path / "runs").row(pets, study="pets", model="RAN, input gates")
    assert once_more["test_perplexity"] == row["test_perplexity"]
    assert once_more["seconds"] == row["seconds"]


def test_rows_of_another_text_are_not_joined(pets, tmp_path):
    table = Table(tmp_path / "new" / "table", tmp_path / "runs")
    table.row(pets)
    assert [path.name for path in (tmp_path / "new" / "table").iterdir()] == ["results.jsonl"]
    Path(pets.dataset).write_text("the cat sat on the mat\n" * 100)
    tokens = len(load_corpus(pets.dataset).test) - 1
    with pytest.raises(
        UserError, match=rf"are of another text: {table.rows[0]['tokens']} test tokens, .* {tokens} .*--out"
    ):
        table.row(dataclasses.replace(pets, seed=1))
    assert [row["seed"] for row in Table(tmp_path / "new" / "table", tmp_path / "runs").rows] == [0]


def test_a_table_that_another_program_writes_to_is_read_again(pets, tmp_path, monkeypatch):
    """Before a training and after it."""
    table, file = Table(tmp_path, tmp_path), tmp_path / "results.jsonl"
    others = {"model": "RAN", "config": vars(pets), "valid_perplexity": 3.0, "tokens": None}
    file.write_text(json.dumps(others) + "\n")
    assert table.row(pets, model="RAN")["valid_perplexity"] == 3.0

    def trained(_, **how):
        with file.open("a") as added:
            added.write(json.dumps(others | {"model": "GRU"}) + "\n")
        raise DivergedError("not finite")

    monkeypatch.setattr(tables, "train", trained)
    table.row(pets, model="LSTM")
    assert [row["model"] for row in table.rows] == ["RAN", "GRU", "LSTM"]


def test_settings_may_come_in_any_form(pets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = Table(tmp_path, tmp_path / "runs")
    row = table.row(pets)
    for form in ({"dataset": "pets.txt"}, {"dataset": Path(pets.dataset)}, {"features": [8]}):
        assert table.row(dataclasses.replace(pets, **form)) == json.loads(json.dumps(row))
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


def test_a_last_line_without_an_end_is_not_written_on(pets, tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text('{"config": {"features": [8]}}')  # the other settings at their defaults; no tokens
    Table(tmp_path, tmp_path / "runs").row(pets)
    assert [json.loads(line)["config"]["features"] for line in file.read_text().splitlines()] == [[8], [8]]


def test_a_run_that_was_cut_off_goes_on(pets, tmp_path):
    table = Table(tmp_path, tmp_path / "runs")
    run = table._run(pets, {"model": "RAN"})
    assert not run.resume
    Path(run.out).mkdir(parents=True)  # without a result yet
    assert table._run(pets, {"model": "RAN"}).resume


def test_a_perplexity_beyond_all_figures_is_none_in_the_row():
    names = "dataset test_bits tokens_per_second parameters training_seconds device date versions test_tokens"
    result = dict.fromkeys(names.split(), 1) | {
        "valid_perplexities": [2.0, MOST],
        "train_perplexities": [MOST, 3.0],
        "config": dataclasses.asdict(Config()),
    }
    row = tables._row(result | {"valid_perplexity": 2.0, "test_perplexity": perplexity(800.0)})
    assert (row["valid_perplexity"], row["valid_perplexities"], row["test_perplexity"]) == (2.0, [2.0, None], None)
    assert row["train_perplexities"] == [None, 3.0]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"model": "LS', "Unterminated"),
        (b"{}", "no settings"),
        (b"[]", "no settings"),
        (b"\xff", "'utf-8' codec"),
        (b'{"config": {}}', "no settings"),
        (b'{"config": {"features": [8], "new": 1}}', "does not know its settings new"),
        (b'{"config": {"features": [8], "preset": null}}', "does not know its settings preset"),
    ],
)
def test_a_line_that_is_no_row_is_named(line, why, tmp_path):
    file = tmp_path / "results.jsonl"
    written = b'{"config": {"features": [8]}}\n' + line
    file.write_bytes(written)
    with pytest.raises(UserError, match=rf"line 2 of {re.escape(str(file))} must be the JSON of one row; got .*{why}"):
        Table(tmp_path, tmp_path)
    assert file.read_bytes() == written


def result_of(config):
    """A `result.json` whose figures are the seed."""
    names = ("test_perplexity", "valid_perplexity", "test_bits", "tokens_per_second", "parameters")
    rest = {"training_seconds": 1.0, "device": "", "date": "", "versions": {}, "dataset": ""}
    rest |= {"valid_perplexities": [], "train_perplexities": []}
    rest |= {"test_tokens": len(load_corpus(config.dataset).test) - 1, "config": vars(config)}
    return dict.fromkeys(names, config.seed) | rest


def test_a_training_that_diverges_has_its_row(pets, tmp_path, monkeypatch, capsys):
    calls = []

    def trained(config, **how):
        calls.append(config.seed)
        if config.seed == 1:
            raise DivergedError("not finite")
        return result_of(config)

    monkeypatch.setattr(tables, "train", trained)
    table = Table(tmp_path, tmp_path)
    rows = [table.row(dataclasses.replace(pets, seed=seed), model="RAN") for seed in (3, 1, 4, 3)]
    assert calls == [3, 1, 4]
    assert [(row["seed"], row["test_perplexity"]) for row in rows] == [(3, 3), (1, None), (4, 4), (3, 3)]
    assert rows[0].keys() == rows[1].keys()
    assert "diverged: not finite" in capsys.readouterr().out
    assert [value(row, "valid_perplexity") for row in rows] == [3, math.inf, 4, 3]
    written = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in written] == [3, 1, 4]

    again = Table(tmp_path, tmp_path)
    assert again.row(dataclasses.replace(pets, seed=1), model="RAN") == written[1]  # it is not tried again
    assert len(calls) == 3


def test_a_training_is_given_the_constraint_and_the_wish_to_stop(pets, tmp_path, monkeypatch):
    given, stop = {}, Stop()

    def trained(config, **how):
        given.update(how)
        return result_of(config)

    def constrain(params):
        return params

    monkeypatch.setattr(tables, "train", trained)
    Table(tmp_path, tmp_path, stop=stop).row(pets, constrain=constrain)
    assert given == {"constrain": constrain, "stop": stop}


def test_a_table_stops_before_a_training_but_not_before_a_recorded_row(pets, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "train", lambda config, **_: result_of(config))
    row = Table(tmp_path, tmp_path).row(pets)
    over = Stop(minutes=0.0)
    table = Table(tmp_path, tmp_path, stop=over)
    assert table.row(pets) == row
    with pytest.raises(Stopped) as ended:
        table.row(dataclasses.replace(pets, seed=1))
    assert ended.value.code == 128 + signal.SIGTERM
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of CPUs")
def test_the_device_of_a_row_is_the_cores_that_its_run_may_use(monkeypatch):
    for cores, device in (({3}, "1 CPU core"), ({0, 3}, "2 CPU cores")):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores, raising=False)
        assert report.device() == device


def test_the_settings_that_came_out_best_are_those_of_the_first_seed(pets):
    tried = [(0, 0.1, 109.0), (0, 0.4, 111.0), (0, 0.2, None), (1, 0.1, 112.0), (1, 0.4, 90.0), (2, 0.1, None)]
    rows = [
        {"model": "RAN", "config": vars(dataclasses.replace(pets, seed=seed, dropout=rate)), "valid_perplexity": p}
        for seed, rate, p in tried
    ]
    other_steps = {"model": "RAN", "config": vars(dataclasses.replace(pets, seed=1, dropout=0.1, steps=3))}
    assert chosen([*rows, other_steps], model="RAN") == [rows[0], rows[3], rows[5]]
    assert chosen(rows, model="LSTM") == []
    assert chosen(rows[3:]) == []  # none of the first seed yet


def test_what_a_study_measures_is_in_the_row(pets, tmp_path):
    def measure(run):
        return {"measured": (run / "result.json").exists(), "parameters": -1}

    row = Table(tmp_path, tmp_path / "runs").row(pets, measure)
    assert row["measured"] is True
    assert row["parameters"] == -1  # in place of the training's
    result = json.loads(next((tmp_path / "runs").rglob("result.json")).read_text())
    assert row["seconds"] == result["training_seconds"]


def test_a_table_that_cannot_be_written_is_noticed_before_the_training(pets, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        Table(tmp_path / "file" / "out", tmp_path / "runs").row(pets)
    assert not (tmp_path / "runs").exists()


def test_every_setting_tells_rows_apart_but_where_a_run_is():
    usual, elsewhere = tables._settings(Config()), ("out", "resume", "data_dir", "track", "profile_dir")
    for field in dataclasses.fields(Config):
        other = dataclasses.replace(Config(), **{field.name: "another"})
        assert (tables._settings(other) == usual) == (field.name in elsewhere)


def test_a_table_reads_its_data_sets_in_its_folder(tmp_path):
    (tmp_path / "data" / "text8").mkdir(parents=True)
    (tmp_path / "data" / "text8" / "text8").write_text("the cat sat on the mat " * 160)
    config = Config(dataset="text8", features=(8,), layers=1, batch_size=4, steps=7, epochs=1)
    assert Table(tmp_path, tmp_path / "runs", str(tmp_path / "data")).row(config)["test_perplexity"] > 1


def test_one_text_by_two_tokenizers_is_in_one_table(pets, tmp_path):
    table = Table(tmp_path, tmp_path / "runs")
    table.row(pets, model="characters")
    assert table.row(dataclasses.replace(pets, tokenizer="word"), model="words")["tokens"] < table.rows[0]["tokens"]
