"""Nothing is lost: killed, stopped, or out of space, a run goes on as if nothing had happened."""

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from anymamba import MambaForCausalLM
from anymamba.errors import AnyMambaError, InputError, TrainingError
from anymamba.training.lifecycle.atomic_checkpoints import checkpoints_in
from anymamba.training.lifecycle.report import read_metrics
from anymamba.training.pretrain.run import train
from anymamba.training.pretrain.trainer import MambaTrainer
from anymamba.training.settings import Settings
from tests.support.training import small
from tests.support.warm import Warm

pytestmark = pytest.mark.slow

STEPS = 60


def settings_in(folder: Path, order: str) -> Settings:
    folder.mkdir(exist_ok=True)
    return small(folder, order=order, steps=STEPS, save_every=7, evaluate_every=20, log_every=3,
                 dropout=0.1, accumulation=2)  # fmt: skip


def losses(run: Path) -> list[tuple[int, float]]:
    lines = read_metrics(run / "metrics.jsonl")
    return [(line["step"], line.get("loss", line.get("eval_loss"))) for line in lines]


def begin(settings: Settings, warm: Warm) -> subprocess.Popen[str]:
    """The run in a process of its own, through the command line."""
    config = Path(settings.output).with_suffix(".yaml")
    config.write_text(settings.to_yaml())
    return subprocess.Popen(
        [warm.python, "-m", "anymamba", "train", "--config", str(config), "--resume"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def steps_of(run: Path) -> int:
    lines = read_metrics(run / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of runs that nothing stopped, by the order of their data."""
    found = {}
    for order in ("random", "carried"):
        settings = settings_in(tmp_path_factory.mktemp(order) / "whole", order)
        train(settings)
        found[order] = Path(settings.output)
    return found


@pytest.mark.parametrize(
    ("order", "kills"), [("random", [(5, 25), (30, 50)]), ("carried", [(20, 50)])]
)
def test_killed_at_random_it_comes_to_the_same(
    order: str, kills: list[tuple[int, int]], wholes: dict[str, Path], warm: Warm, tmp_path: Path
) -> None:
    """SIGKILL when a random step is reached; the same numbers afterwards, bit for bit."""
    killed = settings_in(tmp_path / "killed", order)
    run = Path(killed.output)
    chance = random.Random(order)
    for first, last in kills:
        process = begin(killed, warm)
        wanted = chance.randint(first, last)
        while steps_of(run) < wanted and process.poll() is None:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.05)
        process.kill()
        process.communicate()
    assert 0 < steps_of(run) < STEPS
    process = begin(killed, warm)
    _, told = process.communicate()
    assert process.returncode == 0, told
    assert losses(run) == losses(wholes[order])
    ours = MambaForCausalLM.from_pretrained(run).state_dict()
    theirs = MambaForCausalLM.from_pretrained(wholes[order]).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list(run.rglob(".partial*"))
    assert len(checkpoints_in(run / "checkpoints")) == 2


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends(
    number: signal.Signals, status: int, warm: Warm, tmp_path: Path
) -> None:
    settings = small(tmp_path, steps=10**6, save_every=10**6, evaluate_every=10**6)
    run = Path(settings.output)
    process = begin(settings, warm)
    while steps_of(run) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == status, told
    (saved,) = checkpoints_in(run / "checkpoints")
    step = int(saved.name.split("-")[1])
    assert steps_of(run) == step
    assert f"stopped by {number.name} after step {step}; a checkpoint is saved" in told


def test_a_full_disk_leaves_the_last_checkpoint(
    wholes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    settings = settings_in(tmp_path / "full", "random")
    from anymamba.training.lifecycle import trainer

    publish = trainer.publish
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(partial: Path, target: Path) -> None:
        publish(partial, target)
        if target.name == "checkpoint-14":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    monkeypatch.setattr(trainer, "publish", filling)
    try:
        with pytest.raises(TrainingError, match=r"cannot write .*checkpoint-14'.*--resume"):
            train(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = checkpoints_in(Path(settings.output) / "checkpoints")
    assert [entry.name for entry in left] == ["checkpoint-7", "checkpoint-14"]
    monkeypatch.setattr(trainer, "publish", publish)
    train(settings, resume=True)
    assert losses(Path(settings.output)) == losses(wholes["random"])


def test_a_loss_that_is_no_number_leaves_the_last_checkpoint(
    wholes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_in(tmp_path / "broken", "random")
    step = MambaTrainer.compute_loss
    before: dict[str, bytes] = {}

    def broken(self: MambaTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step < 17:
            return step(self, *args, **kwargs)
        before.update(content(self.checkpoints))
        return step(self, *args, **kwargs) * float("nan")

    monkeypatch.setattr(MambaTrainer, "compute_loss", broken)
    with pytest.raises(TrainingError, match="the loss became nan in step 18"):
        train(settings)
    run = Path(settings.output)
    left = checkpoints_in(run / "checkpoints")
    assert [entry.name for entry in left] == ["checkpoint-7", "checkpoint-14"]
    assert content(run / "checkpoints") == before
    assert not (run / "config.json").exists()
    monkeypatch.undo()
    train(settings, resume=True)
    assert losses(run) == losses(wholes["random"])


def content(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended, beside its text."""
    folder = tmp_path_factory.mktemp("done")
    train(small(folder, order="carried"))
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 32}, r"began with hidden_size=\d+, and hidden_size=32 is asked for"),
        ({"layers": 3}, r"began with layers=\d+, and layers=3 is asked for"),
        ({"tie_embeddings": False}, "began with tie_embeddings=True"),
        ({"batch": 2}, "began with batch=4, and batch=2 is asked for"),
        ({"tokenizer": "bpe"}, "trained on another text or with another tokenizer"),
        ({"data": ["another.txt"]}, "trained on another text or with another tokenizer"),
        ({"data": ["nowhere.txt"]}, "cannot read 'nowhere.txt'"),
        ({"window": 10**5}, "window=100000"),
        ({"order": "random", "dropout": 0.5}, "order='random', dropout=0.5 is asked for"),
        ({"model": "elsewhere"}, "began with model=None, and model='elsewhere'"),
        ({"learning_rate": 0.5, "seed": 7}, "learning_rate=0.5, seed=7"),
    ],
)
def test_another_run_is_refused_and_nothing_is_changed(
    changes: dict[str, Any], words: str, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(done)
    Path("another.txt").write_text("Another text. " * 400, encoding="utf-8")
    settings = small(done, **{"order": "carried", "steps": 20, **changes})
    before = content(done / "run")
    with pytest.raises((TrainingError, InputError), match=words):
        train(settings, resume=True)
    assert content(done / "run") == before


def test_a_checkpoint_of_other_sizes_is_refused_without_its_settings_too(
    done: Path, tmp_path: Path
) -> None:
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    (tmp_path / "run" / "training.yaml").unlink()
    for changes, words in (({"layers": 3}, "other sizes"), ({"batch": 2}, "batch is 2")):
        with pytest.raises(TrainingError, match=words):
            train(small(tmp_path, order="carried", **changes), resume=True)


@pytest.mark.parametrize("damage", ["missing", "cut", "garbage"])
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "optimizer.pt",
        "progress.json",
        "scheduler.pt",
        "trainer_state.json",
    ],
)
def test_a_damaged_checkpoint_is_named(name: str, damage: str, done: Path, tmp_path: Path) -> None:
    settings = small(tmp_path, order="carried", steps=20)
    shutil.copytree(done / "run", tmp_path / "run")
    file = tmp_path / "run/checkpoints/checkpoint-12" / name
    kept = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(kept[: len(kept) // 2] if damage == "cut" else b"garbage")
    with pytest.raises(TrainingError, match=rf"checkpoint-12'.*{name}.*before it") as caught:
        train(settings, resume=True)
    assert "\n" not in str(caught.value)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(done: Path, tmp_path: Path) -> None:
    settings = small(tmp_path, order="carried", steps=20)
    shutil.copytree(done / "run", tmp_path / "run")
    damaged = tmp_path / "run/checkpoints/checkpoint-12"
    (damaged / "optimizer.pt").unlink()
    with pytest.raises(TrainingError):
        train(settings, resume=True)
    shutil.rmtree(damaged)
    assert train(settings, resume=True).figures["steps"] == 20


def test_what_is_no_metrics_is_dropped(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "run", tmp_path / "run")
    metrics = tmp_path / "run/metrics.jsonl"
    for broken in (b"3\n", b"{}\n", b"\xff\xfe\n", b'{"step": 4'):
        first = metrics.read_bytes().splitlines(keepends=True)[0]
        metrics.write_bytes(first + broken)
        assert [line["step"] for line in read_metrics(metrics)] == [1]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_mistake_leaves_the_output_as_it_was(overwrite: bool, done: Path, tmp_path: Path) -> None:
    """Nothing is there that would make the next try ask for --overwrite; nothing is gone."""
    if overwrite:
        shutil.copytree(done / "run", tmp_path / "run")
    before = content(tmp_path / "run")
    for mistake in ({"data": ["nowhere.txt"]}, {"window": 10**5}, {"model": str(tmp_path)}):
        with pytest.raises(AnyMambaError):
            train(small(tmp_path, **mistake), overwrite=overwrite)
    assert content(tmp_path / "run") == before
    assert overwrite or not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in ("file", "file/sub"):
        with pytest.raises(InputError, match=r"cannot write into .*file' is not a folder"):
            train(small(tmp_path, output=str(tmp_path / place)))
