"""The Dockerfile and the manifest, as far as they can be checked without Docker or a cluster."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from anymamba.cli.main import parse

yaml = pytest.importorskip("yaml")
pytest.importorskip("starlette")

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "examples" / "docker" / "Dockerfile"
MANIFEST = ROOT / "examples" / "kserve" / "inference-service.yaml"


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, each a word and what follows it, on one line."""
    lines = re.sub(r"(?m)^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"))
    joined = lines.replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined if line.strip()]


@pytest.fixture(scope="module")
def predictor() -> dict[str, Any]:
    manifest = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    assert manifest["apiVersion"] == "serving.kserve.io/v1beta1"
    assert manifest["kind"] == "InferenceService"
    found: dict[str, Any] = manifest["spec"]["predictor"]
    return found


def entrypoint(steps: list[tuple[str, str]]) -> list[str]:
    command: list[str] = json.loads(dict(steps)["ENTRYPOINT"])
    assert command.pop(0) == "anymamba"
    return command


def test_the_image_starts_a_server_without_rights(steps: list[tuple[str, str]]) -> None:
    found = dict(steps)  # of each word the last, which is the final stage's
    assert found["FROM"].endswith("-slim")
    assert found["USER"] == "1000"
    _, options = parse(entrypoint(steps))
    assert options.host == "0.0.0.0"
    assert str(options.port) == found["EXPOSE"]
    assert {str(options.cache_dir), "/models"} == set(json.loads(found["VOLUME"]))


def test_the_health_check_is_python_that_asks_for_health(steps: list[tuple[str, str]]) -> None:
    check = dict(steps)["HEALTHCHECK"]
    command = json.loads(check[check.index("[") :])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "HEALTHCHECK", "exec")
    assert f":{dict(steps)['EXPOSE']}/health'" in command[2]


def test_the_manifest_s_options_are_the_program_s(
    steps: list[tuple[str, str]], predictor: dict[str, Any]
) -> None:
    (container,) = predictor["containers"]
    _, options = parse([*entrypoint(steps), *container["args"]])
    port = container["ports"][0]["containerPort"]
    assert port == options.port
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port}
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounted) == {volume["name"] for volume in predictor["volumes"]}
    assert set(mounted.values()) == set(json.loads(dict(steps)["VOLUME"]))
    assert [entry["name"] for entry in container["env"]] == ["ANYMAMBA_API_KEY"]
    assert str(predictor["securityContext"]["runAsUser"]) == dict(steps)["USER"]


@pytest.mark.parametrize(
    "file",
    [DOCKERFILE, MANIFEST, *sorted((ROOT / "examples").glob("ray_*/*.py"))],
    ids=lambda file: file.name,
)
def test_an_example_is_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 60
