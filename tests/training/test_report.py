"""What a run reports: lines, rows of metrics, the result, the picture of the loss."""

import dataclasses
import json
import sys

import pytest
from small_runs import blank_state

from ranjax.data import load_corpus
from ranjax.errors import UserError
from ranjax.training import report
from ranjax.training.metrics import Evaluation
from ranjax.training.report import Report


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_speed_of_a_burst_is_in_tokens_a_second(pets, tmp_path):
    Report(tmp_path, pets, windows=5, first_step=0, validated=0).progress(blank_state(step=5), steps=5, seconds=2.0)
    assert rows(tmp_path)[-1]["tokens_per_second"] == 5 * 4 * 7 / 2


def test_the_speed_of_a_run_is_that_of_its_timed_steps(pets, tmp_path):
    row = {"step": 15, "epoch": 1.0, "train_perplexity": 2.0, "valid_perplexity": 2.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    whole = Report(tmp_path, pets, windows=15, first_step=30, validated=2)
    state = blank_state(step=30, epoch=2, loss=1.0, tokens=1, seconds=2.0, timed=10)
    result = whole.result(load_corpus(pets.dataset), state, Evaluation(1.0, 1))
    assert result["tokens_per_second"] == 10 * 4 * 7 / 2.0
    assert result["valid_perplexities"] == [2.0]


def test_progress_is_that_of_the_epoch_and_skipped_steps_are_named(pets, tmp_path, capsys):
    reported = Report(tmp_path, dataclasses.replace(pets, epochs=3), windows=5, first_step=0, validated=0)
    state = blank_state(step=10, epoch=1)
    reported.progress(state, 5, 2.0)
    assert capsys.readouterr().out.startswith("epoch 2/3 100%: 70 tokens/s")
    reported.epoch(state._replace(bad=state.bad + 2, seconds=state.seconds + 90.0), Evaluation(0.0, 1))
    assert capsys.readouterr().out.endswith("valid 1.00, 1.5 minutes of training, 2 steps skipped\n")


def test_a_stopped_run_names_its_last_step_and_the_command_that_resumes_it(pets, tmp_path, capsys):
    folder = tmp_path / "a run"
    folder.mkdir()
    reported = Report(folder, pets, windows=500, first_step=3, validated=0)
    reported.interrupted()
    assert capsys.readouterr().out.startswith("Stopped after step 3, saved.")
    reported.progress(blank_state(step=8), 5, 2.0)
    reported.interrupted()
    resume = f"python -m ranjax.train --out '{folder}' --resume"
    assert capsys.readouterr().out == f"Stopped after step 8, saved. Go on with: {resume}\n"


def test_the_picture_of_the_loss_is_over_epochs(tmp_path, monkeypatch):
    figures, blank = [], report.blank_figure
    monkeypatch.setattr(report, "blank_figure", lambda *size: figures.append(blank(*size)) or figures[0])
    points = [{"step": 5 * n, "epoch": float(n), "train_perplexity": 9.0 - n, "valid_perplexity": 8.0} for n in (1, 2)]
    report.draw_loss(points, 5, tmp_path / "loss.png")
    assert [line.get_xydata().tolist() for line in figures[0].axes[0].lines] == [[[1, 8], [2, 7]], [[1, 8], [2, 8]]]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("seconds", "steps"), [(15.0, [5]), (-1.0, [1, 2, 3, 4, 5])])
def test_a_row_comes_every_fifteen_seconds_and_at_the_end_of_an_epoch(seconds, steps, pets, tmp_path, monkeypatch):
    assert report.LOG_SECONDS == 15.0
    monkeypatch.setattr(report, "LOG_SECONDS", seconds)
    reported = Report(tmp_path, pets, windows=5, first_step=0, validated=0)
    for step in range(1, 6):
        reported.progress(blank_state(step=step), 1, 1.0)
    assert [row["step"] for row in rows(tmp_path)] == steps


def test_rows_beyond_the_saved_state_are_dropped_on_resumption(pets, tmp_path):
    early = {"step": 5, "epoch": 1.0, "train_perplexity": 3.0}
    before = early, early | {"valid_perplexity": 2.0}, early | {"step": 6, "epoch": 1.2}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in before))
    Report(tmp_path, pets, windows=5, first_step=5, validated=0)
    assert report.read_rows(tmp_path / "metrics.jsonl") == [early]


