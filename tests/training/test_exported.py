"""Exported models: what is written is what is read, by ranjax, by JAX alone and by NumPy alone."""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import jax.export
import numpy as np
import pytest
from small_runs import TEXT, assert_same, exported_by_the_program, settings

import ranjax
from ranjax import evaluate, generate
from ranjax.errors import UserError
from ranjax.saved import read_json
from ranjax.training.arrays import by_name
from ranjax.training.config import save_config
from ranjax.training.exported import export
from ranjax.training.exported import flags as flags_of
from ranjax.training.flags import parse
from ranjax.training.model import load_run
from ranjax.training.run import train

READER = Path(__file__).parents[2] / "examples" / "numpy_reader.py"
KINDS = {
    "characters": {},
    "words": {"tokenizer": "word", "gates": "diagonal", "layers": 2, "tie": False},
    "blocks": {"gates": "input", "activation": "identity", "block": "residual", "layers": 2},
    "lstm blocks": {"cell": "lstm", "block": "residual"},
    "adaptive": {"tokenizer": "word", "softmax": "adaptive", "cutoffs": [3, 6], "expansion": 1.5},
}


@pytest.fixture(scope="module")
def exports(pets_text, tmp_path_factory):
    """Of each kind a run and its export."""
    exported = {}
    for kind, options in KINDS.items():
        config = settings(pets_text, tmp_path_factory.mktemp("runs") / "run", learning_rate=0.02, **options)
        train(config)
        exported[kind] = (
            config.directory,
            exported_by_the_program(config.directory, tmp_path_factory.mktemp("of") / "pets"),
        )
    return exported


