"""The run directory, the logs, and never mistaking a stranger's process for ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import ConfigError
from cluster.logfile import LogFile, Tail
from cluster.machine import free_port, is_same_process, start_time
from cluster.plan import Role
from cluster.state import ClusterRecord, ProcessRecord, RunDir, State


def record(pid: int, started_at: float) -> ClusterRecord:
    worker = ProcessRecord(
        name="echo-1",
        role=Role.WORKER,
        kind="echo",
        state=State.READY,
        pid=pid,
        started_at=started_at,
    )
    return ClusterRecord(
        source="c.yaml",
        supervisor_pid=pid,
        supervisor_started_at=started_at,
        controller_address=None,
        processes=(worker,),
    )


def test_a_recycled_pid_is_a_stranger() -> None:
    begun = start_time(os.getpid())
    assert begun is not None
    ours, stranger = record(os.getpid(), begun), record(os.getpid(), begun - 3600)
    assert ours.supervised
    assert len(ours.survivors) == 1
    assert not stranger.supervised
    assert not stranger.survivors


def test_an_ended_process_is_not_running_even_before_it_is_reaped() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    begun = start_time(process.pid)
    assert begun is not None
    assert is_same_process(process.pid, begun)
    process.communicate(b"\n")
    assert not is_same_process(process.pid, begun)


def test_a_record_survives_its_round_trip_and_a_damaged_one_is_none(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert run_dir.load() is None
    run_dir.save(record(1, 2.5))
    assert run_dir.load() == record(1, 2.5)
    (tmp_path / "cluster.json").write_text('{"source": "c.y')
    assert run_dir.load() is None
    run_dir.clear()
    assert not (tmp_path / "cluster.json").exists()


def test_a_run_directory_has_one_supervisor(tmp_path: Path) -> None:
    first, second = RunDir(tmp_path), RunDir(tmp_path)
    with first.claimed(), pytest.raises(ConfigError, match="runs already"), second.claimed():
        pass
    with second.claimed():
        pass


def test_a_log_is_put_aside_when_it_is_too_long(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "w.log", max_bytes=10)
    log.write(b"0123456789")
    log.write(b"new")
    assert (tmp_path / "w.log").read_bytes() == b"new"
    assert (tmp_path / "w.log.1").read_bytes() == b"0123456789"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk_costs_log_lines_only(tmp_path: Path) -> None:
    (tmp_path / "w.log").symlink_to("/dev/full")
    LogFile(tmp_path / "w.log").write(b"lost")
    LogFile(tmp_path / "no" / "folder.log").write(b"lost")


def test_the_tail_is_fit_for_a_terminal() -> None:
    tail = Tail(lines=3)
    tail.feed(b"one\ntwo\n\n   \n\x1b[31mred\x1b[0m\nload")
    tail.feed(b"ing 1%\rloading 99%\rdone \xff\x07")
    assert tail.last(2) == ["red", "done \ufffd"]
    assert tail.last(9) == ["one", "two", "red", "done \ufffd"]


def test_free_ports_differ() -> None:
    first = free_port("127.0.0.1")
    assert free_port("127.0.0.1", besides={first}) != first
