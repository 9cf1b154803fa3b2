"""Python programs in processes that are forked from one which has imported what they import.

A command of the project takes ten seconds of CPU for its imports, and often less than one for its
work. Here `Popen` and `run` are `subprocess`'s own, but a program of this Python starts as a copy
of a server that has imported the packages of other projects, never mmvmamba, and has no threads.
All else is a program's own: its parent, which is this process, standard streams, directory,
environment, arguments and random numbers. What such a process does not show: imports that only work
in one order, and orders that depend on the hashes of strings, which those of one server share. Some
tests of each kind start real ones for that, with `cold=True`.
"""

import atexit
import ctypes
import functools
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).resolve().parent
MAIN = f"import sys; sys.path.insert(0, {str(HERE)!r}); import warm; warm.main()"
# What servers have imported: packages for all tasks, and those of the tasks on top.
LIBRARIES = ("torch", "torchvision", "mmcv.ops", "mmengine.runner")
TASKS = (
    *("mmdet.apis", "mmseg.apis", "mmpretrain", "mmpretrain.datasets", "mmpretrain.models"),
    *("torch.distributed.fsdp", "torch.distributed.run", "torch._dynamo"),
    *("mmdet.evaluation", "mmseg.evaluation", "mmpretrain.evaluation", "matplotlib.pyplot"),
    *("mmdet.engine", "mmseg.engine", "mmpretrain.engine", "mmseg.datasets", "torch.onnx"),
    *("mmdet.visualization", "mmseg.visualization", "mmpretrain.visualization"),
    *("pkg_resources", "setuptools.dist", "matplotlib.backends.backend_agg", "quick"),
)
LAUNCHERS = {"mmvmamba.engine.launch", "torch.distributed.run"}
# Stands in for the Python of a shell script, to know what that would start.
RECORDER = """#!/bin/sh
if [ "$1" = -c ]; then exit; fi
printf '%s\\0' "$@" >"$RECORD/arguments"
env -0 >"$RECORD/environment"
"""
PR_SET_CHILD_SUBREAPER, PR_SET_NAME, CLONE_NEWNET = 36, 15, 0x40000000
libc = ctypes.CDLL(None, use_errno=True)


class Server:
    """A process that forks programs, at the other end of a socket.

    A program is forked twice, and given to this process when the one between has ended.
    """

    def __init__(self, connection: socket.socket):
        self.connection, self.lock = connection, threading.Lock()
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1)

    def start(self, request: dict, streams: list[int]) -> int:
        """Starts a program; returns its process's number."""
        with self.lock:
            socket.send_fds(self.connection, [json.dumps(request).encode()], streams)
            answer = self.connection.recv(64)
        if not answer:
            raise RuntimeError("the server of warm processes has ended; its error stands above")
        return int(answer)


