"""The core as WebAssembly: in Node.js and on a page it writes what the package writes here."""

import functools
import http.server
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

import anymamba
from tests.support import processes

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TOOLS = {"emcmake": "emscripten", "node": "nodejs"}
MISSING = [f"{tool}: apt-get install {TOOLS[tool]}" for tool in TOOLS if not shutil.which(tool)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.systems,
    pytest.mark.skipif(bool(MISSING), reason="missing: " + "; ".join(MISSING)),
]

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "browser"
PROMPT, LENGTH = "ROMEO:", 60

PROGRAM = """
import { readFile } from "node:fs/promises";
import { pathToFileURL } from "node:url";

const [site, given] = process.argv.slice(2);
const { replaced = {}, prompt, options } = JSON.parse(given);
const { load } = await import(pathToFileURL(`${site}/mamba.mjs`));
const open = async (name) => {
  const bytes = await readFile(`${site}/${name}`);
  const text = name in replaced ? new TextEncoder().encode(JSON.stringify(replaced[name])) : bytes;
  return text.buffer.slice(text.byteOffset, text.byteOffset + text.length);
};
const model = await load(open);
for (const piece of model.generate(prompt, options)) process.stdout.write(piece);
"""


@pytest.fixture(scope="module")
def site() -> Path:
    """The folder of the page."""
    BUILD.parent.mkdir(exist_ok=True)
    # CMake and Ninja come with the development requirements.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with FileLock(f"{BUILD}.lock"):
        for command in (
            ("emcmake", "cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja"),
            ("cmake", "--build", BUILD),
        ):
            done = processes.run(*command, env={**os.environ, "PATH": path})
            assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return BUILD / "site"


def in_node(site: Path, folder: Path, **given: object) -> tuple[int, str, str]:
    program = folder / "program.mjs"
    program.write_text(PROGRAM, encoding="utf-8")
    done = processes.run("node", program, site, json.dumps(given))
    return done.returncode, done.stdout, done.stderr


def test_it_writes_in_node_what_it_writes_here(site: Path, tmp_path: Path) -> None:
    engine = anymamba.load()
    for prompt in (PROMPT, "é"):
        options = {"temperature": 0, "length": LENGTH}
        status, text, error = in_node(site, tmp_path, prompt=prompt, options=options)
        assert status == 0, error
        assert text == engine.generate(prompt, max_new_tokens=LENGTH, do_sample=False).text


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", {"model_type": "mamba2"}, 'models of type "mamba", not "mamba2"'),
        ("tokenizer.json", {"model": {"type": "BPE", "merges": ["a b"]}}, "tokenizers of bytes"),
    ],
)
def test_other_models_are_refused(
    site: Path, tmp_path: Path, name: str, change: dict[str, object], message: str
) -> None:
    replaced = {name: json.loads((site / name).read_text(encoding="utf-8")) | change}
    status, _, error = in_node(site, tmp_path, prompt=PROMPT, options={}, replaced=replaced)
    assert status != 0
    assert message in error


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """Where the page is served."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=os.fspath(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
def test_the_page_writes(address: str) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as program:
        browser = program.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        button, status = page.get_by_role("button", name="write"), page.get_by_role("status")
        page.get_by_label("prompt").fill("")
        button.click()
        sync_api.expect(status).to_have_text("write a prompt first", timeout=60_000)
        # What was refused leaves the page as it was.
        page.get_by_label("prompt").fill(PROMPT)
        page.get_by_label("tokens").fill(str(LENGTH))
        page.get_by_label("temperature").fill("0")
        button.click()
        sync_api.expect(status).to_contain_text(f"{LENGTH} tokens", timeout=60_000)
        written = page.locator("#text").text_content()
        browser.close()
    greedy = anymamba.load().generate(PROMPT, max_new_tokens=LENGTH, do_sample=False)
    assert written == PROMPT + greedy.text
