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
from mlxroute.config.client_keys import read_client_keys
from mlxroute.config.declarations import Setting
from mlxroute.config.settings import declared_settings
from mlxroute.config.settings_page import settings_page
from mlxroute.errors import ConfigError, UsageError
from mlxroute.types import Prices
from mlxroute.types.limits import LIMITS


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


@pytest.mark.parametrize(
    ("flags", "environ", "text", "error", "both"),
    [
        ({"threshold": 1.0, "budget": 0.1}, {}, "", UsageError, "--threshold and --budget"),
        (
            {},
            {"MLXROUTE_BUDGET": "5%", "MLXROUTE_THRESHOLD": "1"},
            "",
            ConfigError,
            "the environment variables MLXROUTE_THRESHOLD and MLXROUTE_BUDGET",
        ),
        (
            {},
            {},
            'budget = "5%"\nthreshold = 1\n',
            ConfigError,
            r"threshold and budget in the config file .*config\.toml",
        ),
        ({"key_env": "A", "key_file": "b"}, {}, "", UsageError, "--key-env and --key-file"),
        ({"router": "entropy", "head": "h"}, {}, "", UsageError, "--router and --head"),
        (
            {},
            {},
            'router = "logu"\nhead = "h"\n',
            ConfigError,
            r"router and head in the config file .*config\.toml",
        ),
    ],
)
def test_settings_of_one_source_that_exclude_each_other_are_refused_by_their_names(
    flags: dict[str, object],
    environ: dict[str, str],
    text: str,
    error: type[Exception],
    both: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=f"^{both} exclude each other; set one of them$"):
        load_settings(flags, environ=environ, path=write(tmp_path, text))


def test_a_head_replaces_the_router_of_an_earlier_source(tmp_path: Path) -> None:
    path = write(tmp_path, 'router = "logu"\n')
    environ = {"MLXROUTE_ROUTER": "margin"}
    assert load_settings({}, environ=environ, path=path).router == "margin"
    assert load_settings({"head": "h.safetensors"}, environ=environ, path=path).router is None


def test_the_router_head_goes_with_a_head(tmp_path: Path) -> None:
    path = write(tmp_path, 'router = "head"\nhead = "mine.safetensors"\n')
    settings = load_settings({}, environ={}, path=path)
    assert (settings.router, settings.head) == ("head", "mine.safetensors")


def test_a_key_file_and_a_key_variable_replace_each_other(tmp_path: Path) -> None:
    path = write(tmp_path, 'key_env = "CORP_KEY"\n')
    settings = load_settings({"key_file": "other.key"}, environ={}, path=path)
    assert (settings.key_env, settings.key_file) == (None, "other.key")
    path = write(tmp_path, 'key_file = "corp.key"\n')
    settings = load_settings({"key_env": "OPENAI_API_KEY"}, environ={}, path=path)
    assert (settings.key_env, settings.key_file) == ("OPENAI_API_KEY", None)


def test_another_server_does_not_keep_the_model_of_an_earlier_source(tmp_path: Path) -> None:
    path = write(tmp_path, 'large = "https://corp/v1"\nlarge_model = "huge"\n')
    environ = {"OPENAI_BASE_URL": "https://other/v1"}
    assert load_settings({}, environ={}, path=path).large_model == "huge"
    assert load_settings({}, environ=environ, path=path).large_model is None
    environ["MLXROUTE_LARGE_MODEL"] = "mine"
    assert load_settings({}, environ=environ, path=path).large_model == "mine"
    assert load_settings({"large_model": "x"}, environ={}, path=path).large_model == "x"
    flags = {"large": "https://corp/v1"}
    assert load_settings(flags, environ={}, path=path).large_model == "huge"


def test_another_server_does_not_keep_the_prices_of_an_earlier_source(tmp_path: Path) -> None:
    prices = "price_input = 2\nprice_cached_input = 1\nprice_output = 8\n"
    flags = {"large": "https://other/v1"}
    path = write(tmp_path, prices)
    assert read_prices(load_settings(flags, environ={}, path=path)) is not None
    path = write(tmp_path, 'large = "https://corp/v1"\n' + prices)
    assert read_prices(load_settings({}, environ={}, path=path)) is not None
    assert read_prices(load_settings(flags, environ={}, path=path)) is None
    environ = {"MLXROUTE_PRICE_INPUT": "3", "MLXROUTE_PRICE_OUTPUT": "4"}
    environ["MLXROUTE_LARGE"] = "https://other/v1"
    of_environment = read_prices(load_settings({}, environ=environ, path=path))
    assert of_environment == Prices(input=3.0, cached_input=3.0, output=4.0)


