"""`anymamba quantize`: fewer bits on disk, once."""

import json

import pytest

from anymamba.assets import bundled_model
from tests.support.files import write_model

TEXT = "ROMEO:\nWhat is thy name?\n\nJULIET:\nI have forgot why I did call thee back.\n"


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def weights_of(folder):
    return (folder / "model.safetensors").stat().st_size


def test_sizes_and_perplexities_are_told(text, tmp_path, anymamba):
    folder = tmp_path / "int8"
    options = ("--weights", "int8", "--score", text, "--json")
    facts = anymamba("quantize", bundled_model(), folder, *options).json
    assert facts["destination"] == str(folder)
    assert facts["source_bytes"] == weights_of(bundled_model())
    assert facts["destination_bytes"] == weights_of(folder) < 0.7 * facts["source_bytes"]
    for name, model in (("before", bundled_model()), ("after", folder)):
        scored = anymamba("score", text, "--model", model, "--json").json
        assert facts[f"perplexity_{name}"] == scored["perplexity"]
    # The bound for int8 is 0.3 % on a long text; on a short one chance adds some.
    assert facts["perplexity_after"] == pytest.approx(facts["perplexity_before"], rel=0.02)


def test_a_table_for_people(text, tmp_path, anymamba):
    done = anymamba("quantize", bundled_model(), tmp_path / "int4", "--score", text)
    assert done.status == 0, done.err
    lines = {line.split()[0]: line for line in done.out.splitlines()}
    assert str(tmp_path / "int4") in lines["written"]
    assert lines["weights"].endswith("%)")
    assert "before" in lines["perplexity"]


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(("kind", "group"), [("int8", 64), ("int4", 32), ("int4", 128)])
def test_the_format_is_the_one_asked_for(kind, group, offset, tmp_path, anymamba):
    options = ("--weights", kind, "--group", group, *(["--offset"] if offset else []))
    done = anymamba("quantize", bundled_model(), tmp_path / "q", *options)
    assert done.status == 0, done.err
    fields = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert fields["bits"] == int(kind[3])
    assert fields["group_size"] == group
    assert fields["symmetric"] is not offset
    facts = anymamba("info", tmp_path / "q", "--json").json
    assert facts["quantization"] == fields
    assert facts["parameters"] == anymamba("info", bundled_model(), "--json").json["parameters"]
    assert f"{kind[3]} bits in groups of {group}" in anymamba("info", tmp_path / "q").out
    options = ("--model", tmp_path / "q", "--max-new-tokens", 4)
    assert anymamba("generate", "ROMEO:", *options).status == 0


@pytest.mark.slow
def test_a_text_may_choose_the_rounding(text, tmp_path, anymamba):
    options = ("--calibrate", text, "--json")
    assert anymamba("quantize", bundled_model(), tmp_path / "q", *options).status == 0
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_config"]["calibrated"] is True


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--weights", "f32"), "f32"),
        (("--group", "48"), "48"),
        (("--calibrate", "./nowhere.txt"), "nowhere"),
        (("--score", "./nowhere.txt"), "nowhere"),
    ],
)
def test_what_makes_no_sense_is_refused(options, named, tmp_path, anymamba):
    complaint = anymamba("quantize", bundled_model(), tmp_path / "q", *options).complaint
    assert named in complaint
    assert not (tmp_path / "q").exists()


def test_nothing_is_replaced_unasked(tmp_path, anymamba):
    (tmp_path / "q").mkdir()
    write_model(tmp_path / "q")
    command = ("quantize", bundled_model(), tmp_path / "q")
    assert str(tmp_path / "q") in anymamba(*command).complaint
    assert anymamba(*command, "--overwrite").status == 0
    assert str(tmp_path / "q") in anymamba("quantize", tmp_path / "q", tmp_path / "again").complaint


def test_a_text_too_short_to_score_is_refused_before_anything_is_written(tmp_path, anymamba):
    (tmp_path / "a.txt").write_text("a")
    folder = tmp_path / "out"
    done = anymamba("quantize", bundled_model(), folder, "--score", tmp_path / "a.txt")
    assert "too short" in done.complaint
    assert not folder.exists()


def test_standard_input_cannot_be_read_twice(tmp_path, anymamba):
    options = ("--calibrate", "-", "--score", "-")
    assert "only once" in anymamba("quantize", bundled_model(), tmp_path / "a", *options).complaint
    assert "only once" in anymamba("ingest", "-", "-", "--save-state", tmp_path / "b").complaint
