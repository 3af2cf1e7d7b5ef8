# SPDX-License-Identifier: Apache-2.0
"""What a run of the tests has done: its stages with their minutes, its counts, its slowest tests."""

import os
import subprocess
import time
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor

Stage = namedtuple("Stage", "name seconds passed failed")
# Lines of a failed check that the summary repeats.
REPEATED = 40


def headline(text):
    print(f"\n== {text}", flush=True)


def stolen():
    """Time that this machine's processors were ready and their host ran something else, in hundredths of a second (proc(5))."""
    with open("/proc/stat") as file:
        return int(file.readline().split()[8])


def shown(command, env):
    """Runs a command and prints what it says; returns its status and its last lines."""
    last = deque(maxlen=REPEATED)
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors="replace") as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            last.append(line)
    return process.returncode, last


class Report:
    """Collects results. `finish` prints the summary and returns the exit status."""

    def __init__(self):
        self.stages = []
        self.tests = []
        # Names of failed checks, with the end of their output.
        self.faults = []
        self.begun, self.stolen = time.monotonic(), stolen()

    @property
    def failed(self):
        return sum(stage.failed for stage in self.stages)

    def add(self, name, seconds, passed, failed):
        self.stages.append(Stage(name, seconds, passed, failed))

    def check(self, name, *commands, env=None):
        """Runs commands one after the other; together they pass or fail as one."""
        headline(name)
        begun = time.monotonic()
        good, last = True, []
        for command in commands:
            try:
                status, last = shown(command, env)
            except FileNotFoundError as missing:
                status, last = 1, [f"{missing.filename} is not installed: `tests/run prepare` as root installs it\n"]
                print(last[0], end="")
            if status:
                good = False
                break
        if not good:
            print(f"FAILED: {name}", flush=True)
            self.faults.append((name, last))
        self.add(name, time.monotonic() - begun, int(good), int(not good))
        return good

    def together(self, checks):
        """Runs checks, each a name and a command, at the same time. Each prints what it said once it has ended."""

        def run(command, env):
            try:
                done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                      errors="replace", check=False)
            except FileNotFoundError as missing:
                return 1, f"{missing.filename} is not installed: `tests/run prepare` as root installs it\n", time.monotonic()
            return done.returncode, done.stdout, time.monotonic()

        begun = time.monotonic()
        with ThreadPoolExecutor(len(checks)) as pool:
            running = [(name, pool.submit(run, command, env)) for name, command, env in checks]
            for name, ending in running:
                status, said, ended = ending.result()
                headline(name)
                print(said, end="")
                if status:
                    print(f"FAILED: {name}", flush=True)
                    self.faults.append((name, said.splitlines(keepends=True)[-REPEATED:]))
                # The minutes of all stages add up to those of the run.
                self.add(name, max(0, ended - begun), int(not status), int(bool(status)))
                begun = max(begun, ended)

    def held(self, name, complaints):
        """A check in this program: it passes if `complaints` finds none."""
        headline(name)
        begun = time.monotonic()
        found = list(complaints())
        for complaint in found:
            print(f"FAILED: {complaint}", flush=True)
        if found:
            self.faults.append((name, [f"{complaint}\n" for complaint in found[:REPEATED]]))
        self.add(name, time.monotonic() - begun, int(not found), int(bool(found)))

    def counted(self, name, run):
        """Runs `run`, which returns (passed, failed, [(seconds, test)]). A stage without any test has failed."""
        headline(name)
        begun = time.monotonic()
        passed, failed, tests = run()
        if passed + failed == 0:
            failed = 1
            print(f"FAILED: {name}: no test ran", flush=True)
        self.tests += tests
        self.add(name, time.monotonic() - begun, passed, failed)

    def prepared(self, name, run):
        """Runs a step that tests nothing. Its failure ends the whole run."""
        headline(name)
        begun = time.monotonic()
        run()
        self.add(name, time.monotonic() - begun, 0, 0)

    def finish(self):
        passed = sum(stage.passed for stage in self.stages)
        print("\nminutes  passed  failed  stage")
        for stage in self.stages:
            print(f"{stage.seconds / 60:7.1f} {stage.passed:7} {stage.failed:7}  {stage.name}")
        total = sum(stage.seconds for stage in self.stages)
        print(f"{total / 60:7.1f} {passed:7} {self.failed:7}  all")
        slowest = sorted(self.tests, reverse=True)[:10]
        if slowest:
            print("\nseconds  the slowest tests")
        for seconds, test in slowest:
            print(f"{seconds:7.1f}  {test}")
        for name, last in self.faults:
            print(f"\nFAILED: {name}. Its output ends in:")
            print("".join(f"  {line}" for line in last), end="")
        hundredths = (time.monotonic() - self.begun) * 100 * (os.cpu_count() or 1)
        print(f"\nprocessor time that the machine's own host took away: {(stolen() - self.stolen) / hundredths:.0%}")
        print(f"\n{passed} passed, {self.failed} failed")
        return 1 if self.failed or not self.stages else 0