def test_another_server_is_checked_by_the_authorities_of_an_earlier_source(tmp_path: Path) -> None:
    path = write(tmp_path, 'large = "https://corp/v1"\nca_bundle = "corp.pem"\n')
    flags = {"large": "https://other.corp/v1"}
    assert load_settings(flags, environ={}, path=path).ca_bundle == "corp.pem"


@pytest.mark.parametrize(
    ("flags", "environ", "text", "server"),
    [
        ({"large": "b"}, {}, 'large = "a"\nkey_env = "K"\n', "a"),
        ({"large": "b"}, {"MLXROUTE_LARGE": "a"}, 'key_env = "K"\n', "a"),
        ({"large": "b"}, {"MLXROUTE_KEY_FILE": "k"}, 'large = "a"\n', "a"),
        ({}, {"MLXROUTE_LARGE": "b"}, 'large = "a"\nkey_env = "K"\n', "a"),
        # OPENAI_API_KEY belongs to the environment.
        ({"large": "b"}, {}, 'large = "a"\n', "a"),
        ({}, {"OPENAI_BASE_URL": "b"}, 'large = "a"\n', "b"),
        ({"large": "b", "key_env": "K"}, {}, 'large = "a"\n', "b"),
        # The address of the same command line may be an argument.
        ({"key_file": "k"}, {}, 'large = "a"\n', None),
        ({"large": "b"}, {}, 'key_env = "K"\n', None),
    ],
)
def test_a_key_is_meant_for_the_server_that_was_set_where_it_is_named(
    flags: dict[str, object],
    environ: dict[str, str],
    text: str,
    server: str | None,
    tmp_path: Path,
) -> None:
    settings = load_settings(flags, environ=environ, path=write(tmp_path, text))
    assert settings.key_server == server


@pytest.mark.parametrize("value", ['"7"', '"x%"', '"-1%"', "true"])
def test_a_budget_that_is_no_share_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"budget|share"):
        load_settings({}, environ={}, path=write(tmp_path, f"budget = {value}\n"))


def test_without_a_file_the_defaults_apply(tmp_path: Path) -> None:
    assert load_settings({}, environ={}, path=tmp_path / "none.toml") == Settings()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('max_tokens = "a"', "must be an integer, not 'a'"),
        ("max_tokens = 2.0", r"must be an integer, not 2\.0"),
        ("temperature = true", "must be a number, not true"),
        ("strict = 1", "must be true or false, not 1"),
        ("small = 3", "must be a text, not 3"),
        ("small = 2020-01-01", "must be a text, not 2020-01-01"),
        ("small = 07:32:00", "must be a text, not 07:32:00"),
        ("small = 1979-05-27T07:32:00Z", r"must be a text, not 1979-05-27T07:32:00\+00:00"),
        ("never_send = [1, true]", r"must be a text or a list of texts, not \[1, true\]"),
        ('never_send = ["(x"]', r": '\(x' is not a regular expression"),
        ('budget = "700%"', "must be a share from 0% to 100%, such as 7% or 0.07, not '700%'"),
        ("budget = 7", "must be a share from 0% to 100%, such as 7% or 0.07, not 7"),
        ("temperature = -1", "must be at least 0, and finite, not -1"),
        ("temperature = nan", "must be at least 0, and finite, not nan"),
        (f"temperature = 1{'0' * 400}", "must be at least 0, and finite, not inf"),
        ("threshold = nan", "must be a number, inf or -inf, not nan"),
        ("timeout = 0", "must be above 0 and at most 86400 seconds, not 0"),
        ("seed = -1", r"must be from 0 to 2\^64 - 1, not -1"),
        ("port = 70000", "must be from 0 to 65535, not 70000"),
        ("cache_memory = nan", "must be from 0 to 1000000 GB, not nan"),
        ("max_running = 0", "must be at least 1, not 0"),
        ("price_input = -1", "must be a finite number of at least 0, per million tokens, not -1"),
        ('mode = "fast"', "must be one of auto, wait, overlap, hedge, not 'fast'"),
        ('router = "x"', "must be one of entropy, .*, not 'x'"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_file(
    tmp_path: Path, line: str, expected: str
) -> None:
    path = write(tmp_path, f"{line}\n")
    key = line.split()[0]
    with pytest.raises(
        ConfigError, match=f"^{key} in the config file .*toml ?{expected}"
    ) as caught:
        load_settings({}, environ={}, path=path)
    assert caught.value.parameter is None


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("MLXROUTE_BUDGET", "700%", " must be a share from 0% to 100%.*, not '700%'"),
        ("MLXROUTE_TEMPERATURE", "-1", " must be at least 0"),
        ("MLXROUTE_SEED", "9" * 5000, " must be an integer, not '9"),
        ("MLXROUTE_STRICT", "perhaps", " must be true or false"),
        ("MLXROUTE_MODE", "fast", " must be one of auto, "),
        ("MLXROUTE_NEVER_SEND", "(x", r": '\(x' is not a regular expression"),
        # As an env file with the line ends of Windows gives it.
        ("MLXROUTE_NEVER_SEND", "zebra\r", r": 'zebra\\r' has the control character '\\r'; "),
        ("MLXROUTE_NEVER_SEND", "Z\udcfcrich", ": 'Z\ufffdrich' has bytes that are not UTF-8; "),
    ],
)
def test_a_wrong_value_is_named_with_its_variable(
    variable: str, value: str, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"^the environment variable {variable}{expected}"):
        load_settings({}, environ={variable: value}, path=tmp_path / "x")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"temperature": -1.0}, "^temperature must be at least 0"),
        ({"never_send": ("ok", "(x")}, r"^never_send '\(x' is not a regular expression"),
        ({"never_send": ("a\tb\nc", "\x1b")}, r"^never_send '\\x1b' has the control character"),
        ({"never_send": ("zebra\n",)}, r"^never_send 'zebra\\n' has the control character '\\n'"),
    ],
)
def test_a_wrong_flag_is_named_as_a_parameter(
    flags: dict[str, object], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=expected) as caught:
        load_settings(flags, environ={}, path=tmp_path / "x")
    assert caught.value.parameter in flags


