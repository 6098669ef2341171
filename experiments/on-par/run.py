"""RANs that one scan solves beside LSTMs: equal parameters, equal tokens, tuned alike.

    python experiments/on-par/run.py --study text8 --data-dir DATA

Every model of a study has as many parameters as its LSTM, within 3 %. Its learning rate, and where the text is short
its dropout, are those of the grid with the lowest validation perplexity of seed 0. A run that was stopped is continued.
A finished run adds its row to results.jsonl, and two pictures are drawn again: on-par.png, every RAN of this study and
of ../parity beside its LSTM, and minutes.png, the test figure against the minutes of training.
"""

import gzip
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `harness` is there

from harness.study import Options, run, seeds
from harness.table import Table, chosen, value
from jax import Array

from ranjax import cli
from ranjax.block import ResidualBlock
from ranjax.errors import UserError
from ranjax.figure import blank_figure
from ranjax.training.config import Config
from ranjax.training.size import parameter_count

HERE = Path(__file__).resolve().parent
PARITY = HERE.parent / "parity" / "results.jsonl"
RECIPE = {"RAN, input gates, residual": "result.json", "LSTM": "lstm/result.json"}  # of ../wikitext-2

Settings = dict[str, Any]


class Study(NamedTuple):
    """What all models of a study share.

    Attributes:
      config: the settings that are not a model's own.
      vocabulary: number of tokens of its text.
      lstm: width of the two layers of its LSTM, whose number of parameters every model has, within 3 %.
      blocks: number of residual blocks in the place of two layers.
      grid: the values that are tried for each model, of one setting after another.
      models: the models, or pieces of one.
    """

    config: Config
    vocabulary: int
    lstm: int
    blocks: int
    grid: dict[str, tuple[float, ...]]
    models: dict[str, Settings]


RESIDUAL = {"block": "residual"}
LINEAR = {"activation": "identity", **RESIDUAL}  # h = c, which is better in blocks
SCAN = {"gates": "input", **LINEAR}
MODELS: dict[str, Settings] = {
    "LSTM": {"cell": "lstm"},
    "LSTM, residual": {"cell": "lstm", **RESIDUAL},
    "RAN": {},
    "RAN, input gates": {"gates": "input"},
    "RAN, input gates, residual": SCAN,
    "RAN, diagonal gates, residual": {"gates": "diagonal", **LINEAR},
}
# The residual RAN with input gates, without one of its pieces, and with other depths, all at one learning rate.
PIECES: dict[str, Settings] = {
    "LSTM": {"cell": "lstm"},
    "LSTM, rate 4e-3": {"cell": "lstm", "learning_rate": 4e-3},
    "all": SCAN,
    "no convolution": SCAN | {"conv_width": 1},
    "no MLP": SCAN | {"expansion": None},
    "no output gate": SCAN,
    "no norms": SCAN,
    "tanh": SCAN | {"activation": "tanh"},
    "1 block": SCAN | {"layers": 1},
    "3 blocks": SCAN | {"layers": 3},
    "3 blocks, rate 1e-3": SCAN | {"layers": 3, "learning_rate": 1e-3},
    "8 blocks": SCAN | {"layers": 8},
    "plain": {"gates": "input"},
}
GATES: dict[str, Settings] = {
    f"{kind}, {name}": settings | {"gate_init": name}
    for kind, settings in {"recurrent": {}, "input": {"gates": "input"}, "input, residual": SCAN}.items()
    for name in ("zeros", "half-lives", "half-lives-variance")
}

RATES = {"learning_rate": (1e-3, 2e-3, 4e-3)}
DROPOUTS = {"dropout": (0.2, 0.35, 0.5)}
TEXT8 = Config(dataset="text8", tie=False, dropout=0.0, epochs=1, steps=50, schedule="cosine", batch_size=20)
PTB = Config(dataset="ptb", tie=True, dropout=0.35, epochs=13, steps=35, schedule="cosine", batch_size=20)
DOCS = Config(dataset="python-docs", schedule="cosine")
STUDIES = {
    "python-docs": Study(DOCS, 4096, 168, 2, RATES, MODELS),
    "text8": Study(TEXT8, 27, 256, 5, RATES, MODELS),
    "text8-3-epochs": Study(replace(TEXT8, epochs=3), 27, 256, 5, RATES, MODELS),
    "enwik8": Study(replace(TEXT8, dataset="enwik8", streams=20), 202, 256, 5, RATES, MODELS),
    "ptb-small": Study(PTB, 10_000, 200, 2, RATES | DROPOUTS, MODELS),
    "ptb-medium": Study(replace(PTB, epochs=25), 10_000, 650, 3, RATES | DROPOUTS, MODELS),
    "pieces": Study(TEXT8, 27, 256, 5, {}, PIECES),
    "gates": Study(TEXT8, 27, 256, 5, {}, GATES),
}


