"""Where signatures state shapes, they are checked at run time; `x64` turns on float64."""

import os
import signal
import subprocess
import sys
import tempfile

# Signals are tested also where they are ignored: in the background of a shell, under nohup.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for a network
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "XLA_FLAGS" not in os.environ:  # devices for tests of meshes
    # Most of a test is compilation, so little is optimised; `.ci/run` has a subset that is.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    quicker = f"{flags} --xla_cpu_use_fusion_emitters=false"  # by a third; a flag that jaxlib does not know ends it
    trial = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quicker}  # no GPU is started for it
    ended = subprocess.run(trial, env=environment, capture_output=True, check=False)
    os.environ["XLA_FLAGS"] = flags if ended.returncode else quicker
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a program that several tests or processes run is compiled once
    cache = tempfile.TemporaryDirectory()
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": cache.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

from jaxtyping import install_import_hook

install_import_hook(
    [f"ranjax.{name}" for name in ("baselines", "cell", "layer", "lm", "scan", "sharding", "solvers")],
    "beartype.beartype",
)

from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))  # for `harness`

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")  # as some users have it

hypothesis.settings.register_profile(
    "ranjax",
    deadline=None,
    max_examples=15,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],  # `x64` is the same for every example
)
hypothesis.settings.load_profile("ranjax")


@pytest.fixture(autouse=True, scope="session")
def small_kernels():
    """Short chunks, of which short sequences have several, and few loads and lanes of the GPU kernel, whose
    interpretation compiles in less time then. Returns the shipped values."""
    from ranjax.kernels import gpu, reference

    small = [(reference, "CHUNK", 3)]
    if jax.default_backend() == "cpu":
        small += [(gpu, "LOADS", 4), (gpu, "LANES", 4)]
    shipped = [(module, name, getattr(module, name)) for module, name, _ in small]
    for module, name, value in small:
        setattr(module, name, value)
    return shipped


@pytest.fixture(autouse=True)
def shipped_kernels(request, small_kernels):
    """The shipped values again, for tests marked `shipped`."""
    if request.node.get_closest_marker("shipped") is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in small_kernels:
            patch.setattr(module, name, value)
        jax.clear_caches()
        yield
    jax.clear_caches()


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def patch(monkeypatch):
    """Replaces an attribute that is read while a function is traced: what was traced before is forgotten."""

    def replace(*args):
        jax.clear_caches()
        monkeypatch.setattr(*args)

    yield replace
    jax.clear_caches()


@pytest.fixture
def pets(tmp_path):
    """The settings of a run of seconds, on a text of its own."""
    from ranjax.training.config import Config

    (tmp_path / "pets.txt").write_text("the cat sat on the mat\nthe dog sat on the log\n" * 80)
    text = str(tmp_path / "pets.txt")
    return Config(dataset=text, features=(8,), layers=1, batch_size=4, steps=7, epochs=1, mesh="data=1")


@pytest.fixture(scope="session")
def pets_text(tmp_path_factory):
    """A text over 15 characters that all tests may read."""
    from small_runs import TEXT

    path = tmp_path_factory.mktemp("text") / "pets.txt"
    path.write_text(TEXT * 60)
    return path


@pytest.fixture(scope="session")
def pets_run(pets_text, tmp_path_factory):
    """A finished run on it that tests may read: its settings and its result."""
    from small_runs import settings

    from ranjax.training.run import train

    config = settings(pets_text, tmp_path_factory.mktemp("runs") / "pets", epochs=3, learning_rate=0.02)
    return config, train(config)


@pytest.fixture
def copied_run(pets_run, tmp_path):
    """The settings of a copy of it that a test may change."""
    import shutil
    from dataclasses import replace

    config = pets_run[0]
    shutil.copytree(config.directory, tmp_path / "copy")
    return replace(config, out=str(tmp_path / "copy"))


def data_dir() -> Path | None:
    """The real data sets: the folder RANJAX_DATA names, or shared/data beside the project."""
    places = [os.environ.get("RANJAX_DATA"), Path(__file__).resolve().parents[2] / "shared" / "data"]
    return next((Path(place) for place in places if place and Path(place).is_dir()), None)


@pytest.fixture
def real_data() -> Path:
    """Skips where the real data sets are not at hand."""
    found = data_dir()
    if found is None:
        pytest.skip("needs the real data sets: set RANJAX_DATA to the folder that holds wikitext-2/ and ptb/")
    return found
