"""CONTRIBUTING's table and picture of the rooms are those of the code."""

import re
from pathlib import Path

from tests.support.processes import module_from
from tests.test_layers import STRANGERS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_picture_is_current() -> None:
    rooms = module_from(ROOT / "docs" / "rooms.py", "rooms")
    assert rooms.PICTURE.read_text(encoding="utf-8") == rooms.picture(), "run docs/rooms.py"


def test_every_room_is_drawn() -> None:
    package = ROOT / "src" / "anymamba"
    folders = {file.parent.name for file in package.glob("*/__init__.py")}
    assert folders - {"assets"} == {*module_from(ROOT / "docs" / "rooms.py", "rooms").ANSWERS}


def test_the_table_says_what_the_layer_test_holds() -> None:
    answers = module_from(ROOT / "docs" / "rooms.py", "rooms").ANSWERS
    table = [
        f"| `{room}/` | {answers[room]} | {', '.join(f'`{name}`' for name in strangers)} |"
        for room, strangers in STRANGERS.items()
    ]
    expected = "| room | what it holds | must not import |\n| --- | --- | --- |\n"
    expected += "\n".join(table) + "\n"
    begin, end = "<!-- tests/test_layers.py -->\n\n", "<!-- end -->"
    assert PAGE.partition(begin)[2].partition(end)[0] == expected


def test_the_files_that_it_names_exist() -> None:
    """In the lists of how something is added, a file that is there already stands in code marks."""
    named = re.findall(r"`((?:src|core|tests|benchmarks|docs)/[\w./]+)`", PAGE)
    assert named
    for name in named:
        assert (ROOT / name).exists(), name
