"""Worker processes: from where they are started, what they see, and that none is waited for in vain or left behind.

What a process without this test runner's modules and threads must show runs in an interpreter of its own.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest

from bagel_ds import processes
from bagel_ds.data.index import index
from bagel_ds.data.index.data_file import DataFile, layout_of, read_tasks
from bagel_ds.data.index.index import index_files
from bagel_ds.data.inspect import check
from bagel_ds.errors import UserError
from bagel_ds.processes import WorkerFailed, WorkerLost, in_order, start_worker, worker
from bagel_ds.train.process.detach import process_state
from tests.processes import worker_functions as functions
from tests.small_data import byte_tokenizer, t2i_rows, write_parquet

REPOSITORY = Path(__file__).resolve().parents[2]
LONG = 60.0  # seconds, for what takes milliseconds on a machine that is not busy


def script(folder: Path, text: str) -> list[str]:
    """The command that runs `text`, which is no module that could be imported, from another folder."""
    path = folder / "a script.py"
    path.write_text(textwrap.dedent(text))
    return [sys.executable, str(path)]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **extra}


def run(folder: Path, text: str, timeout: float = 300, **extra: str) -> str:
    ended = subprocess.run(
        script(folder, text), cwd=folder, env=environment(**extra), capture_output=True, text=True, timeout=timeout
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def seen(**arguments: Any) -> Any:
    """What `functions.surroundings` says in a worker."""
    found = start_worker(functions.surroundings, name="looking", **arguments)
    try:
        assert found.connection.poll(LONG)
        return found.receive()
    finally:
        found.end()


@pytest.fixture
def own_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that is started in this test, and so prints where this test's output goes."""
    monkeypatch.setattr(worker, "_server", None)
    yield
    if worker._server is not None:
        worker._server.close()


def until_ended(*found: psutil.Process) -> None:
    """Wait until they have ended, whether or not their parents have noticed."""
    deadline = time.monotonic() + LONG
    while left := [process for process in found if process_state(process.pid) is not None]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


# ----------------------------------------------------------------------------------------------------- where they start
def test_the_process_that_workers_are_forked_from_has_one_thread_and_nothing_of_the_engine() -> None:
    found = seen()
    assert found["threads"] == 1, "in the worker itself"
    server = psutil.Process(found["parent"])
    assert server.num_threads() == 1
    assert server.ppid() == os.getpid()
    assert not found["modules"] & {"deepspeed", "transformers", "bagel_ds.train", "bagel_ds.zero"}
    assert {"torch", "pyarrow", "bagel_ds.data.batches.loader", "bagel_ds.data.inspect.check"} <= found["modules"], (
        "imported once"
    )


def test_threads_that_imports_start_in_the_server_are_named_in_the_log(
    own_server: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its settings Arrow's allocator starts one."""
    monkeypatch.setattr(worker, "_NO_THREADS", {})
    logging.getLogger("bagel_ds").propagate = True
    with caplog.at_level(logging.WARNING, "bagel_ds"):
        seen()
    # A thread that has not named itself yet stands there as "python".
    assert re.search(r"runs threads of libraries \([^)]*jemalloc_bg_thd", caplog.text)


@pytest.mark.parametrize("starts", [60, pytest.param(500, marks=pytest.mark.soak)])
def test_workers_start_while_a_native_thread_enters_python_all_the_time(tmp_path: Path, starts: int) -> None:
    """Each call of the C thread makes a thread state and removes it (python/cpython#112275): of processes that forked
    right beside it 1 to 3 of 100 never ran."""
    (tmp_path / "enter.c").write_text(
        """
        #include <pthread.h>
        static void (*callback)(void);
        static void *enter(void *unused) { for (;;) callback(); return unused; }
        int begin(void (*function)(void)) {
            pthread_t thread;
            callback = function;
            return pthread_create(&thread, 0, enter, 0);
        }
        """
    )
    library = tmp_path / "enter.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-pthread", "-o", library, tmp_path / "enter.c"], check=True, capture_output=True
    )
    output = run(
        tmp_path,
        f"""
        import ctypes, os, sys
        from bagel_ds.processes import start_worker
        from tests.processes import worker_functions as functions

        entered = 0

        @ctypes.CFUNCTYPE(None)
        def enter():
            global entered
            entered += 1

        sys.setswitchinterval(1e-6)
        assert ctypes.CDLL({str(library)!r}).begin(enter) == 0
        for number in range({starts}):
            worker = start_worker(functions.greet, number, name="greeting")
            if not worker.connection.poll(60):
                os.write(1, f"worker {{number}} hangs".encode())
                os._exit(1)
            assert worker.receive() == number
            worker.end()
        os.write(1, f"{{number + 1}} greetings, {{entered > 10_000}}".encode())
        os._exit(0)
        """,
    )
    assert output == f"{starts} greetings, True"