class Beside(NamedTuple):
    """A line of on-par.png: a task, and the study of RANs and of the LSTM that they are compared with."""

    title: str
    table: str
    study: str
    lstm: str | None = None  # None: the same study


BESIDE = (
    Beside("Penn Treebank, 2 x 200, tuned", "parity", "ptb-small-tuned", "ptb-small-20-tuned"),  # its better length
    Beside("the same, tied", "parity", "ptb-small-tied-tuned"),
    Beside("Penn Treebank, 2 x 650", "parity", "ptb-medium"),
    Beside("the same, tied", "parity", "ptb-medium-tied"),
    Beside("Penn Treebank, 2 x 1500", "parity", "ptb-large"),
    Beside("WikiText-2, 2 x 200, not tuned", "parity", "wikitext-2"),
    Beside("enwik8, 2 x 200, not tuned", "parity", "enwik8-small"),
    Beside("WikiText-2, 2.7M parameters, the recipe, not tuned", "wikitext-2", "recipe"),
    Beside("python-docs, 1.1M parameters, tuned", "on-par", "python-docs"),
    Beside("text8 (10 MB), 1.07M parameters, tuned", "on-par", "text8"),
)
MARKS = {
    "RAN": ("oC0", "recurrent gates"),
    "RAN, input gates": ("vC7", "one scan, plain"),
    "RAN, input gates, residual": ("DC2", "one scan, in residual blocks"),
}
FARTHEST = 15  # percent better than the LSTM; what is farther stands there, with its mean
TOLERANCE = 0.03  # of the parameters
BITS = {"text8": "bits per character", "enwik8": "bits per byte"}  # other data sets: perplexity
ENWIK8 = 20_000_000  # bytes


@dataclass(frozen=True)
class OnPar(Options):
    """Runs a study, or continues it."""

    study: Literal[tuple(STUDIES)] = "python-docs"
    """The study."""
    models: tuple[str, ...] | None = None
    """Models of the study, in this order; all of them if not given."""
    seeds: int = 3
    """Number of seeds; studies without a grid have one."""


@contextmanager
def without(piece: str) -> Iterator[None]:
    """Residual blocks that lack a piece which is no setting."""

    def plus(self, x: Array, values: Array, by: Array, gate: str, out: str, deterministic: bool | None) -> Array:
        if gate != "gate":
            return whole(self, x, values, by, gate, out, deterministic)
        return x + self._dense(x.shape[-1], out)(values).astype(x.dtype)

    whole = ResidualBlock._plus
    lacking = {
        "no output gate": ("_plus", plus),
        "no norms": ("_normalised", lambda self, x, name: x.astype(self.cell.dtype or x.dtype)),
    }
    if piece not in lacking:
        yield
        return
    with mock.patch.object(ResidualBlock, *lacking[piece]):
        yield


def settings(study: Study, model: str) -> Config:
    """The settings of a model, as wide as its number of parameters demands.

    Raises:
      UserError: where no width has that number.
    """
    own = study.models[model]
    asked = parameter_count(replace(study.config, cell="lstm", features=(study.lstm,)), study.vocabulary)
    config = replace(study.config, layers=study.blocks if own.get("block") == "residual" else None)  # None: 2
    sized = [replace(config, **own | {"features": (width,)}) for width in range(1, 4 * study.lstm)]
    counts = [_count(one, study.vocabulary, model) for one in sized]
    best = min(range(len(sized)), key=lambda n: abs(counts[n] - asked))
    if abs(counts[best] / asked - 1) > TOLERANCE:
        raise UserError(f"{model} has {counts[best]:,} parameters at the nearest width, and {asked:,} are asked.")
    return sized[best]


def _count(config: Config, vocabulary: int, model: str) -> int:
    gate = (config.layers or 2) * config.features[0] ** 2 if model == "no output gate" else 0
    return parameter_count(config, vocabulary) - gate


def first_of_enwik8(data_dir: str, runs: Path) -> str:
    """A folder with the first 20 MB of enwik8.

    Raises:
      UserError: where enwik8 is not in `data_dir`.
    """
    folder = Path(data_dir) / "enwik8"
    source = next((path for path in (folder / "enwik8", folder / "enwik8.gz") if path.is_file()), None)
    if source is None:
        raise UserError(f"--data-dir must have enwik8/enwik8 or enwik8/enwik8.gz; got {data_dir}.")
    part = runs.resolve() / "enwik8-20mb"
    (part / "enwik8").mkdir(parents=True, exist_ok=True)
    with (gzip.open if source.suffix == ".gz" else open)(source, "rb") as file:
        (part / "enwik8" / "enwik8").write_bytes(file.read(ENWIK8))
    return str(part)