def test_a_config_file_that_the_environment_names_must_exist(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    with pytest.raises(ConfigError, match="No such file"):
        load_settings({}, environ={"MLXROUTE_CONFIG": str(path)}, path=path)


def test_bytes_of_the_environment_that_are_no_text_are_replaced(tmp_path: Path) -> None:
    environ = {"MLXROUTE_SYSTEM": "caf\udce9"}
    assert load_settings({}, environ=environ, path=tmp_path / "x").system == "caf\ufffd"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf\n", "is empty"),
        (b"sk-a\nsk-b\n", "holds no key"),
        (b"sk-\xc3\xa9", "holds no key"),
        (b"sk-a\0", "NUL"),
    ],
)
def test_a_key_file_without_a_key_is_refused_without_its_content(
    tmp_path: Path, data: bytes, reason: str
) -> None:
    file = tmp_path / "key"
    file.write_bytes(data)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match=f"the key file .*{reason}") as caught:
        read_key(Settings(key_file=str(file)), {})
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize("value", ["sk-a\nb", "sk-\udce9", "sk-…"])
def test_a_variable_that_holds_no_key_is_named(value: str) -> None:
    with pytest.raises(ConfigError, match="variable OPENAI_API_KEY holds no key") as caught:
        read_key(Settings(), {"OPENAI_API_KEY": value})
    assert "sk-" not in str(caught.value)


def test_a_key_that_not_every_client_can_send_is_refused_without_its_content(
    tmp_path: Path,
) -> None:
    key = "schlüssel-für-den-endpunkt"
    file = tmp_path / "keys"
    file.write_text(f"0123456789abcdef\n{key}\n", "utf-8")
    file.chmod(0o600)
    for settings in (Settings(client_key_file=str(file)), Settings(client_key_env="KEY")):
        with pytest.raises(ConfigError, match="a key of clients that not every client") as caught:
            read_client_keys(settings, {"KEY": key})
        assert key not in str(caught.value)


_PATHS = [item for item in declared_settings().values() if item.metavar in ("FILE", "DIR")]


