"""Settings come from flags, then the environment, then the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxroute.config import (
    Secret,
    Settings,
    load_settings,
    read_key,
    read_never_send,
    read_prices,
)
from mlxroute.config.settings import declared_settings
from mlxroute.config.settings_page import settings_page
from mlxroute.errors import ConfigError
from mlxroute.types import Prices


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_override_the_environment_which_overrides_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, 'small = "file"\nthreshold = 1\nmax_tokens = 10\n')
    environ = {"MLXROUTE_THRESHOLD": "2", "MLXROUTE_MAX_TOKENS": "20"}
    settings = load_settings({"max_tokens": 30, "seed": None}, environ=environ, path=path)
    assert (settings.small, settings.threshold, settings.max_tokens) == ("file", 2.0, 30)
    assert settings.seed is None


def test_a_threshold_and_a_budget_replace_each_other(tmp_path: Path) -> None:
    path = write(tmp_path, 'budget = "7%"\n')
    assert load_settings({}, environ={}, path=path).budget == 0.07
    settings = load_settings({"threshold": 1.0}, environ={}, path=path)
    assert (settings.threshold, settings.budget) == (1.0, None)
    settings = load_settings({}, environ={"MLXROUTE_BUDGET": "0.03"}, path=path)
    assert (settings.threshold, settings.budget) == (None, 0.03)
    with pytest.raises(ConfigError, match="exclude each other"):
        load_settings({"threshold": 1.0, "budget": 0.1}, environ={}, path=path)


@pytest.mark.parametrize("value", ['"7"', '"x%"', '"-1%"', "true"])
def test_a_budget_that_is_no_share_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"budget|share"):
        load_settings({}, environ={}, path=write(tmp_path, f"budget = {value}\n"))


def test_without_a_file_the_defaults_apply(tmp_path: Path) -> None:
    assert load_settings({}, environ={}, path=tmp_path / "none.toml") == Settings()


def test_openai_base_url_sets_the_large_server(tmp_path: Path) -> None:
    environ = {"OPENAI_BASE_URL": "http://one/v1"}
    assert load_settings({}, environ=environ, path=tmp_path / "x").large == "http://one/v1"
    environ["MLXROUTE_LARGE"] = "http://two/v1"
    assert load_settings({}, environ=environ, path=tmp_path / "x").large == "http://two/v1"


def test_an_unknown_key_is_named_with_the_file_and_a_near_match(tmp_path: Path) -> None:
    path = write(tmp_path, "treshold = 1.0\n")
    with pytest.raises(ConfigError, match=r"'treshold' .*config\.toml.*'threshold'"):
        load_settings({}, environ={}, path=path)


@pytest.mark.parametrize(
    "line", ['threshold = "abc"', "max_tokens = 1.5", "max_tokens = true", "small = 3", "x ="]
)
def test_a_value_of_the_wrong_type_or_bad_toml_is_one_clear_error(
    tmp_path: Path, line: str
) -> None:
    with pytest.raises(ConfigError, match=r"config\.toml"):
        load_settings({}, environ={}, path=write(tmp_path, line))


def test_a_bad_environment_value_names_its_variable(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="MLXROUTE_THRESHOLD"):
        load_settings({}, environ={"MLXROUTE_THRESHOLD": "abc"}, path=tmp_path / "x")


def test_the_file_can_set_stop_strings_and_booleans(tmp_path: Path) -> None:
    path = write(tmp_path, 'stop = ["a", "b"]\noffline = true\n')
    settings = load_settings({}, environ={"MLXROUTE_STRICT": "true"}, path=path)
    assert (settings.stop, settings.offline, settings.strict) == (("a", "b"), True, True)


def test_a_key_never_shows_in_repr_or_text() -> None:
    secret = Secret("sk-very-secret")
    assert "very-secret" not in f"{secret!r} {secret} {[secret]}"
    assert secret.reveal() == "sk-very-secret"


def test_a_chosen_key_overrides_openai_api_key(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("from-file\n")
    file.chmod(0o600)
    environ = {"OPENAI_API_KEY": "ambient", "NAMED": "from-named"}

    def key(settings: Settings) -> str | None:
        secret = read_key(settings, environ)
        return secret.reveal() if secret else None

    assert key(Settings()) == "ambient"
    assert key(Settings(key_file=str(file))) == "from-file"
    assert key(Settings(key_env="NAMED")) == "from-named"
    assert key(Settings(key_env="NAMED", key_file=str(file))) == "from-named"
    assert read_key(Settings(), {}) is None


def test_a_key_file_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("k")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_key(Settings(key_file=str(file)), {})


def test_a_named_key_variable_that_is_not_set_is_an_error() -> None:
    with pytest.raises(ConfigError, match="MY_KEY"):
        read_key(Settings(key_env="MY_KEY"), {})


def test_a_key_given_in_place_of_a_variables_name_is_not_repeated() -> None:
    with pytest.raises(ConfigError, match="is not set") as caught:
        read_key(Settings(key_env="sk-proj-123"), {})
    assert caught.value.parameter == "key_env"
    assert "123" not in str(caught.value)


def test_never_send_patterns_add_up_over_all_sources(tmp_path: Path) -> None:
    path = write(tmp_path, 'never_send = ["one"]\nnever_send_file = "a"\n')
    environ = {"MLXROUTE_NEVER_SEND": "two"}
    flags = {"never_send": ("three",), "never_send_file": ("b",)}
    settings = load_settings(flags, environ=environ, path=path)
    assert settings.never_send == ("one", "two", "three")
    assert settings.never_send_file == ("a", "b")


def test_a_never_send_file_has_a_pattern_per_line(tmp_path: Path) -> None:
    file = tmp_path / "private"
    file.write_bytes(b"\xef\xbb\xbffirst\r\n\n  # a comment\n  b#c  \n\\bcaf\xc3\xa9\n")
    settings = Settings(never_send=("zero",), never_send_file=(str(file),))
    patterns = [pattern.pattern for pattern in read_never_send(settings)]
    assert patterns == ["zero", "first", "b#c", "\\bcafé"]


def test_the_error_for_a_bad_pattern_names_it_or_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"never_send '\(x' is not a regular expression"):
        read_never_send(Settings(never_send=("ok", "(x")))
    file = tmp_path / "private"
    file.write_text("fine\n\nhidden(\n")
    with pytest.raises(ConfigError, match=r"row 3 of .*private is not a regular") as caught:
        read_never_send(Settings(never_send_file=(str(file),)))
    assert "hidden" not in str(caught.value)


def test_a_never_send_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    for name, reason in [("missing", "No such file"), ("latin", "not UTF-8"), (".", "directory")]:
        with pytest.raises(ConfigError, match=reason):
            read_never_send(Settings(never_send_file=(str(tmp_path / name),)))


def test_prices_come_from_the_settings(tmp_path: Path) -> None:
    path = write(tmp_path, "price_input = 2\nprice_output = 8.0\n")
    environ = {"MLXROUTE_PRICE_CACHED_INPUT": "0.5"}
    assert read_prices(load_settings({}, environ=environ, path=path)) == Prices(2.0, 0.5, 8.0)
    assert read_prices(load_settings({}, environ={}, path=path)) == Prices(2.0, 2.0, 8.0)
    assert read_prices(Settings()) is None


@pytest.mark.parametrize(
    "settings",
    [
        Settings(price_input=1.0),
        Settings(price_output=1.0),
        Settings(price_cached_input=1.0),
        Settings(price_input=-1.0, price_output=1.0),
        Settings(price_input=float("nan"), price_output=1.0),
        Settings(price_input=1.0, price_output=float("inf")),
    ],
)
def test_incomplete_or_invalid_prices_are_refused(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="price"):
        read_prices(settings)


def test_the_page_of_all_settings_is_up_to_date() -> None:
    page = Path(__file__).parents[1] / "docs" / "settings.md"
    assert page.read_text(encoding="utf-8") == settings_page(), (
        "docs/settings.md differs from the declared settings; write settings_page() to it"
    )


def test_every_setting_has_a_help_text_a_variable_and_a_flag_or_none() -> None:
    for name, setting in declared_settings().items():
        assert setting.help.endswith(".")
        assert setting.variables[0] == f"MLXROUTE_{name.upper()}"
        assert setting.default == getattr(Settings(), name)
        assert bool(setting.commands) != name.startswith("price_")
