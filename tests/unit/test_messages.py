"""Parts of error messages."""

from __future__ import annotations

import pytest

from nbody_pyg.messages import check_choice, nearest, printable, short, symbols


def test_nearest():
    assert nearest("chanels", ["lmax", "channels"], "model.") == "did you mean model.channels?"
    assert nearest("xyz", ["lmax", "channels"]) == "there are lmax, channels"


def test_choices():
    assert check_choice("mode", "fast", ("slow", "fast")) == "fast"
    for wrong, hint in (("fats", "did you mean fast?"), ("xyz", "try 'slow'"), (3, "try 'slow'")):
        with pytest.raises(ValueError) as error:
            check_choice("mode", wrong, ("slow", "fast"))
        assert str(error.value) == f"mode must be one of slow, fast, got {wrong!r}; {hint}"


def test_what_is_shown():
    assert symbols([1, 8, 0, 200]) == "H, O, element 0, element 200"
    assert printable("a\x1b[2Jb\n") == "a\\x1b[2Jb\\n"
    assert short([1, 2]) == "[1, 2]" and len(short(list(range(100)))) == 60 and short("x" * 99).endswith("...")
