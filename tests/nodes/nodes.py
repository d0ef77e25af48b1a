"""Nodes of the tests: processes on 127.0.0.1, what they log, and a relay that can cut one off."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.nodes.worker import main, train_alone
from tests.processes import free_port

# Processes are forked from one that has everything imported: a start takes milliseconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.nodes.worker"])
SECRET = "a secret of the tests"
LIMITS = {"silent_s": 3.0, "stall_s": 4.0, "found_s": 3.0, "minority_s": 2.0, "answer_s": 2.0}


NAME = re.compile(rb'"name": "(\w+)"')


class Relay:
    """A TCP relay in front of a node. What others have with it goes through here, and can be held by pairs of names."""

    def __init__(self, name: str, target: int, held: set[frozenset[str]]):
        self.name = name
        self.target = target
        self.held = held
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.sockets: list[socket.socket] = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.target), timeout=2)
                    far.settimeout(None)
                except OSError:
                    near.close()
                    continue
                self.sockets += [near, far]
                pair: set[str] = {self.name}
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self.pump, args=(source, sink, pair), daemon=True).start()

    def pump(self, source: socket.socket, sink: socket.socket, pair: set[str]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if len(pair) == 1 and (found := NAME.search(data)):  # the hello of who has connected
                    pair.add(found[1].decode())
                while frozenset(pair) in self.held:  # as by a network that is down
                    time.sleep(0.02)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listener.close()
        for end in self.sockets:
            end.close()


class Nodes:
    """A context manager; leaving it kills what is left."""

    def __init__(self, folder: Path, num_steps: int, num_blocks: int = 16, block_s: float = 0.005, **options):
        self.folder = folder
        self.num_steps = num_steps
        self.num_blocks = num_blocks
        self.options = {
            "num_steps": num_steps,
            "num_blocks": num_blocks,
            "block_s": block_s,
            "rendezvous": str(folder / "nodes"),
            "folder": str(folder),
            "secret": SECRET,
            "limits": LIMITS,
            **options,
        }
        self.processes: dict[str, BaseProcess] = {}
        self.relays: dict[str, Relay] = {}
        self.held: set[frozenset[str]] = set()  # pairs of nodes that are cut from each other

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes.values():
            process.kill()
            process.join()
        for relay in self.relays.values():
            relay.close()

    def start(self, name: str, has_relay: bool = False, env: dict | None = None, **options) -> BaseProcess:
        port = free_port()
        settings = {**self.options, "name": name, "log": str(self.folder / f"{name}.log"), **options}
        settings["limits"] = {**LIMITS, **settings["limits"]}
        settings |= {"listen": f"127.0.0.1:{port}"}
        if has_relay:
            self.relays[name] = Relay(name, port, self.held)
            settings["advertise"] = f"127.0.0.1:{self.relays[name].port}"
        errors = str(self.folder / f"{name}.err")
        process = FORKS.Process(target=main, args=(settings, env or {}, errors), daemon=True)
        process.start()
        self.processes[name] = process
        return process

    def start_all(self, *names: str, **options) -> None:
        """Start nodes that begin with the first step together; the first named is the first member."""
        go = self.folder / "go"
        go.unlink(missing_ok=True)
        numbers = {name: len(self.events(name)) for name in names}
        entries = {name: len(self.events(name, "entered")) for name in names}
        for name in names:
            self.start(name, go=str(go), **options)
            if name == names[0]:
                self.wait_until(lambda: len(self.events(names[0], "entered")) > entries[names[0]])
        for name in names[1:]:
            self.wait_until(lambda n=name: len(self.events(n)) > numbers[n])
        go.touch()
        self.wait_until(lambda: all(len(self.events(name, "entered")) > entries[name] for name in names))

    def cut(self, name: str, others: set[str]) -> None:
        """Hold all that passes between a node and these others. An empty set mends the node's links."""
        self.held -= {frozenset((name, other)) for other in self.processes}
        self.held |= {frozenset((name, other)) for other in others}

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        pid = self.processes[name].pid
        assert pid
        os.kill(pid, number)

    def stop(self, name: str) -> None:
        """Ask the node to leave."""
        (self.folder / f"{name}.log.stop").touch()

    def errors(self, name: str) -> str:
        file = self.folder / f"{name}.err"
        return file.read_text() if file.exists() else ""

    def events(self, name: str, kind: str | None = None) -> list[dict]:
        file = self.folder / f"{name}.log"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in events if kind in (None, event["event"])]

    def last_step(self, name: str) -> int:
        return max((event["step"] for event in self.events(name, "step")), default=0)

    def wait_until(self, condition, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.describe()
            time.sleep(0.02)

    def wait_for_step(self, name: str, step: int, seconds: float = 60.0) -> None:
        self.wait_until(lambda: self.last_step(name) >= step, seconds)

    def wait_for_end(self, *names: str, seconds: float = 90.0) -> None:
        self.wait_until(lambda: all(self.processes[name].exitcode is not None for name in names), seconds)
        for name in names:
            assert self.processes[name].exitcode == 0, self.describe()

    def check(self, *names: str, is_whole: bool = True) -> None:
        """Each step of these nodes ended with the state that one undisturbed node has."""
        expected = train_alone(self.num_steps, self.num_blocks)
        for name in names:
            for event in self.events(name, "step"):
                assert event["digest"] == expected[event["step"] - 1], self.describe()
            if is_whole:
                assert self.events(name, "end")[-1]["digest"] == expected[-1], self.describe()

    def longest_pause(self, name: str) -> float:
        times = [event["at"] for event in self.events(name, "step")]
        return max((after - before for before, after in zip(times, times[1:], strict=False)), default=0.0)

    def longest_standstill(self) -> float:
        """The longest time in which no node completed a step that none had completed before."""
        firsts: dict[int, float] = {}
        for name in self.processes:
            for event in self.events(name, "step"):
                firsts[event["step"]] = min(event["at"], firsts.get(event["step"], event["at"]))
        times = [firsts[step] for step in sorted(firsts)]
        return max(after - before for before, after in zip(times, times[1:], strict=False))

    def describe(self) -> str:
        events = sorted((event for name in self.processes for event in self.events(name)), key=lambda e: e["at"])
        lines = [json.dumps(event) for event in events][-150:]
        return "\n".join([*lines, *(f"{name}: {self.errors(name)}" for name in self.processes)])