def draw(table: Table) -> None:
    """Both pictures."""
    draw_beside({"on-par": table.rows, **other_tables()}, table.folder / "on-par.png")
    draw_minutes(table.rows, table.folder / "minutes.png")


def other_tables() -> dict[str, list[dict[str, Any]]]:
    """The rows of the studies beside this one that on-par.png has lines of."""
    recipe = {
        model: json.loads((HERE.parent / "wikitext-2" / path).read_text("utf-8")) for model, path in RECIPE.items()
    }
    return {
        "parity": [json.loads(line) for line in PARITY.read_text("utf-8").splitlines()],
        "wikitext-2": [{"study": "recipe", "model": model, **result} for model, result in recipe.items()],
    }


def draw_beside(tables: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The perplexity of every RAN relative to the mean of its LSTM: a line for each task, a mark for each seed."""
    drawn = [line for line in BESIDE if relative(tables, line)]
    figure = blank_figure(8, 1.3 + 0.34 * len(drawn))
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=1)
    for number, line in enumerate(drawn):
        for model, shares in relative(tables, line).items():
            style, size = ("|k", 11) if model == "LSTM" else (MARKS[model][0], 6)
            near = [max(share, -FARTHEST) for share in shares]
            axes.plot(near, [number] * len(near), style, markersize=size)
            if min(shares) < -FARTHEST:
                said = f"{sum(shares) / len(shares):.0f} %"
                axes.annotate(said, (-FARTHEST, number), (7, 0), textcoords="offset points", va="center", fontsize=9)
    axes.plot([], [], "|k", markersize=11, label="LSTM, seeds")
    for style, label in MARKS.values():
        axes.plot([], [], style, label=label)
    axes.set_yticks(range(len(drawn)), [line.title for line in drawn])
    axes.set(ylim=(len(drawn) - 0.5, -0.5), xlabel="test perplexity against the LSTM, %; left is better")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def relative(tables: dict[str, list[dict[str, Any]]], line: Beside) -> dict[str, list[float]]:
    """The perplexities of the LSTM and of each RAN of a line over the mean of the LSTM's, less 1, in percent.

    None where the LSTM or all RANs are missing.
    """
    rows = tables[line.table]
    of = {model: chosen(rows, study=line.study, model=model) for model in MARKS}
    of["LSTM"] = chosen(rows, study=line.lstm or line.study, model="LSTM")
    figures = {model: [row["test_perplexity"] for row in seeds] for model, seeds in of.items()}
    lstm = figures.pop("LSTM")
    if not lstm or not any(figures.values()):
        return {}
    mean = sum(lstm) / len(lstm)
    return {model: [100 * (x / mean - 1) for x in of if x] for model, of in {"LSTM": lstm, **figures}.items() if of}


def draw_minutes(rows: list[dict[str, Any]], path: Path) -> None:
    """The test figure of every model's best setting against the minutes of its training, a panel for each study."""
    present = [name for name in STUDIES if any(row["study"] == name for row in rows)]
    figure = blank_figure(4.6 * min(len(present), 3), 3.4 * -(-len(present) // 3))
    for number, name in enumerate(present, 1):
        axes = figure.add_subplot(-(-len(present) // 3), min(len(present), 3), number)
        unit = BITS.get(STUDIES[name].config.dataset, "perplexity")
        key = "test_perplexity" if unit == "perplexity" else "test_bits"
        for number_of_model, model in enumerate(STUDIES[name].models):
            best = [row for row in chosen(rows, study=name, model=model) if row[key] is not None]
            minutes = [row["seconds"] / 60 for row in best]
            if best:
                style = f"{'os'[number_of_model // 10]}C{number_of_model % 10}"
                axes.plot(minutes, [value(row, key) for row in best], style, label=model)
        axes.set(title=name, xlabel="minutes of training", ylabel=f"test {unit}")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)


def main(options: OnPar, table: Table) -> None:
    """The study."""
    study = STUDIES[options.study]
    models = options.models or tuple(study.models)
    for model in models:
        if model not in study.models:
            raise UserError(f"--models must be of {', '.join(map(repr, study.models))}; got {model!r}.")
    if options.study == "enwik8" and options.data_dir is not None:
        table.data_dir = first_of_enwik8(options.data_dir, table.runs)
    for seed in seeds(options.seeds if study.grid else 1):
        for model in models:
            with without(model):
                config = settings(study, model)
                for name, values in study.grid.items():
                    best = table.best(config, name, values, {}, study=options.study, model=model)
                    config = replace(config, **{name: best})
                table.row(replace(config, seed=seed), study=options.study, model=model)
            draw(table)


if __name__ == "__main__":
    cli.start(lambda: run(main, OnPar, HERE), huge_pages=True)
