"""--mode demo as a program of its own: over HTTP, and in Chromium by Playwright, where both are installed."""

import base64
import contextlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile

import httpx2 as httpx
import pytest

from helpers import ROOT, bomb, environment, photo
from regnet_flax import load
from regnet_flax.demo import server

pytestmark = pytest.mark.slow


@pytest.fixture
def workdir(tmp_path):
    with tarfile.open(ROOT / "tests" / "stored" / "lone.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / "lone"


@contextlib.contextmanager
def served(workdir):
    """The program in a process of its own: yields the page's address, and ends it by Ctrl-C."""
    command = [sys.executable, "-m", "regnet_flax.main", "--mode=demo", f"--workdir={workdir}", "--config.demo.port=0"]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment(), **output) as process:
        try:
            said = ""
            while not (found := re.search(r"http://127\.0\.0\.1:\d+", said)):
                line = process.stdout.readline()
                assert line, said
                said += line
            yield found[0]
        finally:
            process.send_signal(signal.SIGINT)
            said += process.communicate(timeout=60)[0]
        assert process.returncode == 130 and "Traceback" not in said, said
        assert "compiling regnet8_convlstm" in said


def test_the_program_serves_a_run_until_ctrl_c(workdir):
    with served(workdir) as url, httpx.Client(base_url=url) as client:
        found = client.post("/look", content=photo()).json()
        assert client.post("/look", content=b"no image").status_code == 400
        assert client.get("/", headers={"host": "evil.example"}).status_code == 403
        (workdir / "photo.png").write_bytes(photo())
        shares = load(workdir).predict(workdir / "photo.png")[0]
        assert found["classes"][0]["name"] == str(shares.argmax())
        assert found["classes"][0]["probability"] == pytest.approx(shares.max(), abs=1e-4)


@contextlib.contextmanager
def browser():
    """Chromium without a window, the system's or Playwright's own; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    own = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as started:
        try:
            chromium = started.chromium.launch(executable_path=own, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {error}")
        yield chromium
        chromium.close()


DROP = """(base64) => {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], "dropped.png"));
  document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
}"""


def test_the_page_in_a_browser(workdir, tmp_path):
    (tmp_path / "photo.png").write_bytes(photo())
    (tmp_path / "broken.png").write_bytes(photo()[:900])
    bomb(tmp_path / "bomb.png", 20_000)
    with open(tmp_path / "huge.png", "wb") as huge:
        huge.truncate(server.MAX_BYTES + 1)
    shares = load(workdir).predict(tmp_path / "photo.png")[0]
    with browser() as chromium, served(workdir) as url:
        for scheme, width in (("light", 1200), ("dark", 390)):
            page = chromium.new_context(color_scheme=scheme, viewport={"width": width, "height": 800}).new_page()
            wrong, asked = [], []
            page.on("pageerror", lambda error, wrong=wrong: wrong.append(error))
            page.on("console", lambda message, wrong=wrong: wrong.append(message.text))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(url)
            page.keyboard.press("Tab")
            assert page.evaluate("document.activeElement.id") == "file"
            assert not page.locator("#answer").is_visible()

            page.set_input_files("#file", tmp_path / "photo.png")
            page.wait_for_selector("#answer:not([hidden])")
            assert page.locator("#classes tr").count() == 5
            assert page.locator("#classes th").first.inner_text() == str(shares.argmax())
            assert page.locator("#classes .number").first.inner_text() == f"{100 * shares.max():.1f} %"
            assert page.locator("#without tr").count() == 1 + 3 + 1
            assert page.locator("#stages section").count() == page.locator("#cam img").count() == 3
            pictures = page.locator("img").evaluate_all("(all) => all.map((i) => [i.naturalWidth, i.alt])")
            assert len(pictures) == 2 + 3 + 3 * 6 and all(size and alt for size, alt in pictures)
            root = page.locator("html")
            assert root.evaluate("(e) => e.scrollWidth <= e.clientWidth"), "the page is wider than the window"
            assert not wrong

            for name, words in (
                ("broken.png", "cannot be read as an image"),
                ("bomb.png", "more than 89 million pixels"),
                ("huge.png", "more than 32 MB"),
            ):
                page.set_input_files("#file", tmp_path / name)
                page.wait_for_selector(f"#error:has-text('{words}')")
                assert not page.locator("#answer").is_visible()
            assert len(wrong) == 2 and all("400 (Bad Request)" in text for text in wrong)

            page.evaluate(DROP, base64.b64encode(photo()).decode())
            page.wait_for_selector("#answer:not([hidden])")
            assert page.locator("#status").inner_text().startswith(f"dropped.png: {shares.argmax()}")
            assert page.locator("#error").inner_text() == ""
            assert all(address.startswith((f"{url}/", "data:")) for address in asked)