def test_only_solvers_that_iterate_report_iterations(pets, tmp_path):
    for solver in ("sequential", "fixed_point"):
        config = dataclasses.replace(pets, solver=solver)
        Report(tmp_path, config, 5, 0, 0).progress(blank_state(step=5, iterations=20.0), 5, 1.0)
        assert rows(tmp_path)[-1].get("mean_iterations") == (None if solver == "sequential" else 4.0)


ROW = {"step": 1, "epoch": 0.5, "train_perplexity": 3.0}


def test_a_row_that_a_kill_cut_short_is_dropped(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(ROW) + '\n{"step": 2, "ep')
    assert report.read_rows(tmp_path / "metrics.jsonl") == [ROW]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("5", "it must hold an object; got 5"),
        ("", "Expecting value"),
        ("[" * 100_000, "nested too deeply"),
        ('{"epoch": 1}', "it has no 'step'"),
        ('{"step": 1, "ep', "Unterminated"),
        (json.dumps(ROW | {"step": "1"}), "its 'step' is not valid; got '1'"),
        (json.dumps(ROW | {"epoch": None}), "its 'epoch' is not valid; got None"),
        (json.dumps({"step": 1, "epoch": 0.5}), "it has no 'train_perplexity'"),
        (json.dumps(ROW | {"valid_perplexity": "\x1b"}), "it holds what is no number"),
        (json.dumps(ROW | {"valid_perplexity": float("nan")}), "it holds what is no number"),
        (report._line(ROW).strip().replace("3.0", "3.5"), "it does not fit its checksum"),
    ],
)
def test_a_damaged_row_costs_that_row(line, why, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(line + "\n" + json.dumps(ROW) + "\n")
    assert report.read_rows(tmp_path / "metrics.jsonl") == [ROW]
    said = capsys.readouterr().err
    assert said.startswith(f"warning: line 1 of {tmp_path}/metrics.jsonl is left out: ")
    assert why in said


def test_a_damaged_last_row_is_reported_where_its_line_is_whole(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(report._line(ROW) + report._line(ROW).replace("3.0", "3.5"))
    assert report.read_rows(tmp_path / "metrics.jsonl") == [ROW]
    assert capsys.readouterr().err.startswith(f"warning: line 2 of {tmp_path}/metrics.jsonl is left out: ")


def test_rows_that_may_not_be_read_are_not_lost(pets, tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be read: Too many levels"):
        Report(tmp_path, pets, windows=5, first_step=0, validated=0)


def test_nothing_is_reported_where_a_run_was_before(pets, tmp_path):
    (tmp_path / "run").mkdir()
    reported = Report(tmp_path / "run", pets, windows=5, first_step=0, validated=0)
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="run is no longer the directory of this run"):
        reported.progress(blank_state(step=5), steps=5, seconds=2.0)
    assert not (tmp_path / "run").exists()


def test_a_file_that_a_kill_left_unfinished_is_removed(pets, tmp_path):
    (tmp_path / ".loss.png.new").write_bytes(b"half")
    Report(tmp_path, pets, windows=5, first_step=0, validated=0)
    assert not (tmp_path / ".loss.png.new").exists()


@pytest.mark.parametrize(("terminal", "term"), [(False, "xterm"), (True, "dumb"), (True, "xterm")])
def test_lines_are_plain_where_no_bar_can_be_drawn(terminal, term, pets, tmp_path, monkeypatch, capsys):
    """In a file, whatever FORCE_COLOR says, and on a terminal that moves no cursor; at any width."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    with Report(tmp_path, pets, windows=5, first_step=0, validated=0) as reported:
        reported.progress(blank_state(step=5), 5, 2.0)
        reported.epoch(blank_state(step=5, epoch=1), Evaluation(0.0, 1))
    out = capsys.readouterr().out
    plain = "epoch 1/1 100%: 70 tokens/s, perplexity 1.00\nepoch 1: train 1.00, valid 1.00, 0.0 minutes of training\n"
    assert (out == plain) == (not terminal or term == "dumb")
    assert ("\x1b" in out) == (terminal and term == "xterm")
