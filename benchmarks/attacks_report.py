"""The table of `benchmarks/attacks.py`, and whether each row meets the bar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.provenance import heading

MAX_RATIO = 3.0  # of p99 beside an attack and p99 alone
MAX_PEAK = 1.5e9  # bytes
MAX_GROWTH = 64e6  # bytes above what the server had before the attack, ten seconds after it
STOP_MARGIN = 1.0  # seconds beyond the grace time, for the process itself to end


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: hardware, command, the bar, a table."""
    control = any("control_99" in client for row in report["rows"] for client in row["clients"])
    explained = (
        ["Control: p99 while the same traffic, as dense, went to a process that only reads it; its ratio is that of "
         "beside and control.", ""] if control else []
    )  # fmt: skip
    lines = [
        *heading("A good client next to attacks", report),
        f"{report['rounds']} rounds of {report['seconds']:g} s without and with each attack. The bar: p99 below "
        f"{MAX_RATIO:g} times that without attack, no 429 and no other error for the good clients, peak memory below "
        f"{MAX_PEAK / 1e9:g} GB, within 10 s back to at most {MAX_GROWTH / 1e6:g} MB more than before, and SIGTERM "
        f"obeyed within {report['grace']} s. p50 and p99 in ms, memory of the server and its children in MB. "
        "The attack comes from another address, or from that of the good clients with another API key.",
        "",
        *explained,
        "| attack | from | clients | p50 alone, beside | p99 alone, beside | ratio | "
        f"{'control, ratio | ' if control else ''}429 | failed | before, peak, after | SIGTERM | missed |",
        "|---" * (12 if control else 11) + "|",
    ]
    for row in report["rows"]:
        for client in row["clients"]:
            lines.append(f"| {' | '.join(cells(row, client, report['grace'], control=control))} |")
    return "\n".join(lines) + "\n"


def cells(row: Mapping[str, Any], client: Mapping[str, Any], grace: float, *, control: bool) -> list[str]:
    """One line of the table; what belongs to the server stands in the first of an attack."""
    first = client is row["clients"][0]
    memory = ", ".join(f"{row[name] / 1e6:.0f}" for name in ("before", "peak", "after"))
    failures = missed(row, client, grace)
    dropped = client.get("control_99", float("nan"))
    return [
        row["attack"] if first else "",
        row["source"] if first else "",
        str(client["count"]),
        f"{client['alone_50']:.1f}, {client['beside_50']:.1f}",
        f"{client['alone_99']:.1f}, {client['beside_99']:.1f}",
        f"{client['ratio']:.1f}",
        *([f"{dropped:.1f}, {client['beside_99'] / dropped:.1f}"] if control else []),
        str(client["429"]),
        str(client["failed"]),
        memory if first else "",
        f"{row['stopped']:.1f} s" if first else "",
        ", ".join(name for name in failures if first or name not in SERVER),
    ]


SERVER = ("peak", "memory", "SIGTERM")  # parts of the bar that concern the server


def missed(row: Mapping[str, Any], client: Mapping[str, Any], grace: float) -> list[str]:
    """The parts of the bar that an attack misses for so many good clients."""
    parts = {
        "p99": client["ratio"] < MAX_RATIO,
        "429": client["429"] == 0,
        "failed": client["failed"] == 0,
        "peak": row["peak"] < MAX_PEAK,
        "memory": row["after"] - row["before"] <= MAX_GROWTH,
        "SIGTERM": row["stopped"] <= grace + STOP_MARGIN,
    }
    return [name for name, met in parts.items() if not met]
