"""Processes for the tests of this folder: started together, and read to their end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from tests.concurrency.worker import Job

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60


def run_together(jobs: Sequence[Job]) -> list[list[Any]]:
    """What each job's process said, after they had all been ready; a killed one said what it could."""
    command = [sys.executable, "-W", "error", "-m", "tests.concurrency.worker"]
    processes = [
        subprocess.Popen(
            [*command, msgspec.json.encode(job).decode()],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for job in jobs
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline()) == "ready"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        said = []
        for process, job in zip(processes, jobs, strict=True):
            words, _ = process.communicate(timeout=PATIENCE_S)
            assert process.returncode == (-9 if job.die_at else 0) or (job.die_at and process.returncode == 0)
            said.append([json.loads(line) for line in words.splitlines()])
        return said
    finally:
        for process in processes:
            process.kill()
            process.communicate()
