"""
Check what only a GPU can show, part by part.

    make gpu-check                                # offline: a GPU and no package index, in 9 minutes
    make gpu-check GPU_LEVEL=full                 # also vLLM, DeepSpeed and a run on GSM8K
    make gpu-check GPU_CHECK_FLAGS=--dry-run      # the same code on a CPU, with tiny models
    python -m evals.gpu_check offline --only tests sae-kernel

LEVEL.json and LEVEL.md in the output folder are written anew after every part. A run that was stopped goes on
with the parts that are not done; one that failed is run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from evals.gpu_check.parts import FULL, LEVELS, OFFLINE, ROOT, Part
from evals.gpu_check.table import markdown
from evals.gpu_check.wheels import install
from steer.files import replace_file
from steer.versions import versions

RESULTS = ROOT / "evals" / "results" / "gpu"
DRY_RESULTS = ROOT / "runs" / "gpu-check"
MINUTES = {"offline": 9.0, "full": 180.0}
PACKAGES = (
    "steer",
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "trl",
    "peft",
    "datasets",
    "vllm",
    "deepspeed",
)
# Characters of what a part said last that did not succeed.
KEPT = 4000
# Seconds from asking a part to end until it is ended.
GRACE = 10
# A CPU that other programs use too may take so many times the limits, which are those of a GPU.
DRY_PATIENCE = 10
_ASK_TORCH = """
import json, torch
found = {"gpu": None, "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda}
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    found |= {"gpu": gpu.name, "gpu_GB": round(gpu.total_memory / 1e9, 1)}
print(json.dumps(found))
"""


def main() -> None:
    args = _arguments()
    known = environment(args.dry_run, install())
    where = machine(known)
    if not args.dry_run and where["gpu"] is None:
        sys.exit(
            "error: no GPU is there (torch.cuda.is_available() is false); --dry-run tries the code on a CPU"
        )
    out = args.out or (DRY_RESULTS if args.dry_run else RESULTS)
    file = out / f"{args.level}.json"
    parts = [part for part in (OFFLINE if args.level == "offline" else FULL) if _chosen(part, args)]
    record = before(file, {"level": args.level, "dry_run": args.dry_run, "machine": where}, args.force)
    minutes = args.minutes or MINUTES[args.level] * (DRY_PATIENCE if args.dry_run else 1)
    end = time.monotonic() + 60 * minutes
    print(f"{where['gpu'] or where['processor']}; {len(parts)} parts, results in {file}", flush=True)
    for part in parts:
        earlier = record["parts"].get(part.name, {})
        if earlier.get("status") == "done" and not args.force:
            print(f"{part.name}: done before, in {earlier['seconds']:.0f} s", flush=True)
            continue
        left = end - time.monotonic()
        found = skipped(part, left) or run(part, args.dry_run, left, known)
        if found["status"] != "skipped" or earlier.get("status", "skipped") == "skipped":
            record["parts"][part.name] = found  # else what an earlier run has found is kept
        write(out, args.level, record)
        took = f" in {found['seconds']:.0f} s" if "seconds" in found else ""
        why = f": {found['why']}" if "why" in found else ""
        print(f"{part.name}: {found['status']}{took}{why}", flush=True)
    print(markdown(record))
    wrong = [name for name, found in record["parts"].items() if found["status"] in ("failed", "too slow")]
    if wrong:
        sys.exit(f"error: {', '.join(wrong)}: see `output` in {file}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("level", choices=LEVELS, help="offline needs no package index; full has more parts")
    parser.add_argument("--out", type=Path, help="folder of the results (default: evals/results/gpu)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="run these parts alone")
    parser.add_argument("--force", action="store_true", help="run parts again that are done")
    parser.add_argument("--minutes", type=float, help="for all parts (default: 9 for offline, 180 for full)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny models")
    args = parser.parse_args()
    unknown = set(args.only or ()) - {part.name for part in FULL}
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; parts: {', '.join(p.name for p in FULL)}")
    return args


def _chosen(part: Part, args: argparse.Namespace) -> bool:
    return not args.only or part.name in args.only


def environment(dry_run: bool, site: Path | None) -> dict[str, str]:
    """Of a part's process: it finds this checkout and the installed wheels; a dry run sees no GPU."""
    paths = [str(ROOT), *map(str, filter(None, [site, os.environ.get("PYTHONPATH")]))]
    known = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
    if dry_run:
        known |= {"CUDA_VISIBLE_DEVICES": "", "STEER_GPU_TESTS_ON": "cpu", "TRITON_INTERPRET": "1"}
    return known


def machine(env: dict[str, str]) -> dict[str, Any]:
    """What has to be the same for parts of one file of results."""
    asked = subprocess.run([sys.executable, "-c", _ASK_TORCH], env=env, capture_output=True, text=True)
    if asked.returncode:
        sys.exit(f"error: torch does not work here: {asked.stderr.strip().splitlines()[-1]}")
    where = json.loads(asked.stdout.strip().splitlines()[-1])
    own = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    return {**where, **own, "python": platform.python_version(), "versions": versions(*PACKAGES)}


def before(file: Path, run: dict[str, Any], force: bool) -> dict[str, Any]:
    """What an earlier run with the same settings on the same machine has left, or a new record."""
    if file.exists():
        record = json.loads(file.read_text())
        if {name: record[name] for name in run} == run:
            return record
        if not force:
            sys.exit(f"error: {file} is of another machine or other versions; give --out or --force")
    return {**run, "parts": {}}


def skipped(part: Part, left: float) -> dict[str, Any] | None:
    """Why a part is not run, as its record; None where it is run."""
    missing = [name for name in part.needs if find_spec(name) is None]
    if missing:
        return {"status": "skipped", "why": f"not installed: {', '.join(missing)}"}
    if left < part.seconds / 2:
        return {"status": "skipped", "why": f"{max(0, left):.0f} s are left, it may take {part.seconds}"}
    return None


def run(part: Part, dry_run: bool, left: float, env: dict[str, str]) -> dict[str, Any]:
    """A part in a process of its own, ended after its time; its record."""
    command = part.command(dry_run)
    limit = min(part.seconds * (DRY_PATIENCE if dry_run else 1), left)
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # its own processes end with it
    )
    try:
        said, _ = process.communicate(timeout=limit)
        why = f"exit code {process.returncode}" if process.returncode else None
    except subprocess.TimeoutExpired:
        said = _end(process)
        why = f"ended after {limit:.0f} s"
    except BaseException:  # the check is stopped: in a session of its own the part would go on
        _end(process)
        raise
    found: dict[str, Any] = {
        "status": "done",
        "about": part.about,
        "command": " ".join(command[1:]),
    }
    found["seconds"] = round(time.monotonic() - start, 1)
    result = _result(said)
    if result is not None:
        found["result"] = result
    elif why is None:
        why = "no result in its last line"
    if why is not None:
        slow = why.startswith("ended")
        found |= {"status": "too slow" if slow else "failed", "why": why, "output": said[-KEPT:]}
    return found


def _result(said: str) -> dict[str, Any] | None:
    """The JSON in the last line of what a part said; None where there is none."""
    lines = said.strip().splitlines()
    with suppress(ValueError):
        return json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None
    return None


def _end(process: subprocess.Popen[str]) -> str:
    """End a part and the processes that it started, which a launcher needs time for; what it said."""
    with suppress(ProcessLookupError):  # it has just ended on its own
        os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.communicate(timeout=GRACE)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


def write(out: Path, level: str, record: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / f"{level}.json", (json.dumps(record, indent=1) + "\n").encode())
    replace_file(out / f"{level}.md", (markdown(record) + "\n").encode())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the part that runs too
    main()
