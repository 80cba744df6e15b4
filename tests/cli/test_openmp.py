"""Idle threads of PyTorch's sleep while the native core trains, unless the user says otherwise."""

import os
from pathlib import Path

import pytest

from tests.support import processes

PROGRAM = """\
import os, sys
from importlib.abc import MetaPathFinder

class Watch(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.exit(os.environ.get("OMP_WAIT_POLICY"))

sys.meta_path.insert(0, Watch())
from anymamba.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("before", [None, "ACTIVE"])
@pytest.mark.parametrize("command", ["train --steps 1 --data", "finetune --output model"])
def test_openmp_is_told_before_pytorch_is_imported(
    command: str, before: str | None, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if before is not None:
        environment["OMP_WAIT_POLICY"] = before
    words = (*command.split(), "no-such-file")
    done = processes.python("-c", PROGRAM, *words, env=environment, cwd=tmp_path)
    assert done.stderr.split() == [before or "PASSIVE"]