def test_a_script_without_a_main_guard_is_not_run_again(tmp_path: Path) -> None:
    text = """
    from bagel_ds.processes import in_order
    from tests.processes import worker_functions as functions

    print("begun")
    print(list(in_order(functions.doubled, 2, [1, 2, 3], 2, "doubling process", str)))
    """
    assert run(tmp_path, text) == "begun\n[2, 4, 6]\n"


@pytest.mark.parametrize("where", ["stdin", "thread"])
def test_they_start_from_an_interactive_interpreter_and_from_any_thread(tmp_path: Path, where: str) -> None:
    """The thread that starts the server may end before the workers do."""
    text = """
    import threading
    from bagel_ds.processes import start_worker
    from tests.processes import worker_functions as functions

    found = []
    thread = threading.Thread(target=lambda: found.append(start_worker(functions.greet_twice, 1, name="greeting")))
    thread.start()
    thread.join()
    assert found[0].receive() == 1
    found[0].send("more")
    print(found[0].receive())
    """
    command = [sys.executable, "-"] if where == "stdin" else script(tmp_path, text)
    ended = subprocess.run(
        command, input=textwrap.dedent(text), env=environment(), capture_output=True, text=True, timeout=300
    )
    assert ended.stdout == "more\n", ended.stderr
    assert ended.returncode == 0


def test_they_see_this_environment_and_this_folder_as_they_are_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAGEL_TEST_NEW", "new")
    seen()
    monkeypatch.setenv("BAGEL_TEST_NEW", "newer")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "more"))
    found = seen()
    assert found["environment"]["BAGEL_TEST_NEW"] == "newer" and "HOME" not in found["environment"]
    assert found["folder"] == str(tmp_path) and found["path"] == sys.path


def test_what_is_shared_is_sent_once_for_workers_that_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    ask = worker._Server._ask

    def noted(self: Any, request: str, *details: Any, **more: Any) -> Any:
        asked.append(request)
        return ask(self, request, *details, **more)

    monkeypatch.setattr(worker._Server, "_ask", noted)
    one, other = ["one"], ["other"]
    assert [seen(shared=shared)["shared"] for shared in (one, one, other, one)] == [one, one, other, one]
    assert asked.count("share") == 3


def test_neither_a_long_tmpdir_nor_dev_shm_has_a_part_in_it(tmp_path: Path) -> None:
    """multiprocessing's sockets lie in TMPDIR, whose name may then have some 80 characters."""
    folder = tmp_path / "long"
    folder /= "x" * (137 - len(str(folder)) - 1)
    folder.mkdir(parents=True)
    before = set(os.listdir("/dev/shm"))
    text = """
    from bagel_ds.processes import in_order
    from tests.processes import worker_functions as functions
    print(sum(in_order(functions.doubled, 2, list(range(50)), 3, "doubling process", str)))
    """
    assert run(tmp_path, text, TMPDIR=str(folder)) == "2450\n"
    assert list(folder.iterdir()) == []
    assert not [name for name in set(os.listdir("/dev/shm")) - before if name.startswith(("sem.", "torch_", "psm_"))]