@pytest.mark.parametrize("item", _PATHS, ids=lambda item: item.name)
def test_an_empty_path_is_refused_with_its_setting(item: Setting, tmp_path: Path) -> None:
    kind = "file" if item.metavar == "FILE" else "folder"
    path = write(tmp_path, f'{item.name} = ""\n')
    value = ("",) if item.kind is tuple else ""
    for flags, error, subject in (
        ({item.name: value}, UsageError, item.name),
        ({}, ConfigError, f"{item.name} in the config file {path}"),
    ):
        with pytest.raises(error, match=f"{subject} must be the name of a {kind}, not ''"):
            load_settings(flags, environ={}, path=path if not flags else tmp_path / "none")
    # An empty variable counts as not set.
    environ = {item.variables[0]: ""}
    settings = load_settings({}, environ=environ, path=tmp_path / "none")
    assert getattr(settings, item.name) == item.default


def test_comments_in_a_key_file_of_clients_are_no_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# keys-of-the-team\n\n  #0123456789abcdef\nfedcba9876543210#\n")
    file.chmod(0o600)
    keys = read_client_keys(Settings(client_key_file=str(file)), {})
    assert [key.reveal() for key in keys] == ["fedcba9876543210#"]
    file.write_text("# keys of the team\n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_client_keys(Settings(client_key_file=str(file)), {})


def test_a_key_of_clients_has_no_white_space(tmp_path: Path) -> None:
    key = "the keys of our team"
    file = tmp_path / "keys"
    file.write_text(key)
    file.chmod(0o600)
    for settings in (Settings(client_key_file=str(file)), Settings(client_key_env="KEY")):
        with pytest.raises(ConfigError, match="one key on each line") as caught:
            read_client_keys(settings, {"KEY": key})
        assert key not in str(caught.value)


def test_rows_of_a_never_send_file_end_at_line_feeds_only(tmp_path: Path) -> None:
    file = tmp_path / "private"
    file.write_bytes("a\u2028b\n".encode())
    settings = Settings(never_send_file=(str(file),))
    assert [pattern.pattern for pattern in read_never_send(settings)] == ["a\u2028b"]
    # Such a file would be one pattern that never matches.
    file.write_bytes(b"one\rtwo\r")
    with pytest.raises(ConfigError, match="carriage return"):
        read_never_send(settings)


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
    "text", ['[chat]\nsmall = "x"\n', '[small]\nname = "x"\n', "[[serve]]\nport = 1\n", "a.b = 1\n"]
)
def test_a_table_in_the_config_file_is_refused_as_one(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(
        ConfigError,
        match=r"^'\w+' in the config file .* is a table, and config files have no tables; write",
    ):
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


def test_the_place_of_a_value_is_kept_unless_a_flag_sets_it(tmp_path: Path) -> None:
    path = write(tmp_path, 'large = "a"\ncache_dir = "c"\nseed = 1\ntimeout = 5\n')
    environ = {"OPENAI_BASE_URL": "b", "MLXROUTE_SEED": "2"}
    assert load_settings({"timeout": 9.0}, environ=environ, path=path).origins == {
        "large": "OPENAI_BASE_URL",
        "cache_dir": f"cache_dir in the config file {path}",
        "seed": "MLXROUTE_SEED",
    }
    assert load_settings({}, environ={"MLXROUTE_LARGE": "b"}, path=path).origins["large"] == (
        "MLXROUTE_LARGE"
    )


def test_a_value_that_another_server_removes_has_no_place(tmp_path: Path) -> None:
    path = write(tmp_path, 'large = "http://a/v1"\nlarge_model = "mine"\n')
    assert set(load_settings({}, environ={}, path=path).origins) == {"large", "large_model"}
    assert not load_settings({"large": "http://b/v1"}, environ={}, path=path).origins


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


@pytest.mark.parametrize("name", ["MY_KEY", "OPENAI_API_KEY"])
def test_a_named_key_variable_that_is_not_set_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is not set"):
        read_key(Settings(key_env=name), {})


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
    ],
)
def test_incomplete_prices_are_refused(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="needs both price_input and price_output"):
        read_prices(settings)


@pytest.mark.parametrize("line", ["price_input = -1", "price_input = nan", "price_output = inf"])
def test_a_price_that_is_negative_or_not_finite_is_refused(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, line)
    with pytest.raises(ConfigError, match=r"price_\w+ in .* must be a finite number"):
        load_settings({}, environ={}, path=path)


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


def test_every_number_has_limits() -> None:
    numbers = {item.name for item in declared_settings().values() if item.kind in (int, float)}
    assert numbers <= LIMITS.keys()
