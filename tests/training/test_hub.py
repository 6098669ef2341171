"""Models on the hub, which is a local server here."""

import base64
import json
import os
import subprocess
import sys

import pytest
from serving import serving
from small_runs import exported_by_the_program

import ranjax
from ranjax.errors import UserError
from ranjax.training import hub
from ranjax.training.model import FILES

COMMIT = "a" * 40


@pytest.fixture(scope="module")
def folder(pets_run, tmp_path_factory):
    return exported_by_the_program(pets_run[0].directory, tmp_path_factory.mktemp("exports") / "pets")


def hub_of(files, committed=None):
    """An answer to every request: the hub with one model, `owner/pets`, of these files."""

    def answer(request):
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        headers, found, path = {}, b"{}", request.path.split("?")[0]
        if "/resolve/" in path:
            found = files[path.split(f"/resolve/{COMMIT}/")[1]]
            headers = {"ETag": f'"{len(found)}"', "X-Repo-Commit": COMMIT}
        elif "/tree/" in path:
            listed = [{"type": "file", "path": name, "size": len(files[name]), "oid": COMMIT} for name in files]
            found = json.dumps(listed).encode()
        elif "/revision/" in path:
            siblings = [{"rfilename": name} for name in files]
            found = json.dumps({"id": "owner/pets", "sha": COMMIT, "siblings": siblings}).encode()
        elif path.endswith("/repos/create"):
            found = json.dumps({"url": f"http://{request.headers['Host']}/owner/pets", "name": "owner/pets"}).encode()
        elif "/preupload/" in path:
            asked = [one["path"] for one in json.loads(body)["files"]]
            regular = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in asked]
            found = json.dumps({"files": regular}).encode()
        elif "/commit/" in path:
            committed.extend(json.loads(line) for line in body.splitlines())
            url = f"http://{request.headers['Host']}/owner/pets/commit/{COMMIT}"
            found = json.dumps({"commitUrl": url, "commitOid": COMMIT}).encode()
        request.send_response(200)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(found)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(found)

    return answer


def of_its_own(port, home, *arguments):
    """A process that knows the hub's address from the beginning."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": "hf_none", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


LOAD = "import sys, ranjax; run = ranjax.load_model(*sys.argv[1:]); print(float(run.params['bias'].sum()))"


def read(folder, *names):
    return {name: (folder / name).read_bytes() for name in names or os.listdir(folder)}


@pytest.mark.quick
def test_a_model_is_downloaded_and_needs_no_network_then(folder, tmp_path):
    """Of a model's files those that are read come, and none whose name leaves the folder."""
    files = read(folder) | {"../evil.json": b"{}", "model.py": b"raise SystemExit"}
    with serving(hub_of(files)) as (asked, port):
        done = of_its_own(port, tmp_path, "-c", LOAD, "owner/pets", COMMIT)
    assert done.returncode == 0, done.stderr
    expected = f"{float(ranjax.load_model(folder).params['bias'].sum())}\n"
    assert done.stdout == expected
    assert f"owner/pets is no folder here: loaded from the hub, at {COMMIT}." in done.stderr
    assert {path.split(f"{COMMIT}/")[1] for path in asked if "/resolve/" in path} == set(FILES)
    assert not list(tmp_path.rglob("evil.json"))
    with serving(hub_of({})) as (_, port):
        pass  # closed: nothing answers there
    assert of_its_own(port, tmp_path, "-c", LOAD, "owner/pets", COMMIT).stdout == expected


def test_a_model_of_something_else_is_refused(folder, tmp_path):
    with serving(hub_of(read(folder, "config.json", "vocabulary.json"))) as (_, port):
        done = of_its_own(port, tmp_path, "-c", LOAD, "owner/pets")
    message = "owner/pets on the hub is no model that ranjax wrote: it has no model.safetensors, text.json."
    assert done.stderr.rstrip().endswith(f"UserError: {message}")


def test_the_program_uploads_only_when_asked(pets_run, folder, tmp_path):
    flags = ["-m", "ranjax.export", "--checkpoint", str(pets_run[0].directory), "--out"]
    committed = []
    with serving(hub_of({}, committed)) as (asked, port):
        done = of_its_own(port, tmp_path, *flags, str(tmp_path / "kept"))
        assert done.returncode == 0, done.stderr
        assert not asked
        done = of_its_own(port, tmp_path, *flags, str(tmp_path / "sent"), "--push-to-hub", "owner/pets")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"uploaded: http://127.0.0.1:{port}/owner/pets"
    sent = {one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in committed[1:]}
    assert sent == read(tmp_path / "sent")
    assert b"# owner/pets\n" in sent["README.md"]
    assert sent["model.safetensors"] == read(folder)["model.safetensors"]


def test_a_hub_that_is_not_there_is_one_message(pets_run, tmp_path):
    with serving(hub_of({})) as (_, port):
        pass
    done = of_its_own(port, tmp_path, "-c", LOAD, "owner/pets")
    assert "UserError: owner/pets is no folder here, and could not be loaded from the hub: " in done.stderr
    flags = ["--checkpoint", str(pets_run[0].directory), "--out", str(tmp_path / "out"), "--push-to-hub", "owner/pets"]
    done = of_its_own(port, tmp_path, "-m", "ranjax.export", *flags)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --push-to-hub owner/pets failed: ")
    assert f"The model is in {tmp_path / 'out'}" in done.stderr


@pytest.mark.parametrize(
    "name", ["../pets/model", "owner/../pets", "pets", "a/b/c", "https://hub/owner/pets", "/x/y", ""]
)
def test_what_is_no_id_is_refused(name):
    with pytest.raises(UserError, match="neither a folder nor the id of a model on the hub, OWNER/NAME"):
        hub.download(name, None, FILES)
    with pytest.raises(UserError, match=f"--push-to-hub must be OWNER/NAME; got {name}"):
        hub.check_id(name)
