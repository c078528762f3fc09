"""Processes that take turns: each variant of a measurement has its own, which waits while another one works."""

import json
import os
import subprocess
import sys
import time


def pin(threads):
    """Restricts this process to `threads` of its cores; call it before JAX or PyTorch count them."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def serve(calls, wait, facts):
    """Runs the variant's side: warms up, prints facts, and answers "train 3" on stdin with the seconds per step of 3.

    Args:
        calls: maps a task to a function that starts one step and returns an object to wait for.
        wait: waits for that object.
        facts: facts about the variant to store; the seconds of each task's first call are added.
    """
    for task, call in calls.items():  # the first calls compile, and choose kernels
        began = time.perf_counter()
        wait(call())
        facts[f"first_{task}_s"] = round(time.perf_counter() - began, 2)
        wait(call())
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        task, count = line.split()
        began = time.perf_counter()
        for _ in range(int(count)):
            last = calls[task]()
        wait(last)
        print((time.perf_counter() - began) / int(count), flush=True)


class WorkerError(RuntimeError):
    """A variant's process ended; its messages are on stderr."""


class Worker:
    """The parent's view of a variant's process; `command` is a program that calls `serve`."""

    def __init__(self, name, command, environment):
        self.name, self.facts = name, {}
        # All of them exist at once, and JAX would give most of a GPU's memory to the first.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | environment
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ready(self):
        """Waits until the variant has warmed up and sent its facts."""
        self.facts = json.loads(self._answer())
        return self

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"{self.name}: its process ended with exit code {self._process.wait()}")
        return line

    def seconds(self, task, count):
        """Returns the seconds per step, over `count` steps."""
        self._process.stdin.write(f"{task} {count}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
