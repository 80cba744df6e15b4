"""The page's files: who gets them, with which limits, and that they need nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")

from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from anymamba import Engine
from anymamba.server import Settings, app
from anymamba.server.page_files import FOLDER

FILES = sorted(file.name for file in FOLDER.iterdir())


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with TestClient(app(engine, settings=Settings(api_key="sesame"))) as found:
        yield found


def test_everybody_gets_the_page_and_nothing_else(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.content == (FOLDER / "index.html").read_bytes()
    assert client.head("/").status_code == 200
    for path in ("/v1/models", "/page", "/pages", "/page/../v1/models"):
        assert client.get(path, follow_redirects=False).status_code in (401, 404), path


@pytest.mark.parametrize("name", FILES)
def test_every_file_says_what_it_may_do(client: TestClient, name: str) -> None:
    found = client.get(f"/page/{name}")
    assert found.content == (FOLDER / name).read_bytes()
    policy = found.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; ")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert found.headers["x-content-type-options"] == "nosniff"
    known = {"if-none-match": found.headers["etag"]}
    assert client.get(f"/page/{name}", headers=known).status_code == 304


@pytest.mark.parametrize("path", ["nothing.js", "../app.py", "%2e%2e/app.py", "..%2fapp.py", ""])
def test_no_other_file_is_given_out(client: TestClient, path: str) -> None:
    found = client.get(f"/page/{path}")
    assert found.status_code in (401, 404)
    assert "error" in found.json()


def test_posting_to_the_page_is_an_error(client: TestClient) -> None:
    assert client.post("/").status_code == 405
    assert client.post("/page/main.js").status_code == 405


def test_a_server_without_the_page(engine: Engine) -> None:
    with TestClient(app(engine, settings=Settings(page=False))) as client:
        assert client.get("/").status_code == 404
        assert client.get("/page/main.js").status_code == 404


def test_mounted_below_another_path(engine: Engine) -> None:
    inner = app(engine, settings=Settings(api_key="sesame"))
    outer = Starlette(routes=[Mount("/bard", inner)], lifespan=inner.router.lifespan_context)
    with TestClient(outer) as client:
        assert client.get("/bard/").status_code == 200
        assert client.get("/bard/page/main.js").status_code == 200
        assert client.get("/bard/health").json()["status"] == "ok"
        assert client.get("/bard/v1/models").status_code == 401


def test_models_say_whether_they_have_a_template(address: str) -> None:
    httpx = pytest.importorskip("httpx")
    found = httpx.get(f"{address}/v1/models", timeout=30).json()["data"]
    assert [model["has_chat_template"] for model in found] == [True, True, False]


@pytest.mark.parametrize("name", FILES)
def test_a_file_needs_nothing_from_elsewhere(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    foreign = re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text.replace("http://www.w3.org/2000/", ""))
    assert not foreign
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|\beval\(|new Function", text)
    for other in re.findall(r'from "\./([\w.]+)"|(?:src|href)="page/([\w.]+)"', text):
        assert (FOLDER / "".join(other)).exists(), other
