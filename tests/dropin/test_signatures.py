"""Every public name of the drop-in has the arguments and defaults that docs/drop-in.md lists."""

import pytest

from tests.dropin.surface import listed, modules, signatures

LISTED = listed()


def test_the_page_lists_every_module() -> None:
    assert set(LISTED) == set(modules())


@pytest.mark.parametrize("name", LISTED)
def test_the_page_lists_every_name_as_it_is(name: str) -> None:
    assert [row for row, _ in LISTED[name]] == signatures(modules()[name])


@pytest.mark.parametrize("name", LISTED)
def test_each_row_says_whether_something_differs(name: str) -> None:
    assert all(remark.strip() for _, remark in LISTED[name])
