"""What `quantize`, `convert` and `merge` read and write, by place or by name; and other names."""

from itertools import permutations

import pytest

from anymamba.cli.main import parse
from anymamba.cli.options.places import places_of
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
        assert places_of(parse([command, *words])[1]) == ("from", "to"), words


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
        places_of(parse(["convert", *words])[1])


@pytest.mark.parametrize(
    ("words", "of_finetune", "of_train"),
    [
        (["--batch", "3"], ("batch_size", 3), ("batch", 3)),
        (["--batch-size", "3"], ("batch_size", 3), ("batch", 3)),
        (["--steps", "3"], ("max_steps", 3), ("steps", 3)),
        (["--max-steps", "3"], ("max_steps", 3), ("steps", 3)),
        (["--accumulation", "3"], ("accumulate", 3), ("accumulation", 3)),
        (["--accumulate", "3"], ("accumulate", 3), ("accumulation", 3)),
        (["--window", "3"], ("max_length", 3), ("window", 3)),
        (["--max-length", "3"], ("max_length", 3), ("window", 3)),
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
        module, options = parse([command, "--output", "to", *words])
        settings = module.settings_of(options)
        assert getattr(settings if hasattr(settings, name) else options, name) == value


@pytest.mark.parametrize(
    "words", [["a", "b"], ["--data", "a", "b"], ["a", "--data", "b"], ["a", "--steps", "1", "b"]]
)
def test_train_takes_texts_as_finetune_does(words: list[str]) -> None:
    module, options = parse(["train", *words])
    assert module.settings_of(options).data == ["a", "b"]
