"""The local server: its start, the errors when it fails, and its end with its parent."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import requests

from mlxroute.errors import ConfigError, LaunchError, NotEnoughSpace, WeightsError
from mlxroute.hosting import launcher, mlx_lm_child, server_choice
from mlxroute.hosting.launcher import LocalServer
from mlxroute.large import LargeModel
from mlxroute.large.dialects.mlx_lm import MlxLm
from tests.support.gguf_files import TinyModel, reference_logits, write_gguf
from tests.support.llama_cpp import needs_llama_cpp
from tests.support.tiny import make_tiny_model, teach_days


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_tiny_model(tmp_path_factory.mktemp("launcher") / "tiny-model", tied=False)
    teach_days(path)
    return path


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("launcher") / "tiny-model.gguf", TinyModel())


@pytest.fixture(params=["mlx", pytest.param("llama.cpp", marks=needs_llama_cpp)])
def model(request: pytest.FixtureRequest, tiny: Path, tiny_gguf: Path) -> Path:
    """The same test for both servers: a model directory and a GGUF file."""
    return tiny if request.param == "mlx" else tiny_gguf


def launch(path: Path, folder: Path, *, port: int | None = None) -> LocalServer:
    return LocalServer.launch(
        path, cache_dir=folder / "cache", log_path=folder / "logs" / "host.log", port=port
    )


def has_ended(pid: int) -> bool:
    """Return whether no process has this id; a child has one until its end was waited for."""
    return not psutil.pid_exists(pid)


def eventually(condition: Callable[[], bool]) -> bool:
    for _ in range(300):
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_a_started_server_generates_and_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    progress_calls: list[tuple[int, int | None]] = []
    with launch(model, tmp_path) as server:
        server.wait_until_ready(
            progress=lambda label, done, total: progress_calls.append((done, total))
        )
        models = requests.get(f"{server.url}/models", timeout=5).json()["data"]
        assert models[0]["id"].split("/")[-1] == "tiny-model"
        if model.is_dir():
            with LargeModel(server.url) as large:
                assert MlxLm.name in large.connect()
                assert large.model_name == "tiny-model"
        child = psutil.Process(server.pid)
        assert stat.S_IMODE(server.log_path.stat().st_mode) == 0o600
        assert os.getpgid(server.pid) != os.getpgrp()
    assert not child.is_running()
    assert progress_calls[-1][0] == progress_calls[-1][1]
    server.close()
    with pytest.raises(requests.ConnectionError):
        requests.get(server.url, timeout=5)


def test_the_mode_of_a_file_that_the_log_links_to_stays(tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "shared"
    target.touch()
    target.chmod(0o644)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "host.log").symlink_to(target)
    launch(tiny, tmp_path).close()
    assert stat.S_IMODE(target.stat().st_mode) == 0o644


@needs_llama_cpp
def test_llama_cpp_takes_and_returns_token_ids(tiny_gguf: Path, tmp_path: Path) -> None:
    with launch(tiny_gguf, tmp_path) as server:
        server.wait_until_ready()
        root = server.url.removesuffix("/v1")
        body = {"prompt": [65, 66], "n_predict": 1, "temperature": 0.0, "return_tokens": True}
        reply = requests.post(f"{root}/completion", json=body, timeout=30).json()
    assert reply["tokens"] == [int(reference_logits(tiny_gguf, [65, 66])[-1].argmax())]


def test_a_server_ends_with_its_parent_even_if_that_is_killed(model: Path, tmp_path: Path) -> None:
    """llama.cpp's while it serves; the other, which starts slowly, during its start."""
    program = (
        "import sys, time; from pathlib import Path\n"
        "from mlxroute.hosting.launcher import LocalServer\n"
        "folder = Path(sys.argv[2])\n"
        "server = LocalServer.launch(Path(sys.argv[1]), cache_dir=folder / 'cache',\n"
        "                            log_path=folder / 'host.log')\n"
        "if sys.argv[1].endswith('.gguf'):\n"
        "    server.wait_until_ready()\n"
        "sys.stdout.write(f'{server.pid}\\n'); sys.stdout.flush(); time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(model), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        child = psutil.Process(pid)
        assert child.is_running()
        parent.send_signal(signal.SIGKILL)
    # Its new parent may be slow to reap it; a zombie has ended too.
    assert eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_a_port_in_use_is_one_clear_line(model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"port {port} cannot be used \(.*in use\)"):
            launch(model, tmp_path, port=port)
    with pytest.raises(LaunchError, match="port 99999 cannot be used"):
        launch(model, tmp_path, port=99999)


def test_a_port_of_all_addresses_is_in_use_on_loopback(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]

        class Lenient(socket.socket):
            """Binds loopback beside all addresses, as macOS does."""

            def bind(self, address: object) -> None:
                super().bind(("127.0.0.1", 0))

        monkeypatch.setattr(socket, "socket", Lenient)
        with pytest.raises(LaunchError, match=rf"port {port} cannot be used \(.*in use\)"):
            launch(tiny, tmp_path, port=port)


def test_a_load_failure_names_the_reason_and_the_log(tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    with launch(broken, tmp_path) as server, pytest.raises(LaunchError) as caught:
        server.wait_until_ready()
    assert "unheard_of" in str(caught.value)
    assert str(tmp_path / "logs" / "host.log") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert has_ended(server.pid)


@needs_llama_cpp
def test_llama_cpps_first_error_is_the_reason_of_a_load_failure(tmp_path: Path) -> None:
    broken = write_gguf(tmp_path / "broken.gguf", TinyModel(architecture="unheard_of"))
    with launch(broken, tmp_path) as server, pytest.raises(LaunchError) as caught:
        server.wait_until_ready()
    assert "unheard_of" in str(caught.value)
    assert "exit code 1" in str(caught.value)
    assert str(tmp_path / "logs" / "host.log") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert has_ended(server.pid)


@needs_llama_cpp
def test_a_port_is_kept_until_llama_cpp_listens_on_it(tiny_gguf: Path, tmp_path: Path) -> None:
    with launch(tiny_gguf, tmp_path) as server:
        port = int(server.url.split(":")[2].split("/")[0])
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        server.wait_until_ready()
        assert requests.get(f"{server.url}/models", timeout=5).ok


def test_pages_of_web_sites_cannot_read_from_a_server(model: Path, tmp_path: Path) -> None:
    with launch(model, tmp_path) as server:
        server.wait_until_ready()
        page = {"Origin": "https://somewhere.example"}
        reply = requests.get(f"{server.url}/models", headers=page, timeout=5)
    assert "Access-Control-Allow-Origin" not in reply.headers


def test_mlx_lm_computes_nothing_for_pages_of_web_sites(tiny: Path, tmp_path: Path) -> None:
    with launch(tiny, tmp_path) as server:
        server.wait_until_ready()
        statuses = [
            _status_of_post(server, origin=origin)
            for origin in ("https://somewhere.example", "null", "http://[", "http://localhost:3000")
        ]
    assert statuses == [403, 403, 403, 200]


def test_mlx_lm_is_not_used_under_the_name_of_a_web_site(tiny: Path, tmp_path: Path) -> None:
    with launch(tiny, tmp_path) as server:
        server.wait_until_ready()
        hosts = ["evil.example:8081", "127.0.0.1.evil.example", "", "[", "localhost", "[::1]:8081"]
        statuses = [
            _status_of_post(server, host=host) for host in [*hosts, "host.docker.internal:8081"]
        ]
    assert statuses == [400, 400, 400, 400, 200, 200, 200]


def test_mlx_lm_answers_with_its_model_whatever_model_a_request_names(
    tiny: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with launch(tmp_path / "link", tmp_path) as server:
        server.wait_until_ready()
        (listed,) = requests.get(f"{server.url}/models", timeout=5).json()["data"]
        # It could not be loaded again.
        (tmp_path / "model").rename(tmp_path / "moved")
        for names in (
            {"model": "gpt-4o"},
            {"model": listed["id"]},
            {"adapters": "a", "draft_model": "b"},
            {},
        ):
            body = {"prompt": "a", "max_tokens": 1} | names
            assert requests.post(f"{server.url}/completions", json=body, timeout=60).ok


def test_mlx_lm_keeps_512_mib_of_earlier_kv_caches_and_always_the_last() -> None:
    import mlx.core as mx

    from mlxroute.small.kv_cache import plain_cache

    cache = mlx_lm_child._prompt_cache_class()(10)
    kept = []
    for number, mib in enumerate((300, 300, 200, 900, 100)):
        # Never evaluated, so they take no memory.
        half = mx.zeros((1, 1, mib * 512, 256))
        layer = plain_cache(half, half, mib * 512)
        kind = "assistant" if number else "user"
        cache.insert_cache("model", [number], [layer], cache_type=kind)
        kept.append((len(cache), cache.nbytes // 2**20))
    assert kept == [(1, 300), (1, 300), (2, 500), (1, 900), (1, 100)]


def _status_of_post(
    server: LocalServer, *, origin: str = "http://localhost:3000", host: str | None = None
) -> int:
    """Send a request in one piece: the server closes the connection on a body that is not read."""
    address = urlsplit(server.url)
    body = b'{"prompt": "a", "max_tokens": 1}'
    head = (
        f"POST {address.path}/completions HTTP/1.1\r\n"
        f"Host: {address.netloc if host is None else host}\r\nOrigin: {origin}\r\n"
        f"Content-Type: text/plain\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((address.hostname, address.port), timeout=60) as client:
        client.sendall(head.encode() + body)
        return int(client.makefile("rb").readline().split()[1])


def test_a_missing_llama_cpp_is_one_clear_line(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_choice, "find_spec", lambda name: None)
    with pytest.raises(LaunchError, match="run `pip install xllamacpp`") as caught:
        launch(tiny_gguf, tmp_path)
    assert caught.value.parameter == "engine"
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (4, 2), (8, 4), (16, 8)])
def test_llama_cpp_leaves_cores_to_the_small_model(cores: int, threads: int) -> None:
    assert server_choice.server_threads(cores) == threads


def test_a_child_that_dies_while_starting_is_reported(tiny: Path, tmp_path: Path) -> None:
    with launch(tiny, tmp_path) as server:

        def kill(label: str, done: int, total: int | None) -> None:
            psutil.Process(server.pid).kill()

        with pytest.raises(LaunchError, match="killed, possibly because memory ran out"):
            server.wait_until_ready(progress=kill)
    assert has_ended(server.pid)


@needs_llama_cpp
def test_llama_cpps_end_while_starting_is_reported(tiny_gguf: Path, tmp_path: Path) -> None:
    with launch(tiny_gguf, tmp_path) as server:
        psutil.Process(server.pid).kill()
        with pytest.raises(LaunchError, match="killed, possibly because memory ran out"):
            server.wait_until_ready()
    assert has_ended(server.pid)


def test_a_start_that_takes_too_long_fails(model: Path, tmp_path: Path) -> None:
    with launch(model, tmp_path) as server, pytest.raises(LaunchError, match=r"in 0\.05 s"):
        server.wait_until_ready(timeout_s=0.05)
    assert has_ended(server.pid)


def test_a_model_too_big_for_the_memory_is_refused_with_both_sizes(
    tiny: Path, tmp_path: Path
) -> None:
    big = tmp_path / "big"
    big.mkdir()
    (big / "config.json").write_bytes((tiny / "config.json").read_bytes())
    size = 1 << 31
    entries = {
        f"weight{i}": {
            "dtype": "F16",
            "shape": [1 << 15, 1 << 15],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(500)
    }
    header = json.dumps(entries).encode()
    with (big / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(1 << 40)
    with pytest.raises(NotEnoughSpace, match=r"needs \d+\.\d GiB .* \d+\.\d GiB are free"):
        launch(big, tmp_path)
    assert not (tmp_path / "logs").exists()


def test_a_gguf_file_too_big_for_the_memory_is_refused_with_both_sizes(
    tiny_gguf: Path, tmp_path: Path
) -> None:
    big = tmp_path / "big.gguf"
    with big.open("wb") as file:
        file.write(tiny_gguf.read_bytes())
        file.truncate(1 << 40)
    with pytest.raises(NotEnoughSpace, match=r"needs \d+\.\d GiB .* \d+\.\d GiB are free"):
        launch(big, tmp_path)
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("skip_memory_check", [False, True])
def test_a_missing_part_of_a_split_gguf_file_is_named(
    skip_memory_check: bool, tiny_gguf: Path, tmp_path: Path
) -> None:
    first = tmp_path / "big-00001-of-00002.gguf"
    first.write_bytes(tiny_gguf.read_bytes())
    with pytest.raises(WeightsError, match=r"split GGUF, of which big-00002-of-00002\.gguf is mi"):
        LocalServer.launch(
            first,
            cache_dir=tmp_path,
            log_path=tmp_path / "logs" / "host.log",
            skip_memory_check=skip_memory_check,
        )
    assert not (tmp_path / "logs").exists()


def test_all_parts_of_a_split_gguf_file_have_to_fit_in_memory(
    tiny_gguf: Path, tmp_path: Path
) -> None:
    first = tmp_path / "big-00001-of-00002.gguf"
    first.write_bytes(tiny_gguf.read_bytes())
    with (tmp_path / "big-00002-of-00002.gguf").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(NotEnoughSpace, match=r"needs \d+\.\d GiB .* \d+\.\d GiB are free"):
        launch(first, tmp_path)


def test_servers_at_the_same_time_have_a_log_each(tiny: Path, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "host.log"
    log.parent.mkdir()
    log.write_text("of an earlier server")
    with launch(tiny, tmp_path) as first:
        assert (first.log_path, log.stat().st_size) == (log, 0)
        with log.open("a") as file:
            file.write("of the first")
        with launch(tiny, tmp_path) as second:
            assert second.log_path == log.with_name("host-2.log")
        assert log.read_text().startswith("of the first")
    with launch(tiny, tmp_path) as third:
        assert third.log_path == log
    assert sorted(log.parent.iterdir()) == [second.log_path, log]


def test_a_log_that_cannot_be_written_is_one_clear_line(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where a folder is needed")
    with pytest.raises(LaunchError, match="log file"):
        launch(tiny, tmp_path)


@pytest.fixture(params=[errno.EACCES, errno.EPERM, errno.EROFS])
def _denied_log(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache of another user, or a read-only one; permissions alone do not stop root."""
    real = os.open

    def deny(path: Path, *arguments: int, **options: int) -> int:
        if str(path).startswith(str(tmp_path / "logs")):
            raise OSError(request.param, os.strerror(request.param), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", deny)


@pytest.mark.usefixtures("_denied_log")
def test_the_log_is_in_the_state_folder_if_the_cache_may_not_be_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "state_folder", lambda: tmp_path / "state")
    with launch(tiny, tmp_path) as server:
        assert server.log_path == tmp_path / "state" / "host.log"
        assert stat.S_IMODE(server.log_path.stat().st_mode) == 0o600


@pytest.mark.usefixtures("_denied_log")
def test_the_log_is_in_a_temporary_folder_if_there_is_no_state_folder(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_folder() -> Path:
        raise ConfigError("no home folder")

    monkeypatch.setattr(launcher, "state_folder", no_folder)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with launch(tiny, tmp_path) as server:
        assert server.log_path.parent.parent == tmp_path
        assert stat.S_IMODE(server.log_path.parent.stat().st_mode) == 0o700
