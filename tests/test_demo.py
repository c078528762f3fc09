"""--mode demo: what its page shows of an image and what it refuses."""

import asyncio
import base64
import dataclasses
import hashlib
import io
import re
import socket
import sys
import threading

import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from helpers import bomb, error_of, failures, photo, random_variables, run_program, tiny_config
from regnet_flax import create_model
from regnet_flax.analysis.features import inspect
from regnet_flax.analysis.plots.features import colors
from regnet_flax.analysis.state_use import without_state
from regnet_flax.data.augment import normalize
from regnet_flax.data.photos import read_image
from regnet_flax.demo import answer, server
from regnet_flax.trained import Trained

LOCAL = "http://localhost:8000"


def network(name, stage_sizes):
    """A small network as if it had been trained, on colour images of 8×8 pixels."""
    model = create_model(name, num_classes=3, width=4).clone(stage_sizes=stage_sizes)
    variables = random_variables(model, np.zeros((1, 8, 8, 3), np.float32))
    config = tiny_config(**{"model.name": name, "predict.top": 2})
    config.dataset.mean, config.dataset.std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.2)
    return Trained(model, variables, config, ("ant", "bee", "cat"), (8, 8, 3), 12)


def decoded(url):
    kind, _, data = url.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.fixture(scope="module")
def trained():
    return network("regnet8_convlstm", (1, 1))


def test_what_the_page_shows_of_an_image(trained, tmp_path):
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # it lies on its side
    path.write_bytes(photo(format="JPEG", exif=exif))
    found = answer.Answers(trained)(path.read_bytes())

    # As --mode predict reads it.
    pixels = trained.to_input(read_image(path))
    shares = trained.predict(path)[0]
    order = np.argsort(-shares)[:2]
    np.testing.assert_array_equal(decoded(found["input"]), pixels)
    assert decoded(found["photo"]).shape == (34, 21, 3)
    assert [entry["name"] for entry in found["classes"]] == [trained.class_names[i] for i in order]
    assert [entry["probability"] for entry in found["classes"]] == pytest.approx(shares[order], rel=1e-5)

    blocks = inspect(trained.model, trained.variables, normalize(pixels[None], (0.5, 0.4, 0.3), (0.2, 0.3, 0.2)))
    assert [stage["blocks"] for stage in found["stages"]] == [["1.1"], ["2.1"]]
    for stage, block in zip(found["stages"], blocks, strict=True):
        rows = {row["name"]: row for row in stage["rows"]}
        assert list(rows) == ["H", "C", *block.gates]
        shown = {"H": np.sqrt((block.state["H"][0] ** 2).mean(-1)), "g": block.gates["g"][0].mean(-1)}
        for name, low in (("H", 0), ("g", shown["g"].min())):
            assert (rows[name]["low"], rows[name]["high"]) == pytest.approx((low, shown[name].max()), abs=1e-6)
            (cell,) = rows[name]["cells"]
            assert cell["mean"] == pytest.approx(shown[name].mean(), abs=1e-6)
            np.testing.assert_array_equal(decoded(cell["picture"]), colors(shown[name], low, shown[name].max()))

    assert [entry["stages"] for entry in found["without"]] == [(1,), (2,), (1, 2)]
    for entry in found["without"]:
        other = dataclasses.replace(trained, variables=without_state(trained.variables, *entry["stages"]))
        changed = other.predict(path)[0]
        assert entry["name"] == trained.class_names[changed.argmax()]
        assert entry["probability"] == pytest.approx(changed.max(), rel=1e-5)
        assert entry["first"] == pytest.approx(changed[order[0]], rel=1e-5) != found["classes"][0]["probability"]
    assert [entry["block"] for entry in found["cam"]] == ["1.1", "2.1"]
    assert all(decoded(entry["picture"]).shape == (256, 256, 3) for entry in found["cam"])
    assert found["note"] == "" and found["remarks"] == []


def test_a_network_without_a_regulator():
    plain = answer.Answers(network("resnet8", (1,)))
    transparent = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 99)).save(transparent, "PNG")
    found = plain(transparent.getvalue())
    assert len(found["classes"]) == 2 and [entry["block"] for entry in found["cam"]] == ["1.1"]
    assert found["stages"] == found["without"] == [] and "has no regulator" in found["note"]
    assert found["remarks"] == ["Its transparent parts are shown on white."]


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["resnet_rnn20_convgru", "dia_resnet20", "rla_resnet50", "regnety_400mf"])
def test_other_families(name):
    model = create_model(name, num_classes=3)
    model = model.clone(depth=2) if name.startswith("regnety") else model.clone(stage_sizes=(2,), width=4)
    variables = random_variables(model, np.zeros((1, 32, 32, 3), np.float32))
    trained = dataclasses.replace(network("resnet8", (1,)), model=model, variables=variables, image_shape=(32, 32, 3))
    found = answer.Answers(trained)(photo())
    replaces = name.startswith("resnet_rnn")  # X by H
    assert found["note"] == (answer.NOT_FUSED if replaces else answer.NO_REGULATOR)
    assert found["cam"] and not found["without"] and bool(found["stages"]) == replaces


