"""What the trials of `robustness.py` share: a small run, programs in this process or their own, answers."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

PROGRAMS = "train", "evaluate", "generate", "explain"
END_SECONDS = 60.0  # by then a program that was stopped or refused has ended, on a busy machine too
WORDS = ["the", "cat", "dog", "mat", "log", "sat", "ran", "saw", "on", "by"]


class Outcome(NamedTuple):
    """One trial.

    Attributes:
      trial, kind: what was tried.
      failure: what kind of failure it was; None where the program held.
      example: of the failure, in few words.
    """

    trial: str
    kind: str
    failure: str | None = None
    example: str = ""


class Answer(NamedTuple):
    """What a program said; the code is None where it did not end."""

    code: int | None
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines of standard error, but for warnings."""
        return [line for line in self.err.splitlines() if line.strip() and not line.startswith("warning: ")]

    def __str__(self) -> str:
        return f"exit code {self.code}: {' / '.join(self.errors[-3:]):.300}"


def unclear(answer: Answer) -> str | None:
    """What is wrong with the end of a program, be it a success or a refusal: None if nothing is."""
    if answer.code is None:
        return "no end"
    if "Traceback" in answer.err:
        return "traceback"
    if answer.code < 0:
        return f"killed by {signal.Signals(-answer.code).name}"
    return None


def not_refused(answer: Answer, named: str = "") -> str | None:
    """What is wrong with a refusal, which has exit code 1 and one line (or the box of the parser of flags)."""
    if (wrong := unclear(answer)) is not None:
        return wrong
    if answer.code != 1:
        return "accepted" if answer.code == 0 else f"exit code {answer.code}"
    lines = answer.errors
    boxed = bool(lines) and lines[0].startswith("╭") and lines[-1].startswith("╰")
    if not boxed and not (len(lines) == 1 and lines[0].startswith("error: ")):
        return "not one line"
    return None if named in answer.err else f"another refusal: {named} is not named"


class _Late(BaseException):
    """A call has taken too long; no Exception, so that no program turns it into a message."""


@contextmanager
def limited(seconds: float = END_SECONDS) -> Iterator[None]:
    """Ends what takes longer."""

    def late(*_: Any) -> None:
        raise _Late(f"no end in {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def called(program: str, flags: Sequence[str]) -> Answer:
    """A program in this process, which spares its start."""
    (out, err), code = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="replace") for _ in range(2)), 0
    main = import_module(f"ranjax.{program}").main
    with redirect_stdout(out), redirect_stderr(err):
        try:
            with limited():
                main(list(flags))
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except _Late:
            code = None
        except BaseException:
            code = 1
            traceback.print_exc()
    if code is not None and code > 128:
        raise SystemExit(code)  # the signal was meant for this tool
    return Answer(code, *(_written(stream) for stream in (out, err)))


def _written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    stream.seek(0)
    return stream.read()


class Process:
    """A program in a process of its own; `before` are words before its command, `stdout` a file for what it prints."""

    def __init__(self, program: str, flags: Sequence[str], before: Sequence[str] = (), stdout: Any = subprocess.PIPE):
        command = [*before, sys.executable, "-m", f"ranjax.{program}", *flags]
        self.popen = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True, errors="replace"
        )

    @property
    def ended(self) -> bool:
        return self.popen.poll() is not None

    def wait_for(self, seconds: float) -> None:
        """Waits so long, or until it has ended."""
        end = time.monotonic() + seconds
        while not self.ended and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.01))

    def answer(self, seconds: float = END_SECONDS) -> Answer:
        """Waits for its end, and kills it if it takes longer."""
        try:
            out, err = self.popen.communicate(timeout=seconds)
            return Answer(self.popen.returncode, out or "", err)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            out, err = self.popen.communicate()
            return Answer(None, out or "", err)


