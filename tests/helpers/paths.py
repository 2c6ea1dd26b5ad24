"""The checkout, and the folder of benchmark files and cases beside it, which not every machine has."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
