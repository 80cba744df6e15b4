"""From names to folders: local paths, a stand-in for the hub, its cache, and no network."""

import socket
from pathlib import Path

import pytest
import torch

from anymamba.checkpoint import load_torch_state_dict, open_checkpoint, resolve
from anymamba.errors import CheckpointError, HubError
from tests.support import files
from tests.support.hub import COMMIT
from tests.support.layouts import weights, write_model, write_shards

pytestmark = pytest.mark.usefixtures("online")


@pytest.fixture
def model(hub, tmp_path):
    """A model on the hub, with files that nobody asked for."""
    folder = write_model(tmp_path / "served")
    for name in ("tokenizer.json", "pytorch_model.bin", "README.md", "flax_model.msgpack"):
        (folder / name).write_bytes(b"{}")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"")
    hub.folders["someone/mamba-tiny"] = folder
    return "someone/mamba-tiny"


def refusal(model, kind=HubError, **options) -> str:
    message = files.refusal(kind, resolve, model, **options)
    assert repr(str(model)) in message
    return message


def assert_loads(folder):
    loaded = load_torch_state_dict(open_checkpoint(folder))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights().items())


class TestLocal:
    def test_a_folder_is_taken_as_it_is(self, tmp_path):
        assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path

    def test_a_folder_beats_the_hub(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write_model(tmp_path / "someone" / "mamba")
        assert resolve("someone/mamba") == Path("someone/mamba")

    def test_home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        (tmp_path / "model").mkdir()
        assert resolve("~/model") == tmp_path / "model"

    @pytest.mark.parametrize("name", ["./nothing", "/no/thing", "a/b/c", "../x", "..\\x", "C:/x"])
    def test_what_looks_like_a_path_is_one(self, name):
        assert "does not exist" in refusal(name, CheckpointError)

    def test_an_empty_name_is_not_the_current_folder(self):
        assert "name a file or a folder" in refusal("", CheckpointError)

    def test_a_missing_path_object(self):
        assert "does not exist" in refusal(Path("nothing"), CheckpointError)

    def test_a_file(self, tmp_path):
        file = write_model(tmp_path) / "model.safetensors"
        assert "is a file" in refusal(file, CheckpointError)

    def test_a_subfolder(self, tmp_path):
        (tmp_path / "fine").mkdir()
        assert resolve(tmp_path, subfolder="fine") == tmp_path / "fine"
        assert "no subfolder 'coarse'" in refusal(tmp_path, CheckpointError, subfolder="coarse")


class TestHub:
    def test_downloads_what_is_needed(self, hub, model, tmp_path):
        folder = resolve(model)
        assert folder.is_relative_to(tmp_path / "cache")
        assert hub.fetched == {"config.json", "tokenizer.json", "model.safetensors"}
        assert_loads(folder)

    def test_shards(self, hub, tmp_path):
        (tmp_path / "served").mkdir()
        write_shards(tmp_path / "served")
        hub.folders["someone/sharded"] = tmp_path / "served"
        assert_loads(resolve("someone/sharded"))

    def test_pickles_where_there_is_nothing_else(self, hub, tmp_path):
        hub.folders["someone/old"] = write_model(tmp_path / "served", "original", pickled=True)
        assert_loads(resolve("someone/old"))
        assert hub.fetched == {"config.json", "pytorch_model.bin"}

    def test_a_subfolder(self, hub, tmp_path):
        served = write_model(tmp_path / "served" / "fine" / "v2").parent.parent
        (served / "model.safetensors").write_bytes(b"another one")
        hub.folders["someone/nested"] = served
        folder = resolve("someone/nested", subfolder="fine/v2")
        assert_loads(folder)
        assert hub.fetched == {"fine/v2/config.json", "fine/v2/model.safetensors"}

    def test_a_commit(self, model):
        assert resolve(model, revision=COMMIT) == resolve(model)

    def test_downloaded_once(self, hub, model):
        first = resolve(model)
        hub.requests.clear()
        assert resolve(model) == first
        assert hub.fetched == set()
        resolve(model, force_download=True)
        assert "model.safetensors" in hub.fetched

    def test_another_cache(self, model, tmp_path):
        assert resolve(model, cache_dir=tmp_path / "mine").is_relative_to(tmp_path / "mine")

    def test_a_token_is_sent(self, hub, model):
        hub.gated.add(model)
        assert_loads(resolve(model, token="hf_example"))
        assert {token for _, _, token in hub.requests} == {"Bearer hf_example"}

    def test_gated(self, hub, model):
        hub.gated.add(model)
        message = refusal(model, token=False)
        assert "gated" in message
        assert "path of a local folder" in message

    def test_not_there(self, hub):
        message = refusal("someone/else")
        assert message.startswith("there is no file or folder")
        assert "no such model on" in message
        assert "path of a local folder" in message

    def test_no_such_revision(self, model):
        assert "no revision 'v9'" in refusal(model, revision="v9")

    @pytest.mark.parametrize("name", ["no spaces please", "a/", "-x", "x" * 200])
    def test_no_hub_id(self, hub, name):
        assert "nor a" in refusal(name)
        assert hub.requests == []

    def test_out_of_order(self, hub, model):
        hub.broken = True
        assert "could not be downloaded" in refusal(model)


class TestOffline:
    def test_from_the_cache(self, hub, model, monkeypatch):
        online = resolve(model)
        hub.requests.clear()
        assert resolve(model, offline=True) == online
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert resolve(model) == online
        assert hub.requests == []
        assert_loads(online)

    def test_pickles_from_the_cache(self, hub, tmp_path):
        hub.folders["someone/old"] = write_model(tmp_path / "served", "original", pickled=True)
        online = resolve("someone/old")
        assert resolve("someone/old", offline=True) == online

    def test_not_in_the_cache(self, hub, model, monkeypatch):
        assert "work offline" in refusal(model, offline=True)
        monkeypatch.setenv("HF_HUB_OFFLINE", "yes")
        assert "path of a local folder" in refusal(model)
        assert hub.requests == []


class TestNoNetwork:
    @pytest.fixture
    def closed(self, monkeypatch):
        with socket.socket() as reserved:
            reserved.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
            monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{reserved.getsockname()[1]}")
            yield

    def test_names_the_way_out(self, closed, monkeypatch, tmp_path):
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
        message = refusal("someone/mamba-tiny")
        assert "check the network" in message
        assert "path of a local folder" in message

    def test_the_cache_still_serves(self, hub, model, request):
        online = resolve(model)
        request.getfixturevalue("closed")
        assert resolve(model) == online