@dataclass(frozen=True)
class Place:
    """A directory for trials: a text, runs on it, and one that was never interrupted.

    Attributes:
      directory: empty at first.
      epochs: of a run.
    """

    directory: Path
    epochs: int = 12

    def __post_init__(self):
        draw = random.Random(0)
        lines = (" ".join(draw.choices(WORDS, k=7)) for _ in range(400))
        self.text.write_text("\n".join(lines) + "\n")
        object.__setattr__(self, "_numbers", count())

    @property
    def text(self) -> Path:
        return self.directory / "text.txt"

    def new(self, parent: Path | None = None) -> Path:
        """A path where no run is; each has a parent of its own, which holds what a program leaves beside it."""
        parent = parent or self.directory / f"trial-{next(self._numbers)}"
        parent.mkdir(exist_ok=True)
        return parent / "run"

    def flags(self, run: Path, epochs: int | None = None) -> list[str]:
        """Of the training: its beginning or, where there is a run, its resumption."""
        if run.exists():
            return ["--out", str(run), "--resume", "--epochs", str(epochs or self.epochs)]
        sizes = ["--features", "8", "--layers", "1", "--batch-size", "8", "--steps", "10", "--learning-rate", "0.005"]
        return ["--dataset", str(self.text), "--out", str(run), "--epochs", str(epochs or self.epochs), *sizes]

    @cached_property
    def reference(self) -> "Reference":
        """The run that nothing interrupts, trained in a process of its own and looked at meanwhile."""
        run = self.new()
        process, began, first = Process("train", self.flags(run)), time.monotonic(), 0.0
        while not process.ended:
            first = first or (time.monotonic() - began if run.exists() else 0.0)
            time.sleep(0.01)
        seconds, answer = time.monotonic() - began, process.answer()
        if answer.code != 0 or answer.err:
            raise SystemExit(f"the uninterrupted training failed: {answer}")
        return Reference(run, first, seconds, final(run))


class Reference(NamedTuple):
    """The uninterrupted run: where, after how many seconds it had a directory and ended, and what came out."""

    run: Path
    first: float
    seconds: float
    final: dict[str, Any]


def final(run: Path) -> dict[str, Any]:
    """All that must be the same of two runs, bit for bit: states and perplexities, but no times."""
    from ranjax.training.model import load_run

    loaded = load_run(run)
    state = _state(run, loaded)._replace(seconds=0, timed=0)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((run / "result.json").read_text())
    return {
        "state": _digest(state),
        "best": _digest(loaded.params),
        "test_nats": result["test_nats"],
        "valid_perplexity": result["valid_perplexity"],
        "curves": (result["valid_perplexities"], result["train_perplexities"]),
        "rows": [(row["step"], row["valid_perplexity"]) for row in rows if "valid_perplexity" in row],
    }


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """What differs, by name; the empty text if nothing does."""
    return ", ".join(name for name in expected if found[name] != expected[name])


def _state(run: Path, loaded: Any) -> Any:
    """The training state that a run would resume from."""
    from ranjax.training.checkpoint import Checkpoints
    from ranjax.training.optimizer import make_optimizer
    from ranjax.training.step import initial_state

    like = initial_state(loaded.model, make_optimizer(loaded.config, 1), loaded.config)
    return Checkpoints(run).load("latest", like)


def _digest(tree: Any) -> str:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()


def finish(place: Place, run: Path) -> tuple[str, str] | None:
    """Trains an interrupted run to its end and compares it with the uninterrupted one.

    Returns:
      The kind of failure and an example; None if it ended bitwise the same. What has held is removed.
    """
    answer = Process("train", place.flags(run)).answer()
    if answer.code != 0:
        return "not resumed", f"{run}: {answer}"
    if differs := difference(final(run), place.reference.final):
        return "another result", f"{run}: {differs}"
    left = [path for path in run.parent.rglob(".*") if path.name != ".lock"]
    left += [path for path in run.parent.iterdir() if path != run and path not in left]
    if left:
        return "left behind", ", ".join(str(path.relative_to(run.parent)) for path in left)
    shutil.rmtree(run)
    return None


def without_privileges() -> list[str] | None:
    """Words before a command that make modes of directories count, for root too; None where there is no such way."""
    if os.geteuid() != 0:
        return []
    return ["setpriv", "--bounding-set=-all"] if shutil.which("setpriv") else None
