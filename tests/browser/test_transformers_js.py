"""The guide's web page in headless Chromium: transformers.js continues texts as neoquant does.

`make test-browser` fetches transformers.js with npm. Nothing is asked of any other machine.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY

import neoquant
from neoquant.demo import MODEL
from neoquant.quantization.recipe import Recipe

pytestmark = pytest.mark.browser
pytest.importorskip("onnx")

from neoquant.onnx.export import export  # noqa: E402

NAME = "gpt-neo-125m-nf4-onnx"  # as the page calls it
PROMPT = "def mean(values):"
SECONDS = 240  # to compile ONNX Runtime and read the model, on a busy machine

# Presses the page's button when it may be pressed, and sends what the page shows then, or why it shows nothing.
PRESS = """
<script>
  const send = text => fetch("/result", { method: "POST", body: text });
  addEventListener("error", event => send("error: " + event.message));
  addEventListener("unhandledrejection", event => send("error: " + event.reason));
  const button = document.querySelector("button");
  let pressed = false;
  new MutationObserver(() => { if (!button.disabled && !pressed) { pressed = true; button.click(); } })
    .observe(button, { attributes: true });
  new MutationObserver(() => send(document.querySelector("pre").textContent))
    .observe(document.querySelector("pre"), { childList: true });
</script>
"""

KINDS: dict[str, Callable[[], Recipe] | None] = {
    "plain": None,
    "nf4": lambda: Recipe.simple(4, "nf4"),
    "4 bits, embeddings too": lambda: Recipe.simple(4, "affine", group_size=32, format="neoquant", embeddings="int8"),
    "int8": lambda: Recipe.simple(8, "int8"),
}


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; what is posted is kept."""

    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}  # noqa: RUF012

    def do_POST(self) -> None:
        self.server.results.append(self.rfile.read(int(self.headers["Content-Length"])).decode())  # type: ignore[attr-defined]
        self.send_response(204)
        self.end_headers()
        self.server.done.set()  # type: ignore[attr-defined]

    def log_message(self, format: str, *words: Any) -> None:
        self.server.asked.append(format % words)  # type: ignore[attr-defined]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The folder that the guide describes, without the model."""
    folder = tmp_path / "site"
    folder.mkdir()
    modules = Path(os.environ["NEOQUANT_BROWSER"]).absolute() / "node_modules"
    shutil.copy(modules / "@huggingface" / "transformers" / "dist" / "transformers.min.js", folder)
    for kind in ("mjs", "wasm"):
        shutil.copy(modules / "onnxruntime-web" / "dist" / f"ort-wasm-simd-threaded.asyncify.{kind}", folder)
    (page,) = re.findall(r"^```html\n(.*?)^```$", (REPOSITORY / "docs" / "guide.md").read_text(), re.M | re.S)
    (folder / "index.html").write_text(page.replace('<script type="module">', f'{PRESS}<script type="module">'))
    return folder


@pytest.fixture
def server(site: Path) -> Iterator[Any]:
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site.parent)))
    served.results, served.asked, served.done = [], [], threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


def shown(server: Any, tmp_path: Path) -> str:
    """What the page shows, or the error that it ends with."""
    program = os.environ.get("CHROMIUM", "chromium")
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    words += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"]
    words += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with (tmp_path / "chromium.log").open("w") as log:
        browser = subprocess.Popen(
            [program, *words, f"http://127.0.0.1:{server.server_port}/site/"], stdout=log, stderr=log
        )
        try:
            assert server.done.wait(SECONDS), f"no answer; asked for: {server.asked}"
        finally:
            browser.terminate()
            browser.wait()
    return str(server.results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_continues_a_text_as_neoquant_does(server: Any, site: Path, tmp_path: Path, kind: str) -> None:
    recipe, folder = KINDS[kind], MODEL
    if recipe is not None:
        folder = tmp_path / "quantized"
        neoquant.quantize(MODEL, folder, recipe())
    made = export(folder, site / NAME)
    model, tokenizer = neoquant.load(folder, dtype=torch.float32, device="cpu")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=40, do_sample=False)[0], skip_special_tokens=True)
    assert shown(server, tmp_path) == expected and len(expected) > len(PROMPT) + 40
    asked = [line.split()[1] for line in server.asked if line.startswith('"GET')]
    assert f"/site/{NAME}/{made.file.relative_to(made.folder)}" in asked
    assert json.loads((made.folder / "config.json").read_text())["transformers.js_config"]


def test_a_model_that_is_not_there_is_an_error(server: Any, tmp_path: Path) -> None:
    assert shown(server, tmp_path).startswith("error: ")
