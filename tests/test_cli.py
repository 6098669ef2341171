"""How programs start, stop and end; files written whole."""

import ast
import contextlib
import dataclasses
import gc
import importlib
import inspect
import io
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading

import jax.numpy as jnp
import pytest
from small_runs import files_of_at_most, with_startup_code

from ranjax import cli, generate
from ranjax.cli import Stop, Stopped, exit_with_message, stopping
from ranjax.errors import UserError, flag

PROGRAMS = ("train", "evaluate", "generate", "explain")


@contextlib.contextmanager
def running(code):
    """A Python process, once it has written a line. Begun in the background it would ignore Ctrl-C."""
    interruptible = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    with subprocess.Popen([sys.executable, "-c", interruptible + code], env=buffered, **pipes) as process:
        try:
            assert process.stdout.readline() == b"first\n"
            yield process
        finally:
            process.kill()  # where a test has failed


def waiting(body="pass"):
    """A program that writes a line and waits for the end of its input; then it does `body`."""
    return running(
        "import itertools, sys\nfrom ranjax.cli import exit_with_message\n"
        f"with exit_with_message():\n    print('first', flush=True)\n    sys.stdin.read()\n    {body}\n"
    )


def assert_exits(error, code, capsys, message):
    with pytest.raises(SystemExit) as ended, exit_with_message():
        raise error
    assert ended.value.code == code
    assert re.fullmatch(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("no such run"), 1, "error: no such run\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x.txt"),
            1,
            r"error: x\.txt cannot be read or written: No such file or directory\.\n",
        ),
        (
            OSError("of a library"),
            1,
            r"error: what the program reads, or prints .* cannot be read or written: of a library\.\n",
        ),
        (SystemExit(2), 1, ""),  # a wrong flag, which has its message
        (SystemExit(143), 143, ""),
        (KeyboardInterrupt(), 130, ""),
        (
            ModuleNotFoundError("No module named 'tyro'", name="tyro"),
            1,
            r"error: tyro is not installed, .* Install it: pip install 'ranjax\[train\]'\n",
        ),
    ],
)
def test_an_error_that_a_user_can_mend_is_one_message(error, code, message, capsys):
    assert_exits(error, code, capsys, message)


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), RuntimeError("of a bug"), ModuleNotFoundError("No module named 'ranjax.x'", name="ranjax.x")],
)
def test_an_error_of_ours_keeps_its_traceback(error):
    with pytest.raises(type(error)) as ended, exit_with_message():
        raise error
    assert ended.value is error


def test_an_array_too_large_for_the_memory_is_one_message(capsys):
    with pytest.raises(SystemExit) as ended, exit_with_message():
        jnp.zeros((2**20, 2**30), jnp.int8)
    assert ended.value.code == 1
    assert re.match("error: .*memory.* Take less: in training by --features, ", capsys.readouterr().err)


@pytest.mark.parametrize("lines", ["itertools.count()", "range(5)"])  # while it writes, and at its end
def test_a_program_whose_output_is_closed_ends_without_a_word(lines):
    """As by `| head`."""
    with waiting(f"for line in {lines}: print(line)") as process:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_a_character_that_a_terminal_cannot_show_is_written_as_its_code(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with exit_with_message():
        print("caf\u00e9")
    assert written.getvalue() == b"caf\\xe9\n"


def test_ctrl_c_ends_a_main_function_called_from_python_with_130():
    with waiting() as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b""
        assert process.wait() == 130


STARTED = """
import time
from ranjax import cli

def main():
    with cli.exit_with_message():
        print("first", flush=True)
        {body}

cli.start(main)
"""
STOPPING = """
        with cli.stopping() as stop:
            print("listening", flush=True)
            while stop.signal is None:
                time.sleep(0.001)
            print(stop.signal, flush=True)
            time.sleep(600)
"""


def test_ctrl_c_kills_a_started_program_without_a_word():
    with running(STARTED.format(body="time.sleep(600)")) as process:
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == (b"", b"")
        assert process.returncode == -signal.SIGINT  # 130 in a shell


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_a_program_to_stop_and_the_second_kills_it(number):
    with running(STARTED.format(body=STOPPING)) as process:
        assert process.stdout.readline() == b"listening\n"
        process.send_signal(number)
        assert process.stdout.readline() == f"{int(number)}\n".encode()
        process.send_signal(number)
        assert process.communicate(timeout=60) == (b"", b"")
        assert process.returncode == -number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_a_flag_once(number):
    own = []
    before = signal.signal(number, lambda *_: own.append("the caller's own"))
    handler = signal.getsignal(number)
    try:
        with stopping() as stop:
            stop.check()
            signal.raise_signal(number)
            assert (stop.signal, own) == (number, [])
            signal.raise_signal(number)
            assert (stop.signal, own) == (number, ["the caller's own"])
            with pytest.raises(Stopped) as ended:
                stop.check()
            assert ended.value.code == 128 + number
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)