@functools.cache
def server(tasks: bool) -> Server:
    """The process that has imported the libraries, or a fork of it that has the tasks' too."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-c", MAIN, *(TASKS if tasks else LIBRARIES)]
    start = functools.partial(Popen, tasks=False) if tasks else subprocess.Popen
    with theirs:
        # Threads of OpenMP that wait by spinning are in the way of everything else.
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
        process = start(command, stdin=theirs, stdout=subprocess.DEVNULL, env=environment)
    atexit.register(process.wait)
    atexit.register(ours.close)
    return Server(ours)


class Popen(subprocess.Popen):
    """`subprocess.Popen`, which forks programs of this Python from a server.

    Args:
        args: The command. `bash SCRIPT` stands for the program of this Python that the script
            starts in its own place; `ip netns exec NAME` may stand before either.
        tasks: Whether the packages of the tasks are imported, or the libraries alone.
        **options: As `subprocess.Popen` takes them, but for `preexec_fn` and `pass_fds`.
    """

    # The launcher's is its own: its processes are its children.
    server = staticmethod(server)

    def __init__(self, args, *, tasks: bool = True, **options):
        self.tasks = tasks
        args = [os.fspath(part) for part in args]
        inside = args[:4] if args[:3] == ["ip", "netns", "exec"] else []
        if args[len(inside)] == "bash":
            started = started_by(args[len(inside) :], options.get("cwd"), options.get("env"))
            if started is not None:
                args, options["env"] = [*inside, *started[0]], started[1]
        super().__init__(args, **options)

    def _execute_child(self, args, *options) -> None:
        # fmt: off
        (_, _, _, _, cwd, env, _, _, _, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite,
         _, _, _, _, _, start_new_session, *_) = options
        # fmt: on
        namespace, program = None, args
        if args[:3] == ["ip", "netns", "exec"]:
            namespace, program = args[3], args[4:]
        if program[0] != sys.executable:
            super()._execute_child(args, *options)
            return
        request = {
            "arguments": program[1:],
            "cwd": os.path.abspath(cwd or "."),
            "environment": dict(os.environ if env is None else env),
            "namespace": namespace,
            "session": start_new_session,
        }
        streams = [p2cread, c2pwrite, errwrite]
        streams = [own if own != -1 else number for number, own in enumerate(streams)]
        self.pid = self.server(self.tasks).start(request, streams)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def started_by(script: list[str], cwd: str | None, env: dict | None):
    """The command and the environment that a shell script leaves to Python, or None if it ends."""
    env = dict(os.environ if env is None else env)
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder, "bin/python")
        python.parent.mkdir()
        python.write_text(RECORDER)
        python.chmod(0o755)
        own = {"VIRTUAL_ENV": folder, "PATH": f"{python.parent}:{env['PATH']}", "RECORD": folder}
        subprocess.run(script, cwd=cwd, env=env | own, capture_output=True)
        if not Path(folder, "arguments").exists():
            return None
        arguments = Path(folder, "arguments").read_text().split("\0")[:-1]
        lines = Path(folder, "environment").read_text().split("\0")[:-1]
    left = dict(line.split("=", 1) for line in lines)
    for name in own:
        left.pop(name)
        if name in env:
            left[name] = env[name]
    return [sys.executable, *arguments], left


def run(
    command,
    *,
    cold: bool = False,
    tasks: bool = True,
    timeout: float | None = None,
    **options,
) -> subprocess.CompletedProcess:
    """Runs a program to its end, as `subprocess.run` does, whose output is always text.

    Args:
        command: The command.
        cold: Start a real process.
        tasks: As `Popen` takes it.
        timeout: Seconds after which it is killed.
        **options: Those of `subprocess.Popen`.
    """
    start = subprocess.Popen if cold else functools.partial(Popen, tasks=tasks)
    with start(command, text=True, **options) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


# In the server's process.


def main() -> None:
    """Imports what the command line names, and forks programs until nobody asks any more."""
    import gc
    import warnings

    # Modules are not garbage, and looking for it among them takes a tenth of their imports' time.
    gc.disable()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pkg_resources")
        for name in sys.argv[1:]:
            import_module(name)
        if "quick" in sys.modules:
            sys.modules["quick"].quicken()
            sys.modules["quick"].read_upstreams_configs()
    # Programs share the memory of what they do not change.
    gc.collect()
    gc.freeze()
    gc.enable()
    serve(socket.socket(fileno=os.dup(0)))


def serve(connection: socket.socket) -> None:
    """Answers requests; in a program's process, runs it and returns."""
    while True:
        message, streams, *_ = socket.recv_fds(connection, 2**20, 3)
        if not message:
            return
        waiting, adopted = os.pipe()
        between = os.fork()
        if between == 0:
            if os.fork():
                os._exit(0)
            os.close(adopted)
            os.read(waiting, 1)
            connection.send(str(os.getpid()).encode())
            connection.close()
            os.close(waiting)
            become(json.loads(message), streams)
            return
        os.waitpid(between, 0)
        for descriptor in (waiting, adopted, *streams):
            os.close(descriptor)


def become(request: dict, streams: list[int]) -> None:
    """Gives this process what a program's own has, and runs the program."""
    import random

    import numpy as np
    import torch

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    if request["session"]:
        os.setsid()
    if request["namespace"]:
        with open(f"/run/netns/{request['namespace']}") as namespace:
            if libc.setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns", request["namespace"])
    search_path = [part for part in sys.path[1:] if part not in python_path()]
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    # Chosen anew, by this environment.
    tempfile.tempdir = None
    random.seed()
    np.random.seed()  # noqa: NPY002
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    sys.path[:] = ["", *python_path(), *search_path]
    arguments = request["arguments"]
    sys.orig_argv = [sys.executable, *arguments]
    if arguments[0] == "-u":
        arguments = arguments[1:]
        sys.stdout.reconfigure(write_through=True)
    if arguments[0] == "-m" and arguments[1] in LAUNCHERS:
        serve_launcher()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A process group that is still at work aborts the process at the very end.
        run_program(*arguments)
    else:
        # Most of a second would go into taking all modules apart.
        run_program_and_exit(*arguments)


def python_path() -> list[str]:
    return list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))


def run_program(first: str, *others: str) -> None:
    """Does what Python does with its command line."""
    if first == "-c":
        code, *others = others
        sys.argv = ["-c", *others]
        namespace = vars(sys.modules["__main__"])
        exec(compile(code, "<string>", "exec"), namespace)
    elif first == "-m":
        name, *others = others
        sys.path[0] = os.getcwd()
        sys.argv = ["-m", *others]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        # In the list of processes, which shows the server's command line.
        libc.prctl(PR_SET_NAME, Path(first).name.encode())
        sys.path[0] = os.path.dirname(os.path.abspath(first))
        sys.argv = [first, *others]
        runpy.run_path(first, run_name="__main__")


def run_program_and_exit(*arguments: str) -> None:
    """Ends as Python does, but leaves the memory to the system."""
    code = 0
    try:
        run_program(*arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            sys.stderr.write(f"{end.code}\n")
    except Exception:  # noqa: BLE001 (whatever it is)
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve_launcher() -> None:
    """Makes a launcher's processes forks too: of a copy of it that has no thread yet."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        libc.prctl(PR_SET_NAME, b"warm")
        serve(theirs)
        os._exit(0)
    theirs.close()
    own = Server(ours)
    subprocess_handler.Popen = type("Popen", (Popen,), {"server": staticmethod(lambda _: own)})
