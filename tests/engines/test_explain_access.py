"""Who may ask the socket of ``kvbm explain``, and its file: whose it is, where it lies, and when it goes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from explain_site import LIST, Serve, connect, make_history_of, read_all

from kvbm.engines import explain_socket
from kvbm.engines.explain_client import ask, find_processes
from kvbm.engines.explain_socket import (
    ExplainSocket,
    find_sockets,
    frame,
    make_folder,
    open_explain,
    runtime_folders,
)
from kvbm.errors import StorageError

# -- who may ask -----------------------------------------------------------------------------------------------


def test_socket_and_folder_are_their_owners_alone(serve: Serve, folder: Path) -> None:
    one = serve()
    assert stat.S_IMODE(one.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert one.path.name == f"kvbm-{os.getpid()}.sock"
    assert list(folder.iterdir()) == [one.path]


def test_other_users_get_no_answer(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = serve("a")
    other = os.geteuid() + 1000
    monkeypatch.setattr(explain_socket, "peer_of", lambda _: (4, other))
    with pytest.raises(StorageError, match="does not answer"):
        ask(one.path, LIST)
    assert f"refused pid=4 uid={other}" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_another_user_gets_no_answer_even_where_he_can_reach_the_file(serve: Serve, folder: Path) -> None:
    one = serve("a")
    folder.chmod(0o711)
    one.path.chmod(0o666)
    child = os.fork()
    if not child:
        status = 2
        try:
            os.chdir(folder)
            os.setuid(65534)
            with connect(Path(one.path.name)) as client:
                status = 1
                with contextlib.suppress(ConnectionError):
                    client.sendall(frame(msgspec.json.encode(LIST)))
                status = 1 if read_all(client) else 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "1: he was answered, 2: he did not come so far"


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o707])
def test_folder_that_others_can_look_into_is_refused(folder: Path, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(StorageError, match="not a folder of this user alone"):
        ExplainSocket(make_history_of(), folder)


def test_link_in_place_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="not a folder of this user alone"):
        make_folder(folder)


def test_where_no_socket_can_be_had_the_engine_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    absent, too_long = tmp_path / "absent" / "kvbm", tmp_path / ("x" * 120)
    assert open_explain(make_history_of(), [tmp_path / "file", absent, too_long]) is None
    assert "kvbm explain cannot look into this process" in caplog.text
    found = open_explain(make_history_of(), [absent, tmp_path / "run"])
    assert found is not None
    assert found.path.parent == tmp_path / "run"
    found.close()


# -- files -----------------------------------------------------------------------------------------------------


def test_runtime_folder_is_the_sessions_or_a_temporary_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/some/tmp")
    last = Path(f"/some/tmp/kvbm-{os.geteuid()}")
    assert runtime_folders({"XDG_RUNTIME_DIR": "/run/user/7"}) == [Path("/run/user/7/kvbm"), last]
    assert runtime_folders({"XDG_RUNTIME_DIR": "relative"}) == [last]
    assert runtime_folders({}) == [last]


def test_second_engine_of_a_process_has_a_socket_of_its_own(serve: Serve, folder: Path) -> None:
    first, second = serve("a"), serve("b")
    assert second.path.name == f"kvbm-{os.getpid()}-2.sock"
    assert find_processes([folder]) == [(os.getpid(), second.path), (os.getpid(), first.path)]
    assert ask(first.path, LIST).summaries[0].request_id == "a"
    first.close()
    assert serve("c").path == first.path


def test_process_that_has_more_engines_than_names_is_told(serve: Serve) -> None:
    for _ in range(9):
        serve()
    with pytest.raises(StorageError, match="9 sockets of process"):
        serve()


def test_files_that_nobody_listens_on_are_removed_and_others_are_left(serve: Serve, folder: Path) -> None:
    make_folder(folder)
    left = ["kvbm-1.sock", f"kvbm-{os.getpid()}.sock", ".kvbm-1-abcd", ".kvbm-1-dcba"]
    for name in left:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
            stale.bind(str(folder / name))
    os.utime(folder / ".kvbm-1-abcd", (0, 0))
    (folder / "notes.txt").touch()
    os.utime(folder / "notes.txt", (0, 0))
    one = serve()
    assert sorted(path.name for path in folder.iterdir()) == [".kvbm-1-dcba", one.path.name, "notes.txt"]


def test_socket_of_a_killed_process_is_gone_at_the_next_look(folder: Path) -> None:
    program = (
        "import sys, time, pathlib\n"
        "from kvbm.engines.explain_socket import ExplainSocket\n"
        "from kvbm.engines.history import History\n"
        "print(ExplainSocket(History([], block_tokens=16), pathlib.Path(sys.argv[1])).path, flush=True)\n"
        "sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        path = Path(child.stdout.readline().strip())
        assert find_sockets(folder) == [(child.pid, path)]
        assert ask(path, LIST).pid == child.pid
        child.send_signal(signal.SIGKILL)
    assert path.exists()
    assert find_sockets(folder) == []
    assert not path.exists()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_child_leaves_its_parents_socket(serve: Serve) -> None:
    one = serve("a")
    child = os.fork()
    if not child:
        one.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert ask(one.path, LIST).num_known == 1