@pytest.fixture
def copied(exports, tmp_path):
    """An exported model that a test may damage."""
    import shutil

    return Path(shutil.copytree(exports["characters"][1], tmp_path / "copy"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_bitwise_what_was_trained(kind, exports, capsys):
    directory, folder = exports[kind]
    run, loaded = load_run(directory), ranjax.load_model(folder)
    assert_same(loaded.params, run.params)
    assert loaded.model == run.model
    assert loaded.vocabulary == run.vocabulary
    said = []
    for place in (directory, folder):
        evaluate.main(["--checkpoint", str(place), "--dataset", str(run.config.dataset), "--split", "test"])
        generate.main(["--checkpoint", str(place), "--length", "9"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_the_text_of_an_export_is_found_where_it_is(exports, pets_text, capsys, monkeypatch):
    """Its config has the name of the file alone."""
    monkeypatch.chdir(pets_text.parent)
    evaluate.main(["--checkpoint", str(exports["characters"][1])])
    result = json.loads((exports["characters"][0] / "result.json").read_text())
    assert f"pets.txt test: perplexity {result['test_perplexity']:.2f}, " in capsys.readouterr().out


def test_nothing_of_this_machine_travels(exports, pets_text):
    for folder in (folder for _, folder in exports.values()):
        for path in folder.iterdir():
            assert str(pets_text.parent).encode() not in path.read_bytes(), path
            assert str(folder).encode() not in path.read_bytes(), path


def test_the_card_has_the_figures_and_its_code_runs(exports):
    directory, folder = exports["blocks"]
    result, card = json.loads((directory / "result.json").read_text()), (folder / "README.md").read_text()
    assert f"| test perplexity | {result['test_perplexity']:.2f} |" in card
    assert f"| parameters | {result['parameters']:,} |" in card
    command = re.search(r"python -m ranjax\.train (.*)", card)[1]
    assert parse([*shlex.split(command), "--dataset", load_run(directory).config.dataset]) == dataclasses.replace(
        load_run(directory).config, out=None, mesh=None
    )
    ours, alone = (part.split("```")[0] for part in card.split("```python\n")[1:])
    assert "ranjax" not in alone
    for code, place in ((ours, folder.parent), (alone, folder)):
        program = f"{code}\nprint(logits.shape[-1])"
        done = subprocess.run([sys.executable, "-c", program], cwd=place, capture_output=True, text=True, check=False)
        assert done.stdout == f"{len(load_run(directory).vocabulary)}\n", done.stderr


ALONE = """
import sys, numpy as np, jax.export, jax.numpy as jnp
from safetensors.numpy import load_file
weights = load_file("model.safetensors")
step, sequence = (jax.export.deserialize(open(f"{n}.stablehlo", "rb").read()) for n in ("step", "sequence"))
tokens = jnp.array(np.arange(14).reshape(2, 7) % 9)
state = [jnp.zeros((2, *a.shape[1:]), a.dtype) for a in sequence.in_tree.unflatten(sequence.in_avals)[0][1]]
whole, last = sequence.call(weights, state, tokens)
steps = []
for t in range(7):
    logits, state = step.call(weights, state, tokens[:, t])
    steps.append(logits)
np.testing.assert_allclose(jnp.stack(steps, 1), whole, rtol=0, atol=1e-5)
for a, b in zip(state, last): np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
assert not {name for name in sys.modules if name.split(".")[0] in ("ranjax", "flax")}
np.save(sys.argv[1], whole)
"""


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_functions_need_no_ranjax(kind, exports, tmp_path):
    run, folder = ranjax.load_model(exports[kind][1]), exports[kind][1]
    command = [sys.executable, "-c", ALONE, str(tmp_path / "logits.npy")]
    done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tokens = np.arange(14).reshape(2, 7) % 9
    expected, _ = run.model.apply({"params": run.params}, tokens, deterministic=True)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=0, atol=1e-5)


def test_the_functions_are_lowered_for_every_platform(exports):
    for name in ("step", "sequence"):
        function = jax.export.deserialize(bytearray((exports["blocks"][1] / f"{name}.stablehlo").read_bytes()))
        assert function.platforms == ("cpu", "cuda", "tpu")


def reader():
    spec = importlib.util.spec_from_file_location("numpy_reader", READER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("kind", "prompt"), [("characters", "the c"), ("words", "the cat\nthe"), ("blocks", "the ")])
def test_numpy_alone_writes_the_same_text(kind, prompt, exports, capsys):
    folder = exports[kind][1]
    generate.main(["--checkpoint", str(folder), "--prompt", prompt, "--temperature", "0", "--length", "60"])
    expected = capsys.readouterr().out.rstrip("\n")
    assert len(expected) > 100 if kind == "words" else len(expected) > 50
    assert reader().generate(folder, prompt, 60).rstrip("\n") == expected


def test_the_reader_needs_numpy_alone():
    lines = READER.read_text("utf-8").splitlines()
    imported = {line.split()[1] for line in lines if line.startswith(("import", "from"))}
    assert imported == {"json", "sys", "itertools", "pathlib", "numpy"}


@pytest.mark.parametrize(("kind", "prompt"), [("lstm blocks", "the"), ("adaptive", "the"), ("words", "no such word")])
def test_the_reader_refuses_what_it_cannot_read(kind, prompt, exports):
    with pytest.raises(SystemExit, match="for RANs with a full softmax over words or characters that the model has"):
        reader().generate(exports[kind][1], prompt, 3)


def test_nothing_is_overwritten_and_nothing_is_left(pets_run, tmp_path):
    directory = pets_run[0].directory
    (tmp_path / "there").write_text("mine")
    with pytest.raises(UserError, match=r"--out .*there exists and is left unchanged"):
        export(directory, tmp_path / "there")
    with pytest.raises(UserError, match=r"--out .* cannot be written: Not a directory"):
        export(directory, tmp_path / "there" / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "mine"


def test_an_unfinished_run_is_refused(copied_run, tmp_path):
    (copied_run.directory / "result.json").unlink()
    with pytest.raises(UserError, match=r"has no result\.json: export a run that is finished, or go on with it"):
        export(copied_run.directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_resumed_and_not_finished_is_refused(copied_run, tmp_path):
    config = load_run(copied_run.directory).config
    save_config(dataclasses.replace(config, epochs=9), copied_run.directory)
    with pytest.raises(UserError, match=r"was resumed and is not finished: its result\.json is older"):
        export(copied_run.directory, tmp_path / "out")


@pytest.mark.parametrize("flags", [[], ["--block", "plain"], ["--gates", "recurrent"], ["--cell", "lstm"]])
@pytest.mark.parametrize("dataset", ["python-docs", "wikitext-2", "markov"])
def test_the_flags_of_settings_are_read_as_these_settings(dataset, flags):
    config = parse(["--dataset", dataset, *flags, "--features", "9", "--expansion", "None", "--init-scale", "0.1"])
    assert parse(shlex.split(flags_of(config))) == config


def header_of(length):
    return lambda path: path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


def with_header(change):
    """Changes the JSON of a safetensors file."""

    def damage(path):
        data = path.read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[begin:])

    return damage


def renamed(header):
    header["../bias"] = header.pop("bias")


def reshaped(header):
    header["bias"]["shape"] = [*header["bias"]["shape"], 1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "is damaged: "),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "is damaged: "),
        (lambda path: path.write_bytes(b""), "is damaged: "),
        (header_of(2**62), "is damaged: "),
        (header_of(10**7), "is damaged: "),
        (with_header(lambda header: header["bias"].update(data_offsets=[0, 2**40])), "is damaged: "),
        (with_header(lambda header: header["bias"].update(dtype="I32")), "'bias' must be float32 .*; got I32 "),
        (with_header(renamed), r"'\.\./bias' must be left out; got float32 of the shape"),
        (with_header(reshaped), "'bias' must be float32 of the shape"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read: "),
    ],
)
def test_weights_that_are_damaged_or_do_not_fit_are_one_message(damage, message, copied):
    damage(copied / "model.safetensors")
    with pytest.raises(UserError, match=message):
        ranjax.load_model(copied)


def changed_config(**settings):
    """Changes settings and gives the file a checksum that fits, as somebody could."""

    def change(folder):
        from ranjax.saved import write_sealed

        saved = read_json(folder / "config.json", {})
        saved.pop("sha256")
        write_sealed(folder / "config.json", saved | settings)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_config(run_this="import os"), "has settings this version does not know: 'run_this'"),
        (changed_config(features="8"), "is damaged: --features must be one or more whole numbers"),
        (changed_config(features=[9]), r"model\.safetensors does not fit its config\.json: "),
        (changed_config(gates=["input"]), "is damaged: --gates must be one of"),
        (changed_config(dropout="0.1"), "is damaged: --dropout must be"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is damaged: it must hold an object"),
        (lambda folder: (folder / "config.json").unlink(), "is not a run: it has no config.json"),
        (lambda folder: (folder / "vocabulary.json").write_text("{}"), "vocabulary.json is damaged"),
    ],
)
def test_settings_that_do_not_fit_are_one_message(change, message, copied):
    change(copied)
    before = sorted(path.name for path in copied.iterdir())
    with pytest.raises(UserError, match=message):
        ranjax.load_model(copied)
    assert sorted(path.name for path in copied.iterdir()) == before