# --------------------------------------------------------------------------------------------------------- how they end
@pytest.mark.parametrize(("victim", "busy"), [("starter", "ignoring"), ("starter", "stopped"), ("server", "sleeping")])
def test_all_end_when_the_process_that_started_them_or_the_server_is_killed(
    tmp_path: Path, victim: str, busy: str
) -> None:
    """Also a worker that runs no Python, so that no thread of its own could end it."""
    text = f"""
    import time
    from bagel_ds.processes import start_worker
    from tests.processes import worker_functions as functions
    workers = [start_worker(functions.stay, {busy!r}, name="staying") for _ in range(2)]
    print(*[worker.receive() for worker in workers], flush=True)
    time.sleep(100)
    """
    starter = subprocess.Popen(script(tmp_path, text), env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert starter.stdout is not None
        pids = [int(pid) for pid in starter.stdout.readline().split()]
        workers = [psutil.Process(pid) for pid in pids]
        server = workers[0].parent()
        assert server is not None and len(workers) == 2
        if victim == "starter":
            starter.kill()
            starter.wait()
        else:
            server.kill()
        until_ended(server, *workers)
    finally:
        starter.kill()
        starter.wait()
        starter.stdout.close()


def test_they_end_with_a_starter_that_has_forked_and_so_keeps_their_connection_open(tmp_path: Path) -> None:
    text = """
    import os, time
    from bagel_ds.processes import start_worker
    from tests.processes import worker_functions as functions
    worker = start_worker(functions.stay, "sleeping", name="staying")
    print(worker.receive(), flush=True)
    if os.fork() == 0:
        os.close(1)
        os.close(2)
        time.sleep(15)
    os._exit(0)
    """
    pid = int(run(tmp_path, text))
    deadline = time.monotonic() + 10
    while process_state(pid) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_stop_signals_are_left_to_the_starter() -> None:
    found = start_worker(functions.greet_twice, "a", name="greeting")
    assert found.receive() == "a"
    server = psutil.Process(found.pid).parent()
    assert server is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        for pid in (found.pid, server.pid):
            os.kill(pid, number)
    found.send("b")
    assert found.receive() == "b"
    found.end()
    assert not psutil.pid_exists(found.pid), "and reaped"


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("killed", "was ended by SIGKILL (the kernel kills processes when memory runs out"),
        ("crashed", "was ended by SIGSEGV while it counted."),
        ("exited", "ended with code 3 while it counted."),
        ("returned", "ended with code 0 while it counted."),
        ("raised", "ended with code 1 while it counted."),
    ],
)
def test_a_worker_that_is_lost_is_named_with_its_end(
    own_server: None, what: str, expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    found = start_worker(functions.lost, what, name="counting process 0")
    found.doing = lambda: "it counted"
    with pytest.raises(WorkerLost) as fault:
        found.receive()
    assert f"counting process 0 (process {found.pid}) {expected}" in str(fault.value)
    found.end()
    assert not psutil.pid_exists(found.pid)
    output = capfd.readouterr().err
    assert ("Segmentation fault" in output) == (what == "crashed")
    assert ("a bug outside of any task" in output) == (what == "raised")


def test_a_lost_server_is_an_error_and_the_next_worker_gets_another_one(own_server: None) -> None:
    found = start_worker(functions.greet_twice, 1, name="greeting")
    assert found.receive() == 1
    server = psutil.Process(found.pid).parent()
    assert server is not None
    server.kill()
    with pytest.raises(WorkerLost, match="was ended by SIGKILL"):
        found.receive()
    found.end()
    until_ended(server)
    assert seen()["parent"] != server.pid


def test_no_process_left_for_the_user_is_one_message(own_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(worker.subprocess, "Popen", refused)
    with pytest.raises(UserError, match=r"no process can be started: Resource temporarily unavailable.*ulimit -u"):
        start_worker(functions.greet, 1, name="greeting")


def test_stacks_of_workers_are_shown_also_of_one_that_is_stopped(
    own_server: None, capfd: pytest.CaptureFixture[str]
) -> None:
    found = [start_worker(functions.stay, how, name=f"{how} process") for how in ("sleeping", "stopped")]
    for one in found:
        assert one.receive() == one.pid
    try:
        assert processes.show_stacks() == [f"{one.name}: it had nothing to do" for one in found]
        output, deadline = "", time.monotonic() + LONG
        while output.count("in stay") < 2 and time.monotonic() < deadline:
            output += capfd.readouterr().err
            time.sleep(0.05)
        assert output.count("in stay") == 2, output
    finally:
        for one in found:
            one.end()
    assert processes.show_stacks() == []


def test_a_server_that_is_still_starting_shows_its_stacks_and_goes_on(
    own_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """From its first moment on, when its interpreter has no handler yet, and while an import hangs."""
    (tmp_path / "hanging_import.py").write_text(
        f"import os, time\nwhile not os.path.exists({str(tmp_path / 'go')!r}):\n    time.sleep(0.01)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(worker, "_PRELOAD", ("hanging_import",))
    processes.start_server()
    assert worker._server is not None
    output, deadline = "", time.monotonic() + LONG
    while "hanging_import.py" not in output and time.monotonic() < deadline:
        (name,) = processes.show_stacks()
        assert f"process {worker._server.pid}" in name and "starts" in name
        output += capfd.readouterr().err
    assert "hanging_import.py" in output
    (tmp_path / "go").touch()
    assert start_worker(functions.greet, "hello", name="greeting").receive() == "hello"


# ------------------------------------------------------------------------------------------------------------- the pool
def test_results_come_in_the_order_of_tasks_whatever_each_takes() -> None:
    tasks = [0.2, 0.0, 0.1, 0.0, 0.3, 0.0]
    assert list(in_order(functions.slept, None, tasks, 3, "sleeping process", str)) == tasks
    assert list(in_order(functions.slept, None, [], 3, "sleeping process", str)) == []


def test_results_of_any_size_come_through() -> None:
    """More than a socket holds, in both directions."""
    tasks = [b"x" * size for size in (0, 1, 10**6, 3 * 10**7)]
    assert list(in_order(functions.doubled, 2, tasks, 2, "doubling process", str)) == [2 * task for task in tasks]


def test_leaving_the_pool_early_ends_its_processes() -> None:
    results = in_order(functions.slept, None, [0.0, 100.0, 100.0], 3, "sleeping process", str)
    assert next(results) == 0.0
    assert worker._server is not None and len(worker._server.workers) == 3
    pids = list(worker._server.workers)
    results.close()  # type: ignore[attr-defined]
    assert not any(map(psutil.pid_exists, pids))


@pytest.mark.parametrize(
    ("task", "error", "expected"),
    [
        ("killed", WorkerLost, r"counting process \d \(process \d+\) was ended by SIGKILL .* while it read killed"),
        (
            "raised",
            WorkerFailed,
            r"(?s)counting process \d .* failed while it read raised:.*in counted.*KeyError: 'raised'",
        ),
        ("refused", UserError, "^this can't be used$"),
        ("unsendable", WorkerFailed, r"(?s)failed while it read unsendable:.*pickle"),
    ],
)
def test_what_goes_wrong_in_the_pool_names_the_task(task: str, error: type[Exception], expected: str) -> None:
    tasks = ["one", "two", task, "three"]
    with pytest.raises(error, match=expected):
        list(in_order(functions.counted, None, tasks, 2, "counting process", lambda task: f"it read {task}"))
    assert worker._server is not None and not worker._server.workers


@pytest.mark.parametrize("preloads", [False, True])
def test_a_server_whose_starter_ends_while_it_starts_says_nothing(preloads: bool) -> None:
    """As after Ctrl-C, when a command has just begun."""
    ours, theirs = socket.socketpair()
    starter = Connection(ours.detach())
    command = [sys.executable, "-m", "bagel_ds.processes", str(theirs.fileno()), str(os.getpid())]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    server = subprocess.Popen(
        command, pass_fds=[theirs.fileno()], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    theirs.close()
    if preloads:
        starter.send((sys.path, ["json"]))
    starter.close()
    printed, said = server.communicate(timeout=100)
    assert (server.returncode, printed, said) == (0, "", "")


_CHECK = "list(check._run(list(read_tasks(file, layout_of(file))), 4, (), 2))"


@pytest.mark.parametrize("command", ["index", "check"])
def test_a_process_of_index_or_check_that_is_killed_is_an_error_that_names_the_file(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("good", "deadly"):
        rows = t2i_rows(4)
        rows[2]["captions"] = json.dumps({"a": "third" if name == "deadly" else "3rd"})
        write_parquet(tmp_path / f"{name}.parquet", rows, group_rows=2)
    files = [DataFile(str(tmp_path / f"{name}.parquet"), functions.Killing()) for name in ("good", "deadly")]
    expected = rf"process \d \(process \d+\) was ended by SIGKILL .*while it read {files[1].path} row groups 0-1\."
    monkeypatch.setattr(index, "_POOL_ROWS", 0)
    monkeypatch.setattr(check, "_POOL_ROWS", 0)
    with pytest.raises(WorkerLost, match=expected):
        if command == "index":
            index_files(files, byte_tokenizer(tmp_path / "tokenizer"), str(tmp_path / "cache"), workers=2)
        else:
            tasks = [task for file in files for task in read_tasks(file, layout_of(file))]
            list(check._run(tasks, 8, (), 2))
    assert worker._server is not None and not worker._server.workers


@pytest.mark.parametrize("command", ["index", "check"])
def test_the_processes_of_index_and_check_end_with_a_killed_parent(command: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", t2i_rows(4), group_rows=2)
    text = f"""
    from bagel_ds.data.index import data_file, index
    from bagel_ds.data.index.data_file import DataFile, layout_of, read_tasks
    from bagel_ds.data.inspect import check
    from tests.small_data import byte_tokenizer
    from pathlib import Path
    from tests.processes import worker_functions as functions
    index._POOL_ROWS = check._POOL_ROWS = 0
    data_file._TASK_ROWS = 2
    file = DataFile({str(tmp_path / "a.parquet")!r}, functions.Sleeping())
    tokenizer = byte_tokenizer(Path({str(tmp_path / "tokenizer")!r}))
    if {command!r} == "index":
        index.index_files([file], tokenizer, {str(tmp_path / "cache")!r}, workers=2)
    else:
        CHECK
    """.replace("CHECK", _CHECK)
    path = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "tests")))
    command_line = script(tmp_path, text)
    with subprocess.Popen(command_line, env=environment(PYTHONPATH=path), stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        workers = {int(started.stdout.readline()) for _ in range(2)}
        below = psutil.Process(started.pid).children(recursive=True)
        started.kill()
        assert len(below) == 3 and workers < {process.pid for process in below}
        until_ended(*below)


def test_ctrl_c_ends_the_pool_with_one_traceback_and_leaves_nothing(tmp_path: Path) -> None:
    """A terminal sends it to every process of the group."""
    text = """
    from bagel_ds.processes import in_order
    from tests.processes import worker_functions as functions
    for _ in in_order(functions.slept, None, [0.0, 1000.0, 1000.0], 2, "sleeping process", str):
        print("begun", flush=True)
    """
    started = subprocess.Popen(
        script(tmp_path, text),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert started.stdout is not None and started.stdout.readline() == "begun\n"
    below = psutil.Process(started.pid).children(recursive=True)
    assert len(below) == 3
    os.killpg(started.pid, signal.SIGINT)
    output, _ = started.communicate(timeout=LONG)
    assert output.count("Traceback") == 1 and output.rstrip().endswith("KeyboardInterrupt")
    until_ended(*below)
