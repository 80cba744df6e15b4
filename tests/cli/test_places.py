"""What `quantize`, `convert` and `merge` read and write, by place or by name; and other names."""

from __future__ import annotations

from itertools import permutations

import pytest

from anymamba.cli.commands.training.train import settings_of
from anymamba.cli.main import build_parser
from anymamba.cli.options.model import places_of
from anymamba.errors import InputError

COMMANDS = {"quantize": "--model", "convert": "--model", "merge": "--adapter"}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("source_by_name", [False, True])
@pytest.mark.parametrize("destination_by_name", [False, True])
def test_places_are_found_wherever_they_stand(
    command: str, source_by_name: bool, destination_by_name: bool
) -> None:
    source = [COMMANDS[command], "from"] if source_by_name else ["from"]
    destination = ["--output", "to"] if destination_by_name else ["to"]
    for order in permutations([source, destination, ["--offline"]]):
        by_place = not (source_by_name or destination_by_name)
        if by_place and order.index(source) > order.index(destination):
            continue  # without names, the order says which is which
        words = [word for part in order for word in part]
        arguments = build_parser([command]).parse_args([command, *words])
        assert places_of(arguments) == ("from", "to"), words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "SRC is missing"),
        (["a"], "DST is missing"),
        (["-o", "b"], "SRC is missing"),
        (["a", "b", "c"], "'c' is one argument too many"),
        (["a", "b", "--output", "c"], "'b' is one argument too many"),
    ],
)
def test_wrong_places_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        places_of(build_parser(["convert"]).parse_args(["convert", *words]))


@pytest.mark.parametrize(
    ("words", "of_finetune", "of_train"),
    [
        (["--batch", "3"], ("batch", 3), ("batch", 3)),
        (["--batch-size", "3"], ("batch", 3), ("batch", 3)),
        (["--steps", "3"], ("steps", 3), ("steps", 3)),
        (["--max-steps", "3"], ("steps", 3), ("steps", 3)),
        (["--accumulation", "3"], ("accumulation", 3), ("accumulation", 3)),
        (["--accumulate", "3"], ("accumulation", 3), ("accumulation", 3)),
        (["--window", "3"], ("window", 3), ("window", 3)),
        (["--max-length", "3"], ("window", 3), ("window", 3)),
        (["--validation", "v"], ("validation", ["v"]), ("validation_data", ["v"])),
        (["--validation-data", "v"], ("validation", ["v"]), ("validation_data", ["v"])),
        (["--model", "m"], ("model", "m"), ("model", "m")),
        (["-m", "m"], ("model", "m"), ("model", "m")),
    ],
)
def test_train_and_finetune_take_each_others_names(
    words: list[str], of_finetune: tuple[str, object], of_train: tuple[str, object]
) -> None:
    for command, (name, value) in (("finetune", of_finetune), ("train", of_train)):
        arguments = build_parser([command]).parse_args([command, "--output", "to", *words])
        found = settings_of(arguments) if command == "train" else arguments
        assert getattr(found, name) == value


@pytest.mark.parametrize(
    "words", [["a", "b"], ["--data", "a", "b"], ["a", "--data", "b"], ["a", "--steps", "1", "b"]]
)
def test_train_takes_texts_as_finetune_does(words: list[str]) -> None:
    assert settings_of(build_parser(["train"]).parse_args(["train", *words])).data == ["a", "b"]
