"""RAN beside LSTM, GRU and a plain RNN, by one code and one budget.

    python experiments/parity/run.py --study ptb-small --data-dir DIR --runs runs/parity

Trains the study's models one after another, in the order of worth (on a GPU or TPU the seeds of one side by side). Each
run goes on where it was cut off, and adds its row to results.jsonl when it is done; perplexity.png is drawn anew. A
tuned study first tries each model's settings on short runs (`GRID`; rows labelled "...-grid") and takes those of the
lowest validation perplexity.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from ranjax.config import PRESETS, Config
from ranjax.errors import UserError, exit_with_message
from ranjax.hugepages import restart_with_huge_pages
from ranjax.study import Options, Table, budget, rounds

HERE = Path(__file__).parent
MODELS = {
    "RAN": {},
    "RAN, input gates": {"gates": "input"},
    "LSTM": {"cell": "lstm"},
    "RAN, identity": {"activation": "identity"},
    "RAN, diagonal gates": {"gates": "diagonal"},
    "GRU": {"cell": "gru"},
    "S-RNN": {"cell": "rnn"},
}
SEEDS = {"RAN": 3, "RAN, input gates": 3, "LSTM": 3}  # of the others one
SMALL = replace(PRESETS["ptb-small"], epochs=8)
STUDIES = {
    "ptb-small": SMALL,
    "ptb-small-tuned": SMALL,
    "ptb-medium": PRESETS["ptb-medium"],
    "ptb-large": PRESETS["ptb-large"],
    "wikitext-2": Config(dataset="wikitext-2"),
    "text8": Config(dataset="text8", features=(256,), tie=False, dropout=0.0, epochs=1, steps=50, schedule="cosine"),
}
SHORT = {"epochs": 4, "decay_after": 2}
GRID = {"dropout": (0.1, 0.25, 0.4), "learning_rate": (0.5, 1.0, 2.0)}  # dropout at the study's rate, then the rate
IDENTITY_RATES = {"ptb-medium": 0.8, "ptb-large": 0.5}  # the authors' own for that activation
PUBLISHED = {  # Zaremba et al. 2014 (small); Levy et al. 2018, table 1 (medium, large)
    "ptb-small": {"LSTM": 114.5},
    "ptb-medium": {"LSTM": 83.9, "RAN": 81.6, "S-RNN": 140.9},
    "ptb-large": {"LSTM": 78.8, "RAN": 78.5, "S-RNN": 126.1},
}


@dataclass(frozen=True)
class Parity(Options):
    """Runs a study, or what is left of it."""

    study: str = "ptb-small"
    """One of ptb-small, ptb-small-tuned, ptb-medium, ptb-large, wikitext-2, text8."""
    models: tuple[str, ...] = tuple(MODELS)
    """Which models, in which order."""


def settings(study: str, model: str) -> Config:
    """The study's settings of a model."""
    config = replace(STUDIES[study], **MODELS[model])
    if model == "RAN, identity" and study in IDENTITY_RATES:
        config = replace(config, learning_rate=IDENTITY_RATES[study])
    return config


def tuned(table: Table, study: str, model: str) -> Config:
    """The settings that came out best of the model's short runs, one setting after the other."""
    config = settings(study, model)
    for name, values in GRID.items():
        tried = [replace(config, **{name: value}) for value in values]
        rows = [table.row(replace(c, **SHORT), study=f"{study}-grid", model=model) for c in tried]
        config = min(zip(rows, tried, strict=True), key=lambda pair: pair[0]["valid_perplexity"])[1]
    return config


def draw(rows: list[dict], path: Path) -> None:
    """Test perplexity of every run by study and model, beside the published figures."""
    from matplotlib.figure import Figure

    found = {study: [row for row in rows if row["study"] == study] for study in STUDIES}
    found = {study: rows for study, rows in found.items() if rows}
    figure = Figure(figsize=(4.5 * max(len(found), 1), 3.6), layout="constrained")
    for axes, (study, rows) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        models = [model for model in MODELS if any(row["model"] == model for row in rows)]
        dots = [(row["test_perplexity"], models.index(row["model"])) for row in rows]
        crosses = [(p, models.index(m)) for m, p in PUBLISHED.get(study, {}).items() if m in models]
        axes.plot(*zip(*dots, strict=True), "o", color="C0", label="measured, a dot for each seed")
        axes.plot(*zip(*crosses, strict=True) if crosses else ((), ()), "x", color="C3", label="published")
        axes.set(title=study, xlabel="test perplexity", yticks=range(len(models)), yticklabels=models)
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


def main(options: Parity) -> None:
    for name, value, known in (("study", [options.study], STUDIES), ("models", options.models, MODELS)):
        if set(value) - set(known):
            raise UserError(f"--{name} must be of {', '.join(map(repr, known))}; got {', '.join(value)}.")
    table = Table(HERE / "results.jsonl", options)
    with budget(options.minutes):
        tune = options.study.endswith("-tuned")
        configs = {m: tuned(table, options.study, m) if tune else settings(options.study, m) for m in options.models}
        for seeds in rounds(max(SEEDS.values())):
            for model, config in configs.items():
                seeds_of_model = [seed for seed in seeds if seed < SEEDS.get(model, 1)]
                table.rows_of_seeds(config, seeds_of_model, study=options.study, model=model)
                draw(table.rows, HERE / "perplexity.png")


if __name__ == "__main__":
    import tyro

    restart_with_huge_pages()
    with exit_with_message():
        main(tyro.cli(Parity))
