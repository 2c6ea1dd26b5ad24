"""The results of the check on a GPU as a page of Markdown."""

from __future__ import annotations

from typing import Any


def markdown(record: dict[str, Any]) -> str:
    """What became of every part, then the figures of those that measured something."""
    where = record["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    head = f"{where['gpu'] or where['processor']}, Python {where['python']}, {packages}"
    lines = [f"Dry run: these figures say nothing. {head}." if record["dry_run"] else f"{head}.", ""]
    lines += ["| part | | s | |", "|---|---|---|---|"]
    for name, part in record["parts"].items():
        lines.append(f"| {name} | {part['status']} | {part.get('seconds', '')} | {_said(part)} |")
    done = {name: part["result"] for name, part in record["parts"].items() if part["status"] == "done"}
    speed = {name: result for name, result in done.items() if "rollout tokens/s" in result}
    if speed:
        lines += ["", *_speed(speed)]
    for result in done.values():
        if "rows" in result:
            lines += ["", *_kernel(result)]
    return "\n".join(lines)


def _said(part: dict[str, Any]) -> str:
    result = part.get("result", {})
    counts = [f"{result['passed']} passed"] if "passed" in result else []
    counts += [f"{len(result[key])} {key}" for key in ("failed", "skipped") if result.get(key)]
    return "; ".join(filter(None, [part.get("why"), ", ".join(counts)]))


def _speed(results: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| | tokens of an update | s an update | rollout | backward | rollout tokens/s | MB beyond the base |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for name, r in results.items():
        batch = r["batch"]
        cells = [
            name,
            f"{batch['prompts']} x {batch['samples']} x {batch['tokens']:,}",
            *(f"{r[key]:.2f}" for key in ("step s", "rollout s", "update s")),
            f"{r['rollout tokens/s']:,.0f}",
            f"{r['memory MB']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    plain = [(name, *path) for name, r in results.items() for path in r.get("plain paths", {}).items()]
    if plain:
        lines += ["", *(f"- {name}: plain path `{path}`: {why}" for name, path, why in plain)]
    return lines


def _kernel(result: dict[str, Any]) -> list[str]:
    sides = ("plain", "chunked", "triton")
    lines = [f"| k | {' | '.join(f'{side} ms | relative error' for side in sides)} |", f"|---{'|---' * 6}|"]
    for row in result["rows"]:
        pairs = [f"{row[side]['milliseconds']:.2f} | {row[side]['relative_error']:.1e}" for side in sides]
        lines.append(f"| {row['k']} | {' | '.join(pairs)} |")
    return lines