def test_a_vocabulary_of_another_size_does_not_fit(copied):
    from ranjax.data.vocabulary import Characters, save_vocabulary

    save_vocabulary(Characters.build(TEXT + "XYZ"), copied / "vocabulary.json")
    with pytest.raises(UserError, match=r"does not fit its config\.json: 'bias' must be float32"):
        ranjax.load_model(copied)


def test_a_package_that_is_not_installed_is_named_with_its_command(copied, monkeypatch):
    for name in ("safetensors", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, name, None)
    for source, name in ((copied, "safetensors"), ("owner/name", "huggingface_hub")):
        with pytest.raises(ModuleNotFoundError, match=rf"{name} is not installed\. .* pip install 'ranjax\[export\]'"):
            ranjax.load_model(source)


def test_a_revision_is_of_the_hub(copied):
    with pytest.raises(UserError, match="`revision` is for a model on the hub; got 'main' with the folder"):
        ranjax.load_model(copied, revision="main")


def test_names_of_the_weights_are_those_of_the_tree(exports):
    from safetensors.numpy import load_file

    directory, folder = exports["blocks"]
    params, weights = by_name(load_run(directory).params), load_file(folder / "model.safetensors")
    assert "stack_1.cell.gates.kernel" in weights
    assert_same(weights, {name: np.asarray(leaf) for name, leaf in params.items()})
