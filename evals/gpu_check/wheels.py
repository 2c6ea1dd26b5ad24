"""
Carry the packages that a machine with a GPU and without a package index lacks.

    make gpu-wheels                          # here: the wheels of evals/gpu_check/wheels.txt into .gpu-wheels
    python -m evals.gpu_check.wheels MORE    # and others, such as "pandas==3.1.1"
    python -m evals.gpu_check.wheels --limit-mib 60    # where no more can be copied

`make gpu-check` there installs them into .gpu-site, which its parts import from first. Nothing else on that
machine changes.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from evals.gpu_check.parts import ROOT, TRAIN

WHEELS, SITE = ROOT / ".gpu-wheels", ROOT / ".gpu-site"
LIST = Path(__file__).with_name("wheels.txt")
# Python 3.12 on Linux; pip takes each name of a platform for itself.
TARGET = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("more", nargs="*", help="other packages that the machine lacks, with their versions")
    parser.add_argument(
        "--limit-mib",
        type=float,
        metavar="MIB",
        help="end with an error where the wheels and the repository together are larger; default: no limit",
    )
    args = parser.parse_args()
    WHEELS.mkdir(exist_ok=True)
    for old in WHEELS.glob("*.whl"):
        old.unlink()
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *TARGET, *platforms]
    subprocess.run([*command, "--dest", str(WHEELS), "--requirement", str(LIST), *args.more], check=True)
    sizes = {wheel.name: wheel.stat().st_size / 2**20 for wheel in WHEELS.glob("*.whl")}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size:7.2f} MiB  {name}")
    tree = tree_mib()
    total = sum(sizes.values()) + tree
    print(f"{total:7.2f} MiB  with the {tree:.2f} of the repository")
    if args.limit_mib is not None and total > args.limit_mib:
        sys.exit(f"error: {total:.1f} MiB are more than --limit-mib {args.limit_mib:g}: leave something out")


def tree_mib() -> float:
    """The files of the repository, tracked and new, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    return sum(file.stat().st_size for file in files if file.is_file()) / 2**20


def install() -> Path | None:
    """
    Make what .gpu-wheels holds importable where something of it is missing.

    Returns:
        The folder that it was installed into, which processes need on their path; None where nothing is
        missing or there are no wheels.
    """
    wheels = sorted(WHEELS.glob("*.whl"))
    if not wheels or all(find_spec(name) for name in TRAIN):
        return None
    done = SITE / "installed.txt"
    names = "\n".join([platform.python_version(), *(wheel.name for wheel in wheels)])
    if not done.exists() or done.read_text() != names:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
        command += ["--no-compile", "--no-cache-dir", "--target", str(SITE), *map(str, wheels)]
        if subprocess.run(command).returncode:
            sys.exit(f"error: the wheels in {WHEELS.name} are for Python 3.12 on Linux, and pip refuses them")
        done.write_text(names)
    sys.path.insert(0, str(SITE))
    return SITE


if __name__ == "__main__":
    main()