class Dying:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("where", ["a callback", "a __del__"])
def test_a_signal_is_kept_where_an_exception_would_be_lost(where):
    def collected(*_):
        gc.callbacks.remove(collected)
        signal.raise_signal(signal.SIGINT)

    with stopping() as stop:
        if where == "a __del__":
            Dying()
        else:
            gc.callbacks.append(collected)
            gc.collect()
        assert stop.signal == signal.SIGINT


def test_an_ignored_signal_stays_ignored():
    """As for a job in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.signal is None
        cli.start(lambda: signal.raise_signal(signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_has_no_signals_to_listen_for():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def listen():
        with stopping() as stop:
            seen.append((stop.signal, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def test_a_stop_is_asked_for_by_the_time_too():
    assert Stop(minutes=1).signal is None
    assert Stop(minutes=0).signal == signal.SIGTERM
    stop = Stop(minutes=0)
    stop.ask(signal.SIGINT)
    assert stop.signal == signal.SIGINT
    with stopping(minutes=0) as stop, pytest.raises(Stopped, match="143"):
        stop.check()


SCRIPT = """
import os, sys
from ranjax import cli
print(os.getpid(), flush=True)
cli.start(lambda: print(repr(os.environ.get("GLIBC_TUNABLES")), sys.argv[1:]), huge_pages=True)
"""


@pytest.mark.parametrize(
    ("command", "setting", "restarts"),
    [
        (["script.py"], None, True),
        (["-m", "script"], None, True),
        (["-X", "utf8", "-m", "script"], None, True),
        (["script.py"], "", False),
        (["-m", "script"], "glibc.malloc.check=1", False),
        (["-c", SCRIPT], None, False),
        (["-c", "import runpy; runpy.run_path('script.py', run_name='__main__')"], None, False),
        (["caller.py"], None, False),
        (["other.py", "run", "-m", "script"], None, False),
        (["-"], None, False),
    ],
)
def test_a_program_restarts_once_with_huge_pages(command, setting, restarts, tmp_path):
    """On Linux, where nothing is set and the process is its own."""
    (tmp_path / "script.py").write_text(SCRIPT)
    calls = "import runpy, sys\nrunpy.run_path('script.py', run_name='__main__')"
    (tmp_path / "caller.py").write_text(calls)  # with flags of its own
    (tmp_path / "other.py").write_text(  # as coverage and debuggers do
        "import runpy, sys\nsys.path.insert(0, '.')\nsys.argv[1:4] = []\n"
        "runpy.run_module('script', run_name='__main__', alter_sys=True)"
    )
    restarts = restarts and sys.platform == "linux"
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {} if setting is None else {"GLIBC_TUNABLES": setting}
    command = [sys.executable, *command, "a b"]
    given = {"input": calls} if "-" in command else {}
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True, **given)
    *numbers, last = ended.stdout.splitlines()
    assert (len(numbers), len(set(numbers))) == (2 if restarts else 1, 1)  # it keeps its process number
    assert last == f"{(cli.TUNABLES if restarts else setting)!r} ['a b']"


@pytest.mark.parametrize("where", ["the imports", "the restart"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_while_a_program_starts_ends_it_without_a_word(program, where, tmp_path):
    """In the first import of the programs; where Python itself starts for the second time."""
    interrupt = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    startup = "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    if where == "the imports":
        (tmp_path / "json.py").write_text(interrupt)
    elif program == "generate" or sys.platform != "linux":
        pytest.skip("it does not restart")
    else:
        startup += "if 'GLIBC_TUNABLES' in os.environ: os.kill(os.getpid(), signal.SIGINT)\n"
    environment = with_startup_code(tmp_path, startup)
    environment.pop("GLIBC_TUNABLES", None)
    command = [sys.executable, "-m", f"ranjax.{program}", "--help"]
    ended = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, b"", b"")


def test_importing_the_library_leaves_ctrl_c_alone():
    code = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nimport ranjax, ranjax.cli\n"
    code += "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"True\n"


def test_control_characters_of_a_message_are_codes(capsys):
    assert_exits(UserError("no \x1b[2J token\r\n\udce9 é"), 1, capsys, r"error: no \\x1b\[2J token\\r\\n\\udce9 é\n")


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_has_every_flag_and_waits_for_no_large_import(program):
    kind = ("ranjax.training.flags", "Flags") if program == "train" else (f"ranjax.{program}", "Options")
    options = getattr(importlib.import_module(kind[0]), kind[1])
    code = f"import sys, ranjax.{program} as program\n"
    code += "try: program.main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    wide = os.environ | {"COLUMNS": "200"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=wide)
    said, loaded = ended.stdout.rstrip("\n").rsplit("\n", 1)
    assert all(flag(field.name) in said for field in dataclasses.fields(options))
    description, _ = said.split("\n\n", 1)[1].split("\n\n", 1)  # which tyro does not wrap
    assert 20 < len(description) <= 60
    assert "tyro" in loaded.split()
    assert not {"jax", "flax", "datasets", "matplotlib", "tokenizers"} & set(loaded.split())


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_of_a_flag_is_one_paragraph(program):
    """A docstring of two lines would keep its break, whatever the width of the terminal is."""
    kind = ("ranjax.training.flags", "Flags") if program == "train" else (f"ranjax.{program}", "Options")
    for one in getattr(importlib.import_module(kind[0]), kind[1]).__mro__[:-1]:
        body = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0].body
        texts = [node.value.value for node in body[1:] if isinstance(node, ast.Expr)]
        assert texts or one.__name__ == "Flags"
        assert not [text for text in texts if "\n" in text]


@pytest.mark.parametrize("columns", ["1", "0", "-5", "x", "100000"])
def test_flags_are_read_and_described_at_any_width(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    for flags, code in (["--help"], 0), (["--nonsense"], 1):
        with pytest.raises(SystemExit, match=str(code)):
            generate.main(flags)
    assert "nonsense" in capsys.readouterr().err
    assert os.environ["COLUMNS"] == columns


def test_importing_the_library_loads_no_programs():
    code = "import ranjax, sys; ranjax.RAN, ranjax.RANCell, ranjax.linear_recurrence; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"datasets", "tyro", "tokenizers", "matplotlib", "optax"} & set(loaded)


def test_lazy_names_are_imported_when_first_asked_for():
    find = cli.lazy("here", {"TUNABLES": "ranjax.cli"})
    assert find("TUNABLES") is cli.TUNABLES
    with pytest.raises(AttributeError, match="module 'here' has no attribute 'EXTRA'"):
        find("EXTRA")


def test_a_flag_that_is_not_utf8_is_refused():
    cli.check_utf8("--prompt", "caf\u00e9 \U0001f600")
    with pytest.raises(UserError, match=r"--prompt is not UTF-8 text; got 'caf\\udce9'"):
        cli.check_utf8("--prompt", "caf\udce9")


@pytest.mark.parametrize("content", ["caf\u00e9\n", b"\x00\xff"])
def test_a_file_is_written_all_or_not_at_all(content, tmp_path):
    path = tmp_path / "a.txt"
    cli.write_whole(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    with files_of_at_most(10), pytest.raises(OSError, match="File too large"):
        cli.write_whole(path, 100 * content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [path]


def test_a_refusal_of_the_system_says_how_to_go_on(tmp_path):
    path = tmp_path / "file" / "x"
    (tmp_path / "file").write_text("where a directory should be")
    message = rf"{path} cannot be written: Not a directory\. What was saved before is intact: try again once that is"
    with pytest.raises(UserError, match=message), cli.refusals(path, "try again"):
        cli.write_whole(path, "")
