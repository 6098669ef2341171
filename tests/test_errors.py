"""Checks of arguments and their messages."""

import numpy as np
import pytest

from ranjax.errors import DivergedError, UserError, check_choice, check_size, fitting, flag, is_choice, is_size


def test_a_choice_is_one_of_the_values_by_name_or_identity():
    check_choice("cell", "ran", ("ran", "lstm"))
    check_choice("tie", None, ("x", None))
    assert is_choice(True, (True, False))
    assert not is_choice(1, (True, False))
    assert not is_choice(np.array(["ran"]), ("ran",))
    with pytest.raises(ValueError, match=r"`cell` must be one of 'ran', 'lstm'; got 'xlstm' with gates='input'\."):
        check_choice("cell", "xlstm", iter(("ran", "lstm")), " with gates='input'")


@pytest.mark.parametrize("size", [1, 2**40, np.int64(3)])
def test_whole_numbers_from_1_are_sizes(size):
    check_size("features", size)
    assert is_size(size)


@pytest.mark.parametrize("size", [0, -1, 1.0, True, "3", None, np.float32(2), np.array([2])])
def test_other_values_are_no_sizes(size):
    assert not is_size(size)
    with pytest.raises(ValueError, match="`features` must be a whole number, at least 1; got "):
        check_size("features", size)


def test_an_optional_size_may_be_none():
    check_size("features", None, optional=True)
    with pytest.raises(ValueError, match="at least 1, or None; got 0"):
        check_size("features", 0, optional=True)
    assert is_size(0, least=0)


def test_an_error_of_a_vocabulary_names_the_text():
    with pytest.raises(UserError, match=r"^the prompt does not fit the model: no such word$"), fitting("the prompt"):
        raise UserError("no such word")
    with pytest.raises(KeyError), fitting("the prompt"):
        raise KeyError("x")


def test_errors_that_a_user_can_mend_are_value_errors():
    assert issubclass(DivergedError, UserError)
    assert issubclass(UserError, ValueError)
    assert flag("batch_size") == "--batch-size"
