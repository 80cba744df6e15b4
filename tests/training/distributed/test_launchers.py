"""`anymamba train` under torchrun and accelerate against one process with the same batches."""

import json
import random
import sys
from pathlib import Path

import pytest

from tests.support import processes

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
ACCELERATE += ["--main_process_port", "0"]
TRAIN = ["train", "--data", "text.txt", "--window", "32", "--hidden-size", "16", "--layers", "1"]
TRAIN += ["--steps", "4", "--order", "shuffled", "--log-every", "1", "--dtype", "float32"]
TRAIN += ["--device", "cpu", "--threads", "1", "--no-plot"]


EXAMPLE = Path(__file__).parents[3] / "examples" / "long_sequence.py"


def losses(launcher: list[str], batch: int, folder: Path) -> list[float]:
    """Of each step, and of the text held out."""
    start = [str(BIN / launcher[0]), *launcher[1:]] if launcher else []
    command = [*start, str(BIN / "anymamba"), *TRAIN, "--batch", str(batch), "--output", "run"]
    folder.mkdir()
    words = random.Random(0).choices(["the", "cat", "sat", "on", "a", "mat"], k=1000)
    (folder / "text.txt").write_text(" ".join(words), encoding="utf-8")
    done = processes.run(*command, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation_loss_windows") == done.stdout.count("written") == 1
    assert "find_unused_parameters" not in done.stderr
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    return [step[key] for step in steps for key in ("loss", "eval_loss") if key in step]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses([], 4, tmp_path_factory.mktemp("alone") / "work")


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_train_as_one(
    launcher: list[str], alone: list[float], tmp_path: Path
) -> None:
    found = losses(launcher, 2, tmp_path / "work")
    assert len(found) >= 5
    # The same sums in another order.
    assert found == pytest.approx(alone, abs=1e-4)


def test_the_example_learns() -> None:
    done = processes.run(
        str(BIN / TORCHRUN[0]), *TORCHRUN[1:], EXAMPLE, "--length", "256", "--steps", "4"
    )
    assert done.returncode == 0, done.stderr
    found = [float(line.split()[-1]) for line in done.stdout.splitlines() if "loss" in line]
    assert len(found) == 4
    assert found[3] < found[0]
