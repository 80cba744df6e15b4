"""`anymamba bench`: the table and its figures, not how large they are."""

import pytest

from anymamba.assets import bundled_model
from anymamba.cli import speed as module
from anymamba.cli.commands.evaluation.bench import default_threads
from anymamba.cli.speed import measure
from anymamba.cli.terminal.table import columns
from anymamba.runtime.loading import load

QUICK = ("--prompt-tokens", 8, "--new-tokens", 4, "--repeats", 1)


def test_a_row_for_each_kind_and_number_of_threads(anymamba):
    options = ("--weights", "f32", "int8", "f32", "--threads", 1, 2)
    done = anymamba("bench", *options, *QUICK, "--json")
    speeds = done.json["speeds"]
    rows = [(speed["weights"], speed["threads"]) for speed in speeds]
    assert rows == [("f32", 1), ("f32", 2), ("int8", 1), ("int8", 2)]
    assert done.json["model"] == "bundled"
    assert done.err == ""
    for speed in speeds:
        assert speed["prefill_tokens_per_second"] > 0
        share = speed["decode_tokens_per_second"] / speed["limit_tokens_per_second"]
        assert speed["share_of_limit"] == pytest.approx(share)
    assert speeds[0]["weight_bytes"] == load(weights="f32").weight_bytes
    assert speeds[2]["weight_bytes"] < speeds[0]["weight_bytes"] / 3


def test_a_table_for_people(tiny, anymamba):
    done = anymamba("bench", tiny, "--weights", "f32", "--threads", 1, *QUICK)
    head, row, legend = done.out.splitlines()
    assert head.split()[:3] == ["weights", "threads", "size"]
    assert row.split()[:2] == ["f32", "1"]
    assert "tokens a second" in legend
    assert done.err == "measuring f32 with 1 threads\n"


def test_speeds_are_tokens_over_medians_of_seconds(monkeypatch):
    engine = load(weights="f32", threads=1)
    seconds = iter([1.0, 10.0, 2.0, 20.0, 9.0, 90.0])
    monkeypatch.setattr(module, "seconds_of", lambda work: next(seconds))
    found = measure(engine, 1, prompt_tokens=100, new_tokens=40, repeats=3)
    assert found.prefill_tokens_per_second == 50
    assert found.decode_tokens_per_second == 2


def test_everything_that_is_timed_is_done(monkeypatch):
    """Neither an end token nor anything else ends the writing early."""
    engine = load(threads=1)
    engine.end_ids = tuple(range(256))
    pieces = []
    stream = engine.stream

    def listen(*arguments, **settings):
        for piece in stream(*arguments, **settings):
            pieces.append(piece)
            yield piece

    monkeypatch.setattr(engine, "stream", listen)
    measure(engine, 1, prompt_tokens=3, new_tokens=7, repeats=2)
    assert len(pieces) == 2 * 7


def test_threads_by_default():
    one, most = default_threads() if len(default_threads()) == 2 else (1, 1)
    assert one == 1 <= most


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("./nowhere",), "nowhere"),
        (("--weights", "int3"), "int3"),
        (("--threads", 0), "--threads"),
        (("--repeats", 0), "--repeats"),
    ],
)
def test_what_makes_no_sense_is_refused(options, named, anymamba):
    done = anymamba("bench", *options, *QUICK, "--json")
    assert named in done.complaint


def test_columns_of_numbers_stand_at_their_right():
    rows = [("name", "n"), ("a", "1,000"), ("bcdef", "2")]
    assert columns(rows) == "name       n\na      1,000\nbcdef      2"


def test_of_a_quantized_model_its_own_kind_is_measured(tmp_path, anymamba):
    folder = tmp_path / "int4"
    assert anymamba("quantize", bundled_model(), folder).status == 0
    speeds = anymamba("bench", folder, "--threads", 1, *QUICK, "--json").json["speeds"]
    assert [speed["weights"] for speed in speeds] == ["int4"]
    asked = ("--weights", "bf16", "int4", "--threads", 1)
    speeds = anymamba("bench", folder, *asked, *QUICK, "--json").json["speeds"]
    assert [speed["weights"] for speed in speeds] == ["bf16", "int4"]
    # Nothing is measured in vain.
    done = anymamba("bench", folder, "--weights", "f32", "int8", "--threads", 1, *QUICK)
    assert "int4 already" in done.complaint
