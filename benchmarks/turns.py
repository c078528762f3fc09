"""Processes that take turns: each variant of a measurement has one, and waits while another one works."""

import json
import os
import subprocess
import sys
import time


def pin(threads):
    """Leaves this process `threads` of its cores; before JAX or PyTorch count them."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def serve(calls, wait, facts):
    """The variant's side: warms up, tells its facts, and answers "train 3" on stdin by the seconds of one of 3 steps.

    Args:
        calls: by task a function that starts one step and returns what to wait for.
        wait: waits for that.
        facts: what the measurement keeps about the variant; gets the seconds of the first call of each task.
    """
    for task, call in calls.items():  # what is compiled or chosen at the first calls
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
    """A variant's process ended; what it said is on stderr."""


class Worker:
    """A variant's process, seen from outside; `command` is a program that calls `serve`."""

    def __init__(self, name, command, environment):
        self.name, self.facts = name, {}
        # All of them are there at once, and JAX would take most of a GPU's memory for the first.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | environment
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ready(self):
        """Waits until the variant has warmed up; then it has its facts."""
        self.facts = json.loads(self._answer())
        return self

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"{self.name}: its process ended with exit code {self._process.wait()}")
        return line

    def seconds(self, task, count):
        """Of one step, over `count` of them."""
        self._process.stdin.write(f"{task} {count}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
