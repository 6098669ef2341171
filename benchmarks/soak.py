"""A long training that is killed again and again: `python benchmarks/soak.py` prints what came of it.

The program trains on two devices with `--resume auto` and is killed (SIGKILL) at random moments, some of them while it
saves; the same command then starts it again. Its end is compared, array by array and bit for bit, with that of the same
training left alone, and its memory at the end of the training with that at its beginning.
"""

import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import psutil

from ranjax import cli

SENTENCES = ["the cat sat on the mat\n", "the dog sat on the log\n", "the cat saw the dog\n", "a bird sang\n"]
OWN = "seconds", "timed"  # of a training state: its own clock


@dataclasses.dataclass(frozen=True)
class Options:
    """A long training that is killed again and again.

    Attributes:
      steps: of training, at least.
      kills: how many.
      devices: that it trains on; on a CPU they are simulated.
      seed: of the moments and of the text.
      out: file of the result.
    """

    steps: int = 20_000
    kills: int = 20
    devices: int = 2
    seed: int = 0
    out: Path = Path(__file__).parent / "results" / "soak.json"


class Training:
    """The program in a process of its own, each time the same command."""

    def __init__(self, text: Path, out: Path, epochs: int, devices: int):
        flags = f"--features 16 --layers 2 --batch-size 8 --steps 10 --epochs {epochs} --mesh data={devices}"
        self._command = [sys.executable, "-m", "ranjax.train", "--dataset", str(text), "--out", str(out)]
        self._command += [*flags.split(), "--resume", "auto"]
        self._environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        self.memory: list[int] = []

    def run(self, seconds: float | None = None) -> bool:
        """Trains until it ends or is killed after so many seconds; whether it has ended."""
        process = subprocess.Popen(self._command, env=self._environment, stdout=subprocess.DEVNULL)
        end = None if seconds is None else time.monotonic() + seconds
        while process.poll() is None:
            if end is not None and time.monotonic() > end:
                process.kill()
                process.wait()
                return False
            self.memory.append(psutil.Process(process.pid).memory_info().rss)
            time.sleep(0.2)
        if process.returncode:
            raise RuntimeError(f"the training ended with exit code {process.returncode}")
        return True


def saved(run: Path) -> dict[str, np.ndarray]:
    """The arrays of the latest state and of the best parameters, by the names of their files."""
    found = {}
    for kind in ("latest", "best"):
        newest = max((run / "checkpoints" / kind).iterdir(), key=lambda path: int(path.name))
        found |= {f"{kind} {path.name}": np.load(path) for path in sorted(newest.glob("*.npy"))}
    return {name: array for name, array in found.items() if not any(f"-{own}." in name for own in OWN)}


def main(options: Options) -> None:
    """Both trainings, one after the other."""
    chosen, folder = random.Random(options.seed), Path(tempfile.mkdtemp())
    text = folder / "text.txt"
    text.write_text("".join(chosen.choices(SENTENCES, k=500)))
    epochs = options.steps // (len(text.read_text()) * 8 // 10 // 80) + 1
    alone, killed = (Training(text, folder / name, epochs, options.devices) for name in ("alone", "killed"))
    began = time.monotonic()
    alone.run()
    whole = time.monotonic() - began
    kills = 0
    while kills < options.kills and not killed.run(chosen.uniform(0.2, 2 * whole / options.kills + 6)):
        kills += 1
    killed.run()
    expected, found = saved(folder / "alone"), saved(folder / "killed")
    differ = [name for name in expected if not np.array_equal(expected[name], found.get(name))]
    n = len(alone.memory)
    rss = [float(np.median(alone.memory[begin:end])) / 1e6 for begin, end in ((n // 4, n // 2), (-n // 4, n))]
    [step] = [int(array) for name, array in found.items() if name.startswith("latest") and "-step." in name]
    rows = {"steps": step, "kills": kills, "devices": options.devices, "arrays": len(expected), "differ": differ}
    rows |= {"rss_mb": rss, "seconds_alone": whole, "date": date.today().isoformat()}
    print(json.dumps(rows, indent=1))
    options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(cli.options(Options, None, "python benchmarks/soak.py"))
