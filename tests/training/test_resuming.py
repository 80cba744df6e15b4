"""Nothing is lost: killed, stopped, or out of space, a run goes on as if nothing had happened."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from anymamba import MambaForCausalLM
from anymamba.errors import TrainingError
from anymamba.training.report import read_metrics
from anymamba.training.run import train
from anymamba.training.safety import checkpoints_in
from anymamba.training.settings import Settings
from tests.training.small import small

STEPS = 60


def settings_in(folder: Path, order: str) -> Settings:
    folder.mkdir(exist_ok=True)
    return small(folder, order=order, steps=STEPS, save_every=7, evaluate_every=20, log_every=3,
                 dropout=0.1, accumulation=2)  # fmt: skip


def losses(run: Path) -> list[tuple[int, float]]:
    lines = read_metrics(run / "metrics.jsonl")
    return [(line["step"], line.get("loss", line.get("eval_loss"))) for line in lines]


def begin(settings: Settings) -> subprocess.Popen[str]:
    """The run in a process of its own, through the command line."""
    config = Path(settings.output).with_suffix(".yaml")
    config.write_text(settings.to_yaml())
    return subprocess.Popen(
        [sys.executable, "-m", "anymamba", "train", "--config", str(config), "--resume"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def steps_of(run: Path) -> int:
    lines = read_metrics(run / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


@pytest.mark.parametrize(
    ("order", "kills"), [("random", [(5, 25), (30, 50)]), ("carried", [(20, 50)])]
)
def test_killed_at_random_it_comes_to_the_same(
    order: str, kills: list[tuple[int, int]], tmp_path: Path
) -> None:
    """SIGKILL when a random step is reached; the same numbers afterwards, bit for bit."""
    whole = settings_in(tmp_path / "whole", order)
    train(whole)
    killed = settings_in(tmp_path / "killed", order)
    run = Path(killed.output)
    chance = random.Random(order)
    for first, last in kills:
        process = begin(killed)
        wanted = chance.randint(first, last)
        while steps_of(run) < wanted and process.poll() is None:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.05)
        process.kill()
        process.communicate()
    assert 0 < steps_of(run) < STEPS
    process = begin(killed)
    _, told = process.communicate()
    assert process.returncode == 0, told
    assert losses(run) == losses(Path(whole.output))
    ours = MambaForCausalLM.from_pretrained(run).state_dict()
    theirs = MambaForCausalLM.from_pretrained(whole.output).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list(run.rglob(".partial*"))
    assert len(checkpoints_in(run / "checkpoints")) == 2


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends(number: signal.Signals, status: int, tmp_path: Path) -> None:
    settings = small(tmp_path, steps=10**6, save_every=10**6, evaluate_every=10**6)
    run = Path(settings.output)
    process = begin(settings)
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    whole = settings_in(tmp_path / "whole", "random")
    train(whole)
    settings = settings_in(tmp_path / "full", "random")
    from anymamba.training import trainer

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
    assert losses(Path(settings.output)) == losses(Path(whole.output))


def test_another_text_is_refused(tmp_path: Path) -> None:
    settings = small(tmp_path)
    train(settings)
    (tmp_path / "text.txt").write_text("Another text. " * 400)
    with pytest.raises(TrainingError, match="was trained on another text"):
        train(settings, resume=True)
