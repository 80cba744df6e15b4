"""How many processors a process may use, as control groups of both versions say it."""

from pathlib import Path

import pytest

from anymamba import processors
from anymamba.processors import available_processors, quota_of_processors


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2, V1 = "0::/a/b\n", "5:cpu,cpuacct:/a/b\n4:memory:/a\n"
TOP = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (V2, {f"{TOP}/a/b/cpu.max": "150000 100000\n"}, 1.5),
        (V2, {f"{TOP}/a/b/cpu.max": "max 100000\n"}, None),
        # a group around it is stricter
        (V2, {f"{TOP}/a/b/cpu.max": "400000 100000", f"{TOP}/a/cpu.max": "200000 100000"}, 2.0),
        # a container that sees its own group as the top
        (V2, {f"{TOP}/cpu.max": "50000 100000"}, 0.5),
        (V2, {f"{TOP}/cpu.max": "nonsense"}, None),
        (V2, {f"{TOP}/cpu.max": "100000 0"}, None),
        (V2, {f"{TOP}/unified/a/b/cpu.max": "300000 100000"}, 3.0),
        (
            V1,
            {
                f"{TOP}/cpu,cpuacct/a/b/cpu.cfs_quota_us": "250000",
                f"{TOP}/cpu,cpuacct/a/b/cpu.cfs_period_us": "100000",
            },
            2.5,
        ),
        (
            V1,
            {f"{TOP}/cpu/cpu.cfs_quota_us": "100000", f"{TOP}/cpu/cpu.cfs_period_us": "50000"},
            2.0,
        ),
        (V1, {f"{TOP}/cpu/cpu.cfs_quota_us": "-1", f"{TOP}/cpu/cpu.cfs_period_us": "50000"}, None),
        (
            "0::/../outside\n",
            {f"{TOP}/cpu.max": "100000 100000", "sys/fs/outside/cpu.max": "1 1"},
            1.0,
        ),
        ("", {}, None),
    ],
)
def test_the_strictest_quota_of_a_group_and_those_around_it(tmp_path, groups, files, expected):
    root = write(tmp_path, {"proc/self/cgroup": groups, **files})
    assert quota_of_processors(root) == expected


@pytest.mark.parametrize(
    ("quota", "expected"), [(None, 4), (0.2, 1), (1.4, 1), (1.6, 2), (3.0, 3), (64.0, 4)]
)
def test_a_quota_limits_the_processors(monkeypatch, quota, expected):
    monkeypatch.setattr(processors, "_fast_processors", lambda: 4)
    monkeypatch.setattr(processors, "quota_of_processors", lambda: quota)
    assert available_processors() == expected
