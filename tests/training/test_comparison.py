"""Runs side by side: the table, the picture, what is not comparable."""

import dataclasses
import json
import math
import shutil

import pytest
from small_runs import TEXT, exported_by_the_program, metrics_rows, settings, train_until, windows_of

from ranjax.data.vocabulary import Words
from ranjax.errors import UserError
from ranjax.training import comparison
from ranjax.training.comparison import draw, read_runs, table, warn_if_not_comparable
from ranjax.training.run import train


@pytest.fixture(scope="module")
def lstm_run(pets_text, tmp_path_factory):
    config = settings(pets_text, tmp_path_factory.mktemp("runs") / "lstm", cell="lstm")
    return config, train(config)


@pytest.fixture
def unfinished_run(pets_text, tmp_path, monkeypatch):
    """Stopped in its second epoch."""
    config = settings(pets_text, tmp_path / "unfinished", gates="input", block="residual")
    train_until(lambda state: int(state.epoch) == 1, config, monkeypatch)
    return config


@pytest.fixture
def words_run(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("the cat sat on the <unk>\n" * 60)
    config = settings(tmp_path, tmp_path / "words", epochs=1)
    train(config)
    return config


def columns_of(runs):
    """The columns of the table by their headings."""
    return {
        heading: list(column)
        for heading, column in zip(comparison.HEADINGS, zip(*(run.cells() for run in runs), strict=True), strict=True)
    }


@pytest.mark.quick
def test_the_table_has_what_the_runs_are_and_how_good(pets_run, lstm_run):
    (config, result), (_, other) = pets_run, lstm_run
    found = columns_of(read_runs([config.directory, lstm_run[0].directory]))
    assert found["run"] == ["pets", "lstm"]
    assert found["data set"] == ["pets.txt", "pets.txt"]
    assert found["tokens of"] == ["character, 15", "character, 15"]
    assert found["cell"] == ["RAN, recurrent gates", "LSTM"]
    assert found["parameters"] == [f"{one['parameters']:,}" for one in (result, other)]
    assert found["epochs"] == ["3 of 3", "2 of 2"]
    assert found["trained on"] == [f"{epochs * windows_of(config) * 28:,}" for epochs in (3, 2)]
    assert found["test"] == [f"{one['test_bits']:.3f} bits/character" for one in (result, other)]
    assert found["valid"] == [
        f"{math.log2(min(one['valid_perplexities'])):.3f} bits/character" for one in (result, other)
    ]
    assert found["minutes"] == [f"{one['training_seconds'] / 60:.1f}" for one in (result, other)]
    assert found["tokens/s"] == [f"{one['tokens_per_second']:,.0f}" for one in (result, other)]
    assert found["device"] == [result["device"]] * 2


def test_a_run_that_is_not_finished_is_shown_as_such(pets_run, unfinished_run, copied_run):
    config = dataclasses.replace(copied_run, epochs=9)  # resumed to nine epochs and stopped
    comparison_of = read_runs([pets_run[0].directory, unfinished_run.directory, config.directory])
    found = columns_of(comparison_of)
    epoch = metrics_rows(unfinished_run)[-1]["epoch"]
    assert found["epochs"][:2] == ["3 of 3", f"{epoch:.3g} of 2"]
    assert found["test"][1] == "unfinished"
    assert found["cell"][1] == "RAN, input gates, residual"
    assert found["valid"][1].endswith("bits/character")
    assert [run.label for run in comparison_of] == ["pets", "unfinished (unfinished)", "copy"]


def test_a_result_of_fewer_epochs_is_not_that_of_the_run(pets_run, copied_run, monkeypatch):
    longer = dataclasses.replace(copied_run, epochs=9, resume=True)
    train_until(lambda state: int(state.epoch) == 3, longer, monkeypatch)
    _, found = read_runs([pets_run[0].directory, copied_run.directory])
    assert found.result is None
    assert found.cells()[comparison.HEADINGS.index("epochs")].endswith(" of 9")


def test_a_run_that_has_just_begun_has_no_figures(pets_run, copied_run):
    (copied_run.directory / "metrics.jsonl").unlink()
    (copied_run.directory / "result.json").unlink()
    runs = read_runs([pets_run[0].directory, copied_run.directory])
    found, names = columns_of(runs), ("epochs", "trained on", "valid", "test", "minutes", "tokens/s")
    assert [found[name][1] for name in names] == ["0 of 3", "0", "-", "unfinished", "0.0", "-"]
    again = dataclasses.replace(runs[1], vocabulary=Words(("a", "b")))
    for both in (runs, [again, again]):  # over bits, over perplexities
        draw(both, copied_run.directory / "picture.png")


def test_perplexities_of_words_are_shown_and_other_texts_warned_of(pets_run, lstm_run, words_run, capsys):
    runs = read_runs([pets_run[0].directory, words_run.directory, lstm_run[0].directory])
    result = json.loads((words_run.directory / "result.json").read_text())
    assert columns_of(runs)["test"][1] == f"{result['test_perplexity']:.2f}"
    warn_if_not_comparable(runs)
    assert capsys.readouterr().err == (
        "warning: perplexities are not comparable across texts or tokenizers, and these runs differ in them: pets, "
        "lstm; words.\n"
    )
    warn_if_not_comparable([runs[0], runs[2]])
    assert capsys.readouterr().err == ""


def test_another_test_text_of_the_same_characters_is_warned_of(pets_run, tmp_path, capsys):
    (tmp_path / "other.txt").write_text((TEXT * 60)[::-1])
    config = settings(tmp_path / "other.txt", tmp_path / "other", epochs=1, batch_size=40)
    train(config)
    warn_if_not_comparable(read_runs([pets_run[0].directory, config.directory]))
    assert "these runs differ in them: pets; other." in capsys.readouterr().err


def test_runs_of_one_name_are_named_by_their_paths_and_lines_are_aligned(pets_run, lstm_run, tmp_path):
    shutil.copytree(pets_run[0].directory, tmp_path / "pets")
    shutil.copytree(pets_run[0].directory, tmp_path / "宽\x1b")
    runs = read_runs([pets_run[0].directory, tmp_path / "pets", tmp_path / "宽\x1b"])
    assert [run.name for run in runs] == [str(pets_run[0].directory), str(tmp_path / "pets"), "宽\\x1b"]
    headings, first, _, last = table(runs).splitlines()
    number = f"{pets_run[1]['parameters']:,}"
    at = headings.index("data set")
    assert first[at:].startswith("pets.txt")
    assert last[at - 1 :].startswith("pets.txt")  # a character of two columns
    assert headings.index("parameters") + len("parameters") == first.index(number) + len(number)


def test_a_table_that_is_wider_than_the_terminal_is_a_list_for_each_run(pets_run, copied_run):
    runs = read_runs([pets_run[0].directory, copied_run.directory])
    widest = max(map(len, table(runs).splitlines()))
    assert table(runs, widest) == table(runs)
    first, second = table(runs, widest - 1).split("\n\n")
    assert first.splitlines()[:2] == ["run         pets", "data set    pets.txt"]
    assert second.splitlines()[0] == "run         copy"
    assert len(first.splitlines()) == len(comparison.HEADINGS)


def test_the_picture_has_a_line_for_each_run_over_epochs_and_over_minutes(
    pets_run, lstm_run, unfinished_run, words_run, tmp_path, monkeypatch
):
    figures, blank = [], comparison.blank_figure
    monkeypatch.setattr(comparison, "blank_figure", lambda *size: figures.append(blank(*size)) or figures[-1])
    directories = [pets_run[0].directory, lstm_run[0].directory, unfinished_run.directory]
    draw(read_runs(directories), tmp_path / "a.png")
    over_epochs, over_minutes = figures[0].axes
    for axes, column in ((over_epochs, 0), (over_minutes, 1)):
        for line, run in zip(axes.lines, read_runs(directories), strict=True):
            assert list(line.get_xdata()) == [point[column] for point in run.curve]
            assert list(line.get_ydata()) == [math.log2(point[2]) for point in run.curve]
    assert over_epochs.get_ylabel() == "validation, bits per character"
    assert [text.get_text() for text in figures[0].legends[0].texts] == ["pets", "lstm", "unfinished (unfinished)"]
    styles = [(line.get_color(), line.get_marker()) for line in over_epochs.lines]
    assert len(set(styles)) == 3
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    draw(read_runs([*directories, words_run.directory]), tmp_path / "b.png")
    assert figures[1].axes[0].get_ylabel() == "validation perplexity"
    assert list(figures[1].axes[0].lines[3].get_ydata()) == [
        point[2] for point in read_runs([*directories, words_run.directory])[3].curve
    ]


def test_what_is_no_run_is_refused(pets_run, copied_run, tmp_path):
    first = pets_run[0].directory
    for given in ([], [first], [first, first], [first, f"{first}/../pets"]):
        with pytest.raises(UserError, match="give the --out directories of two or more runs, each once; got "):
            read_runs(given)
    with pytest.raises(UserError, match=r"is not a run: it has no config\.json"):
        read_runs([first, tmp_path])
    exported_by_the_program(first, tmp_path / "exported")
    with pytest.raises(UserError, match="exported is an exported model, which has no curves"):
        read_runs([first, tmp_path / "exported"])
    (copied_run.directory / "result.json").write_text("{}")
    with pytest.raises(UserError, match=r"result\.json is damaged"):
        read_runs([first, copied_run.directory])


@pytest.mark.filterwarnings("error")
def test_any_name_is_in_the_picture(pets_run, tmp_path, monkeypatch):
    names = ["_a$x_$", "$\\frac{$", "宽"]
    for name in names:
        shutil.copytree(pets_run[0].directory, tmp_path / name)
    figures, blank = [], comparison.blank_figure
    monkeypatch.setattr(comparison, "blank_figure", lambda *size: figures.append(blank(*size)) or figures[-1])
    draw(read_runs([tmp_path / name for name in names]), tmp_path / "a.png")
    drawn = [text.get_text().replace("\\$", "$").strip() for text in figures[0].legends[0].texts]
    assert drawn == names
