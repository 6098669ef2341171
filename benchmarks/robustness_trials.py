"""The trials of `robustness.py`: programs killed at random moments, damaged files, refused writes."""

import math
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from robustness_runs import (
    END_SECONDS,
    Answer,
    Outcome,
    Place,
    Process,
    called,
    difference,
    final,
    finish,
    not_refused,
    unclear,
    without_privileges,
)

TWICE = "SIGINT twice"
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, TWICE: signal.SIGINT}
MOMENTS = "any", "training", "save"
KILLS_OF_A_RUN = 3

RECORDS = "curves", "rows", "valid_perplexity"  # of the end of a run: what comes from its metrics

# Kinds of files of a run, by pattern; one that fits two is of the first.
FILES = {
    "arrays of checkpoints": "checkpoints/*/*/*.npy",
    "checksums of checkpoints": "checkpoints/*/*/sha256.json",
    "config.json": "config.json",
    "vocabulary.json": "vocabulary.json",
    "text.json": "text.json",
    "environment.json": "environment.json",
    "metrics.jsonl": "metrics.jsonl",
    "result.json": "result.json",
}


def kills(place: Place, number: int, seed: int, jobs: int = 2) -> Iterator[Outcome]:
    """Trainings killed at random moments, each a few times, and resumed to the end: at least `number` kills."""
    assert place.reference  # trained before others run beside it
    done, chain = 0, 0
    with ThreadPoolExecutor(jobs) as pool:
        while done < number:
            draws = [random.Random(f"{seed} kill {chain + n}") for n in range(jobs)]
            each = min(KILLS_OF_A_RUN, -(-(number - done) // jobs))
            for outcomes in pool.map(lambda draw, each=each: _killed_run(place, draw, each), draws):
                yield from outcomes
                done += len(outcomes) - 1
            chain += jobs


def _killed_run(place: Place, draw: random.Random, number: int) -> list[Outcome]:
    """One training, killed so often or until it ends first, and its resumption."""
    run, outcomes = place.new(), []
    for _ in range(number):
        how, moment = draw.choice(list(SIGNALS)), draw.choice(MOMENTS)
        process = Process("train", place.flags(run))
        if not _at(place, process, run, moment, draw):
            process.answer()
            break
        answer = _killed(process, how, draw)
        outcomes.append(Outcome("kills", f"{how}, {moment}", _wrong_end(answer, how), f"{run}: {answer}"))
    failure, example = finish(place, run) or (None, "")
    return [*outcomes, Outcome("runs of these kills", "resumed to the end", failure, example)]


def _at(place: Place, process: Process, run: Path, moment: str, draw: random.Random) -> bool:
    """Waits for a moment: any, one after the run's directory is there, or one during a save. False: it ended before."""
    earliest = 0.0 if moment == "any" else place.reference.first
    process.wait_for(draw.uniform(earliest, place.reference.seconds))
    while moment == "save" and not process.ended and not any(run.parent.glob("*/checkpoints/*/.*")):
        time.sleep(0.001)
    if moment == "save":
        time.sleep(draw.uniform(0, 0.02))
    return not process.ended


def _killed(process: Process, how: str, draw: random.Random) -> Answer:
    process.popen.send_signal(SIGNALS[how])
    if how == TWICE:
        time.sleep(draw.uniform(0, 0.3))
        process.popen.send_signal(SIGNALS[how])
    return process.answer()


def _wrong_end(answer: Answer, how: str) -> str | None:
    """What is wrong with the end of a program after a signal; it may have come to its own end just before."""
    number = SIGNALS[how]
    if answer.code in (0, -number, 128 + number):
        return "traceback" if "Traceback" in answer.err else "words on standard error" if answer.errors else None
    return unclear(answer) or f"exit code {answer.code}"


def flips(place: Place, number: int, seed: int, programs: int = 4) -> Iterator[Outcome]:
    """Random bits flipped in the files of a run, then evaluated and resumed for one more epoch.

    The answer is the right one or a refusal. A few are evaluated by a program in a process of its own.
    """
    draw, run = random.Random(f"{seed} flip"), place.reference.run
    copy = _copied(run, place.new())
    expected = called("evaluate", ["--checkpoint", str(copy)]), _resumed(place, copy)
    for n in range(number):
        _copied(run, copy)
        kind = list(FILES)[n % len(FILES)]
        path = draw.choice(_files(copy, kind))
        what = _flip(path, draw)
        evaluate = called if n >= programs else lambda *command: Process(*command).answer()
        wrong = _wrong_result(place, copy, evaluate, expected, resume=n % 4 == 0)
        failure, example = wrong or (None, "")
        yield Outcome("flipped bits", kind, failure, f"{path.relative_to(copy)}, {what}: {example}")


def _copied(run: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return shutil.copytree(run, to)


def _files(run: Path, kind: str) -> list[Path]:
    """The files of a kind that are not empty."""
    seen: set[Path] = set()
    for name, pattern in FILES.items():
        found = {path for path in run.glob(pattern) if path.is_file() and path.stat().st_size} - seen
        if name == kind:
            return sorted(found)
        seen |= found
    raise KeyError(kind)


def _flip(path: Path, draw: random.Random) -> str:
    content = bytearray(path.read_bytes())
    at, bit = draw.randrange(len(content)), draw.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"byte {at} bit {bit}"


def _wrong_result(
    place: Place, run: Path, evaluate: Callable[..., Answer], expected: tuple[Answer, tuple], resume: bool
) -> tuple[str, str] | None:
    """The kind of failure of a run whose files are damaged, and an example; None if it held.

    A run that is not evaluated is resumed only if `resume`: most of those are refused for the same reason.
    """
    answer = evaluate("evaluate", ["--checkpoint", str(run)])
    if answer.code == 0 and answer.out != expected[0].out:
        return "another perplexity", f"{answer.out.strip()} for {expected[0].out.strip()}"
    if answer.code != 0 and (wrong := not_refused(answer)) is not None:
        return f"evaluation: {wrong}", str(answer)
    if answer.code != 0 and not resume:
        return None
    answer, found = _resumed(place, run)
    if found is not None and (differs := difference(found, expected[1][1])):
        lost = _has_lost_rows(found, expected[1][1]) and " is left out: " in answer.err
        return None if lost else ("resumed with another result", differs)
    if found is None and (wrong := not_refused(answer)) is not None:
        return f"resumption: {wrong}", str(answer)
    return None


def _has_lost_rows(found: dict, expected: dict) -> bool:
    """Whether rows of metrics are all that is missing; the best validation is then that of the state, in float32."""
    same = difference({**found, **{name: expected[name] for name in RECORDS}}, expected) == ""
    close = math.isclose(found["valid_perplexity"], expected["valid_perplexity"], rel_tol=1e-5)
    return same and close and set(found["rows"]) < set(expected["rows"])


def _resumed(place: Place, run: Path) -> tuple[Answer, dict | None]:
    """A run trained for one more epoch, and what came out."""
    answer = called("train", place.flags(run, place.epochs + 1))
    return answer, final(run) if answer.code == 0 else None


def writes(place: Place, number: int, seed: int) -> Iterator[Outcome]:
    """Writes that the system refuses, in the ways that this system allows to try, one after another."""
    ways: dict[str, Callable[[Place, random.Random], tuple[str, str] | None]] = {"limit of file sizes": _limited_files}
    if without_privileges() is not None:
        ways["read-only directory"] = _read_only
    if os.geteuid() == 0 and _can_mount(place.directory):
        ways["full disk"] = _full_disk
    ways |= {"page on a full disk": _page, "standard output on a full disk": _full_output}
    done, tries = 0, count()
    while done < number:
        kind, draw = list(ways)[done % len(ways)], random.Random(f"{seed} write {next(tries)}")
        with suppress(_NotRefusedError):
            failure, example = ways[kind](place, draw) or (None, "")
            yield Outcome("refused writes", kind, failure, example)
            done += 1


class _NotRefusedError(Exception):
    """The program needed nothing of what would have been refused: that is no trial."""


def _limited_files(place: Place, draw: random.Random) -> tuple[str, str] | None:
    """From a random moment on no file may be larger than a random size."""
    run = place.new()
    process, size = Process("train", place.flags(run)), draw.randrange(4000)
    process.wait_for(draw.uniform(0, 0.9 * place.reference.seconds))
    if not process.ended:
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (size, size))
    return _refused_then_finished(place, run, process.answer(place.reference.seconds + END_SECONDS))


def _read_only(place: Place, draw: random.Random) -> tuple[str, str] | None:
    """From a random moment on one of the run's directories may not be written to."""
    run = place.new()
    process = Process("train", place.flags(run), before=without_privileges() or ())
    process.wait_for(draw.uniform(0, 0.9 * place.reference.seconds))
    folder = draw.choice([path for path in (run, run / "checkpoints", run.parent) if path.exists()])
    folder.chmod(0o555)
    answer = process.answer(place.reference.seconds + END_SECONDS)
    folder.chmod(0o755)
    return _refused_then_finished(place, run, answer)


def _full_disk(place: Place, draw: random.Random) -> tuple[str, str] | None:
    """A file system of a random size, which is enlarged afterwards."""
    with _mounted(place.new().parent, draw.randrange(20, 400)) as disk:
        run = place.new(disk)
        answer = Process("train", place.flags(run)).answer(place.reference.seconds + END_SECONDS)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        return _refused_then_finished(place, run, answer)


def _can_mount(directory: Path) -> bool:
    try:
        with _mounted(directory / "mounted", 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def _mounted(disk: Path, kilobytes: int) -> Iterator[Path]:
    disk.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _refused_then_finished(place: Place, run: Path, answer: Answer) -> tuple[str, str] | None:
    """Whether a training said in one line what was refused, and goes on afterwards."""
    if answer.code == 0:
        raise _NotRefusedError
    wrong = not_refused(answer)
    return (wrong, f"{run}: {answer}") if wrong is not None else finish(place, run)


def _page(place: Place, draw: random.Random) -> tuple[str, str] | None:
    """A page or a figure that does not fit is refused, and what stood there stays."""
    page = place.new().with_name(f"page{draw.choice(['.html', '.png'])}")
    page.write_text("as it was")
    process = Process(
        "explain", ["--checkpoint", str(place.reference.run), "--text", "the cat sat", "--out", str(page)]
    )
    size = draw.randrange(3000)
    resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (size, size))
    answer = process.answer()
    if (wrong := not_refused(answer, "--out")) is not None:
        return wrong, str(answer)
    changed = page.read_text() != "as it was" or [*page.parent.iterdir()] != [page]
    return ("half a page", f"{page}: {answer}") if changed else None


def _full_output(place: Place, draw: random.Random) -> tuple[str, str] | None:
    """A program whose answer cannot be written says so."""
    program, *more = draw.choice([["evaluate"], ["generate"], ["explain", "--text", "the cat sat"]])
    with open("/dev/full", "w") as full:
        answer = Process(program, ["--checkpoint", str(place.reference.run), *more], stdout=full).answer()
    wrong = not_refused(answer)
    return None if wrong is None else (wrong, f"{program}: {answer}")
