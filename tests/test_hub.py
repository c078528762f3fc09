"""Weights to and from a hub of this process, which speaks the part of the Hugging Face Hub's protocol that is used."""

import base64
import hashlib
import http.server
import json
import pathlib
import sys
import tarfile
import threading

import jax
import numpy as np
import pytest

import regnet_flax
from helpers import failures, random_variables
from regnet_flax import create_model, hub
from regnet_flax.errors import HubError, WeightsError
from regnet_flax.port.torch import to_torch
from regnet_flax.port.weights import read_weights, write_weights

STORED = pathlib.Path(__file__).parent / "stored" / "lone.tar.gz"
TOKEN = "hf_of_the_test"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, value=None, status=200, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_PUT(self):
        self.server.large[self.path.split("/")[-1]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def do_POST(self):
        content, server = self.rfile.read(int(self.headers["Content-Length"])), self.server
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "validate" not in self.path:
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path.endswith("/commit/main"):
            return self.commit([json.loads(line) for line in content.splitlines()])
        given = json.loads(content)
        if self.path == "/api/repos/create":
            name = f"{given['organization']}/{given['name']}"
            private = given.get("private", False) or given.get("visibility") == "private"
            server.repositories.setdefault(name, {"private": private, "commits": {}})
            return self.answer({"url": f"{server.address}/{name}"})
        if self.path == "/api/validate-yaml":
            assert given["content"].startswith("---\nlibrary_name: regnet_flax\n")
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            modes = {True: "lfs", False: "regular"}
            names = [file["path"] for file in given["files"]]
            files = [{"path": n, "uploadMode": modes[n.endswith(".safetensors")], "shouldIgnore": False} for n in names]
            return self.answer({"files": files})
        assert self.path.endswith(".git/info/lfs/objects/batch")
        actions = lambda oid: {"upload": {"href": f"{server.address}/large/{oid}"}}  # noqa: E731
        objects = [{"oid": o["oid"], "size": o["size"], "actions": actions(o["oid"])} for o in given["objects"]]
        self.answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def commit(self, lines):
        name = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
        commits, files = self.server.repositories[name]["commits"], {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        commit = hashlib.sha1(repr(files).encode()).hexdigest()
        commits[commit] = files
        url = f"{self.server.address}/{name}/commit/{commit}"
        self.answer({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def do_GET(self):
        if self.path.startswith("/api/"):
            return self.answer({"error": "Not found"}, 404)
        user, name, _, revision, file = self.path.strip("/").split("/")
        repository = self.server.repositories.get(f"{user}/{name}")
        if repository is None:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        commits = repository["commits"]
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            return self.answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        content = commits[commit][file]
        self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=commit)

    do_HEAD = do_GET


@pytest.fixture
def server(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repositories, server.large = {}, {}
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    # What HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_DISABLE_XET set, when huggingface_hub is imported.
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    with tarfile.open(STORED) as tar:
        tar.extractall(folder, filter="data")
    return folder / "lone"


def assert_same(found, expected):
    assert (found.class_names, found.image_shape) == (expected.class_names, expected.image_shape)
    for field in ("mean", "std"):
        assert tuple(found.config.dataset[field]) == tuple(expected.config.dataset[field])
    leaves = [jax.tree_util.tree_leaves_with_path(one.variables) for one in (found, expected)]
    for (name, a), (other, b) in zip(*leaves, strict=True):
        assert name == other and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_is_pushed_and_pulled(server, workdir, tmp_path, monkeypatch):
    before = sorted(workdir.iterdir())
    address = hub.push(workdir, "user/model", private=True)
    assert sorted(workdir.iterdir()) == before
    (commit,) = server.repositories["user/model"]["commits"]
    assert address == f"{server.address}/user/model/commit/{commit}" and server.repositories["user/model"]["private"]
    assert server.repositories["user/model"]["commits"][commit].keys() == {"weights.safetensors", "README.md"}

    file, expected = hub.pull("user/model"), regnet_flax.load(workdir)
    assert (file.with_name("README.md")).read_text().startswith("---\nlibrary_name: regnet_flax\n")
    assert_same(regnet_flax.load(file), expected)

    # The file with its card, pushed on as it is; an earlier commit can be had by its name.
    hub.push(file, "user/model", message="again")
    newest = list(server.repositories["user/model"]["commits"])[-1]
    other = tmp_path / "mine" / "other.safetensors"
    other.parent.mkdir()
    other.write_bytes(file.read_bytes())
    other.with_name("README.md").write_bytes(file.with_name("README.md").read_bytes())  # of weights.safetensors
    with failures() as case:
        with case("no card"), pytest.raises(WeightsError, match="no model card"):
            hub.push(other, "user/model")
        with case("no file of weights"), pytest.raises(WeightsError, match=r"not a .safetensors file"):
            hub.push(file.with_name("README.md"), "user/model")
        with case("no repository"), pytest.raises(HubError, match="user/none could not be read: RepositoryNotFound"):
            hub.pull("user/none")
        with case("no revision"), pytest.raises(HubError, match="user/model could not be read: RevisionNotFound"):
            hub.pull("user/model", revision="0" * 40)
        with case("no name"), pytest.raises(HubError, match="could not be read: HFValidationError"):
            hub.pull("a/b/c")
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        with case("no permission"), pytest.raises(HubError, match="user/model could not be written"):
            hub.push(file, "user/model")
    assert hub.pull("user/model", revision=newest).read_bytes() == file.read_bytes()
    server.shutdown()  # what was fetched is used
    server.server_close()
    assert hub.pull("user/model", revision=newest).read_bytes() == file.read_bytes()


def test_without_huggingface_hub_it_is_one_line(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: hub.push(workdir, "user/model"), lambda: hub.pull("user/model")):
        with pytest.raises(WeightsError, match=r'pip install "regnet-flax\[hub\]"'):
            call()


def test_a_file_loads_with_the_options_and_the_crop_that_it_says(tmp_path):
    options = {"width": 4, "regulated_stages": (1, 3), "kernel": "dense"}
    model = create_model("regnet8_convgru", num_classes=3, **options)
    variables = random_variables(model, np.zeros((1, 8, 8, 3), np.float32))
    facts = {"class_names": ["a", "b", "c"], "image_shape": [8, 8, 3], "mean": [0.5], "std": [0.25], "crop": True}
    said = {name: json.dumps(value) for name, value in (facts | {"options": options}).items()}
    file = tmp_path / "weights.safetensors"
    write_weights(file, to_torch(variables, model), said | {"model": "regnet8_convgru", "step": "7"})
    trained = regnet_flax.load(file)
    assert trained.step == 7 and trained.class_names == ("a", "b", "c") and trained.model.width == 4
    assert trained.config.model.overrides.regulated_stages == (1, 3)
    assert tuple(trained.config.dataset.augment) == ("random_resized_crop",)
    arrays, metadata = read_weights(file)
    for name, value, match in (
        ("model", None, "does not say which model"),
        ("options", '{"colour": 1}', "options that no model has"),
        ("options", '{"width": "wide"}', "options that no model has"),
        ("options", "[", "options that no model has"),
        ("options", '{"width": 0}', "a model that cannot be made"),
        ("options", '{"kernel": "spiral"}', "a model that cannot be made"),
        ("model", "regnet8_leaky", "name its module in model.plugins"),
    ):
        changed = metadata | {name: value} if value else {n: v for n, v in metadata.items() if n != name}
        write_weights(file, arrays, changed)
        with pytest.raises(WeightsError, match=f"weights.safetensors .*{match}"):
            regnet_flax.load(file)
