"""What a run computes with: recorded, and compared where it goes on."""

import jax
import pytest

from ranjax.errors import UserError
from ranjax.training import environment
from ranjax.training.environment import check_environment, save_environment


def test_a_run_goes_on_in_silence_where_nothing_has_changed(tmp_path, capsys):
    save_environment(tmp_path)
    check_environment(tmp_path)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "value"),
    [("jax_default_prng_impl", "rbg"), ("jax_enable_x64", True), ("jax_threefry_partitionable", False)],
)
def test_settings_that_would_be_another_training_are_refused(name, value, tmp_path):
    save_environment(tmp_path)
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        with pytest.raises(
            UserError, match=rf"began with {name} = {before}; here .* Resume with {name.upper()}={before}"
        ):
            check_environment(tmp_path)
    finally:
        jax.config.update(name, before)


def test_another_version_is_reported_once(tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(environment, "versions", lambda: {"jax": "0.0.1", "flax": "0.0.1", "optax": "0.0.1"})
        save_environment(tmp_path)
    check_environment(tmp_path)
    assert f"(jax 0.0.1 -> {jax.__version__}; flax 0.0.1" in capsys.readouterr().err
    check_environment(tmp_path)
    assert capsys.readouterr().err == ""
