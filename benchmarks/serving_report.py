"""Tables and a chart of the results of benchmarks/serve.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.provenance import heading

NAMES = {"ours": "mixmim serve", "litserve": "LitServe", "bentoml": "BentoML batchable", "fastapi": "FastAPI"}
SIZES = ("16 kB", "75 kB", "2 MB")
COLOURS = {"ours": "#0b6e4f", "litserve": "#b5651d", "bentoml": "#4059ad", "fastapi": "#8a8d91"}


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown: hardware, command, then one table per model and body."""
    lines = [
        *heading("Serving under load", report),
        "The load generator runs on the same cores.",
        f"Images/s, p50 and p99 in ms, CPU in ms per image; medians of {report['rounds']} rounds.",
        "Efficiency: images/s over the bare engine's; bare/CPU: its CPU time per image over the server's.",
    ]
    for model, body in sorted({(cell["model"], cell["body"]) for cell in report["cells"]}):
        lines += ["", f"## {model}, {body}", "", *_table(report, model, body)]
    lines += ["", "## Memory", "", "| | peak, MB |", "|---|---|"]
    lines += [f"| {name} | {size / 1e6:.0f} |" for name, size in report["memory"].items()]
    for model, soak in report["soak"].items():
        turn, slope, last = soak["turn"], soak["slope_mb_per_minute"], soak["memory"][-1] / 1e6
        lines += ["", f"128 clients for {soak['seconds']} s on {model}: {turn['rate']:.0f} images/s, "
                  f"{turn['bad'] + turn['broken']} errors, memory in the second half {slope:+.1f} MB per minute "
                  f"(last {last:.0f} MB)."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _table(report: dict[str, Any], model: str, body: str) -> list[str]:
    cells = [cell for cell in report["cells"] if (cell["model"], cell["body"]) == (model, body)]
    lines = [
        "| file | clients | server | images/s | of the rounds | p50 | p99 | errors | efficiency | CPU | bare/CPU |"
    ]
    lines.append("|---" * 11 + "|")
    for cell in sorted(cells, key=lambda cell: (SIZES.index(cell["size"]), cell["clients"])):
        low, high = cell["spread"]
        lines.append(
            f"| {cell['size']} | {cell['clients']} | {NAMES[cell['server']]} | {cell['rate']:.1f} "
            f"| {low:.1f}-{high:.1f} | {cell['p50']:.1f} | {cell['p99']:.1f} | {cell['errors']:.0f} "
            f"| {cell['efficiency']:.2f} | {1e3 * cell['cpu']:.2f} | {cell['cpu_share']:.2f} |"
        )
    return lines


def picture(report: dict[str, Any], path: Path) -> None:
    """Draw images/s by clients, one panel per model and size, for the first kind of body."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = [cell for cell in report["cells"] if cell["body"] == report["cells"][0]["body"]]
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    sizes = list(dict.fromkeys(cell["size"] for cell in cells))
    figure, panels = plt.subplots(len(models), len(sizes), squeeze=False, figsize=(4 * len(sizes), 3 * len(models)))
    for row, model in enumerate(models):
        for column, size in enumerate(sizes):
            panel = panels[row][column]
            here = [cell for cell in cells if (cell["model"], cell["size"]) == (model, size)]
            for server in dict.fromkeys(cell["server"] for cell in here):
                line = sorted((cell["clients"], cell["rate"]) for cell in here if cell["server"] == server)
                panel.plot(*zip(*line, strict=True), marker="o", label=NAMES[server], color=COLOURS[server])
            if here:
                bare = sum(cell["bare"] for cell in here) / len(here)
                panel.axhline(bare, color="black", linestyle=":", linewidth=1, label="bare engine")
            panel.set(title=f"{model}, {size}", xscale="log", ylim=(0, None))
            panel.set_xticks(ticks := sorted({cell["clients"] for cell in here}), labels=[str(tick) for tick in ticks])
            panel.minorticks_off()
    panels[0][0].set_ylabel("images/s")
    panels[-1][0].set_xlabel("clients")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=8)
    figure.tight_layout(rect=(0, 0.08 / len(models), 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)