def test_files_that_are_refused(trained, tmp_path, monkeypatch):
    """Each gives one line, before the network sees anything."""
    client = TestClient(server.build_app(answer.Answers(trained), {}), base_url=LOCAL)
    monkeypatch.setattr(answer.Answers, "_of_image", lambda *_: pytest.fail("an answer"))
    bomb(tmp_path / "bomb.png", 20_000)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with failures() as case:
        for label, data, words in (
            ("text", b"no image", "not an image in a readable format (JPEG, PNG"),
            ("nothing", b"", "not an image in a readable format"),
            ("cut short", photo()[:900], "cannot be read as an image ("),
            ("a bomb", (tmp_path / "bomb.png").read_bytes(), "more than 89 million pixels"),
            ("for Ghostscript", postscript, "not an image in a readable format"),
        ):
            with case(label):
                reply = client.post("/look", content=data)
                assert reply.status_code == 400 and words in reply.json()["error"], reply.text
                assert "\n" not in reply.json()["error"] and "0x" not in reply.json()["error"]

    monkeypatch.setattr(server, "MAX_BYTES", 2**20)
    seen = []
    client = TestClient(server.build_app(lambda data: seen.append(len(data)) or {}, {}), base_url=LOCAL)
    assert client.post("/look", content=bytes(2**20)).json() == {}
    for content in (bytes(2**20 + 1), iter([bytes(2**19)] * 3)):  # with Content-Length, and in chunks without
        reply = client.post("/look", content=content)
        assert reply.status_code == 413 and reply.json()["error"].startswith("the file has more than 1 MB")
    assert seen == [2**20]


def test_what_else_is_asked_of_the_page(trained):
    asked = []
    app = server.build_app(lambda data: asked.append(data) or {}, server.describe(trained), "my-machine")
    client = TestClient(app, base_url=LOCAL)
    reply = client.get("/")
    assert (
        "regnet8_convlstm" in reply.text
        and f"step 12 · 3 classes ({', '.join(trained.class_names)}) · sees images of 8×8 pixels" in reply.text
    )
    assert "{{" not in reply.text
    policy = reply.headers["content-security-policy"]
    for kind in ("style", "script"):
        (inside,) = re.findall(f"<{kind}>(.*?)</{kind}>", reply.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert reply.headers["cache-control"] == "no-store"

    for path in ("/page.html", "/../server.py", "/%2e%2e/server.py", "//etc/passwd", "/static/page.html"):
        assert client.get(path).status_code == 404, path
    assert client.get("/look").status_code == 405

    for host in ("localhost", "localhost:1", "127.0.0.1:8000", "[::1]:8000", "10.1.2.3", "my-machine:80"):
        assert client.get("/", headers={"host": host}).status_code == 200, host
        own = {"host": host, "origin": f"http://{host}"}
        assert client.post("/look", content=b"x", headers=own).status_code == 200, host
    assert len(asked) == 6
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "[::1", ""):
        assert client.get("/", headers={"host": host}).status_code == 403, host
    for origin in ("http://evil.example", "null", "http://localhost:9", "https://localhost:8000"):
        assert client.post("/look", content=b"x", headers={"origin": origin}).status_code == 403, origin
    assert len(asked) == 6


def test_one_image_at_a_time_and_a_network_that_fails(caplog):
    running, most, lock = 0, 0, threading.Lock()

    def slow(data):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.05)
        with lock:
            running -= 1
        if data == b"bad":
            raise RuntimeError("out of\nmemory")
        return {}

    async def all_at_once():
        transport = httpx.ASGITransport(app=server.build_app(slow, {}))
        async with httpx.AsyncClient(transport=transport, base_url=LOCAL) as client:
            return await asyncio.gather(*(client.post("/look", content=data) for data in (b"1", b"bad", b"3")))

    replies = asyncio.run(all_at_once())
    assert [reply.status_code for reply in replies] == [200, 500, 200] and most == 1
    assert replies[1].json()["error"].startswith("the network failed on this image (RuntimeError: out of memory)")
    assert "the network failed" in caplog.text


def test_what_keeps_the_page_from_starting_is_one_line(tmp_path, monkeypatch):
    command = ["--mode=demo", f"--workdir={tmp_path / 'none'}"]
    assert "there is no checkpoint" in error_of(run_program(*command, "--config.demo.port=0"), 2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = error_of(run_program(*command, f"--config.demo.port={port}"), 2)
        assert f"demo.port {port}" in line and "Address already in use" in line
    assert "demo.host is '192.0.2.1'" in error_of(run_program(*command, "--config.demo.host=192.0.2.1"), 2)
    monkeypatch.delitem(sys.modules, "regnet_flax.demo.server")
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    assert error_of(run_program(*command), 2).endswith("pip install 'regnet_flax[demo]'")
