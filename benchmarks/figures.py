"""Draws `benchmarks/results/*.json`.

python -m benchmarks.figures
"""

import json
import math
import pathlib

from matplotlib import pyplot
from matplotlib import ticker

pyplot.switch_backend("Agg")
pyplot.rcParams["svg.hashsalt"] = "The same results give the same file."

# One color per system, one line or hatch per backend.
COLORS = {
    "ours": "#d0410c",
    "keras_hub": "#8d99ae",
    "transformers": "#e9b44c",
    "llama_cpp": "#2a6f97",
}
STYLES = {"jax": "-", "tensorflow": "--", "torch": ":", "": "-."}
COLUMNS = 4
MARKERS = {"jax": "o", "tensorflow": "s", "torch": "^", "": "D"}
HATCHES = {"jax": "", "tensorflow": "//", "torch": "..", "": ""}


def _look(name):
    system, _, backend = name.partition(" ")[0].partition("-")
    return COLORS.get(system, "#5b5b5b"), backend


def _results(folder, command):
    for path in sorted(folder.glob(f"{command}-*.json")):
        yield path.stem[len(command) + 1 :], json.loads(path.read_text())


def _says_bytes(result):
    """Whether it is no result of a time when they were not counted."""
    return all("bytes_per_token" in x for x in result["systems"].values())


def _title(case, result):
    """The case, and the precision unless systems say theirs."""
    dtypes, quantize = (
        [x] if isinstance(x, str) else x
        for x in (
            result["arguments"]["dtype"],
            result["arguments"].get("quantize", "none"),
        )
    )
    if len(dtypes) > 1 or len(quantize) > 1:
        return case
    return ", ".join([case, *dtypes, *(x for x in quantize if x != "none")])


def draw_speed(folder, axes, case, result):
    for i, (name, row) in enumerate(result["systems"].items()):
        color, backend = _look(name)
        rate = row["tokens_per_second"]
        spread = [[rate - row["slowest"]], [row["fastest"] - rate]]
        axes.barh(
            i, rate, xerr=spread, color=color, hatch=HATCHES[backend], alpha=0.9
        )
    axes.set_yticks(range(len(result["systems"])), result["systems"])
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s")


def draw_roofline(folder, axes, case, result):
    """What a step reads for a token, and how fast that is done.

    No system is above the line, unless a processor's own memory holds what is
    read.
    """
    systems = result["systems"].items()
    clusters = {}
    labels = set()
    for name, row in systems:
        color, backend = _look(name)
        label = name.partition(" ")[0]
        mib = row["bytes_per_token"] / 2**20
        clusters.setdefault(row["precision"], []).append(mib)
        axes.plot(
            mib,
            row["tokens_per_second"],
            MARKERS[backend],
            color=color,
            alpha=0.9,
            label=None if label in labels else label,
        )
        labels.add(label)
    bandwidth = result["machine"]["bytes_per_second"]
    span = [x for mib in clusters.values() for x in mib]
    ends = [min(span) / 1.4, max(span) * 1.4]
    axes.plot(
        ends,
        [bandwidth / 2**20 / x for x in ends],
        color="black",
        linewidth=1,
        label=f"memory, {bandwidth / 1e9:.0f} GB/s",
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    # Room for the names of precisions.
    axes.set_ylim(bottom=axes.get_ylim()[0] / 3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.set_minor_locator(ticker.NullLocator())
    for precision, mib in clusters.items():
        axes.text(
            min(mib),
            0.02,
            precision,
            rotation=90,
            ha="right",
            va="bottom",
            fontsize="x-small",
            color="#5b5b5b",
            transform=axes.get_xaxis_transform(),
        )
    axes.set_xlabel("MiB read per token: weights and filled cache")
    axes.set_ylabel("tokens/s")
    axes.legend(fontsize="small")


def draw_lines(folder, axes, case, result, xlabel, ylabel, scale=1):
    for name, row in result["systems"].items():
        color, backend = _look(name)
        if isinstance(row, list):
            row = dict(zip(result["cache_mib"], row))
        axes.plot(
            [float(x) for x in row],
            [y * scale for y in row.values()],
            STYLES[backend],
            marker="o",
            color=color,
            label=name,
        )
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def draw(folder):
    """Draws a figure for each kind of result that is there."""
    kinds = {
        "speed": ("speed", draw_speed, {}),
        "roofline": ("speed", draw_roofline, {}),
        "first-token": (
            "first-token",
            draw_lines,
            {
                "xlabel": "max_length",
                "ylabel": "ms to first token",
                "scale": 1e3,
            },
        ),
        "position": (
            "position",
            draw_lines,
            {"xlabel": "position", "ylabel": "ms/token"},
        ),
        "memory": (
            "memory",
            draw_lines,
            {
                "xlabel": "MiB of keys and values",
                "ylabel": "MiB above the weights at the peak",
            },
        ),
    }
    for kind, (command, function, options) in kinds.items():
        results = list(_results(folder, command))
        if kind == "roofline":
            results = [(x, y) for x, y in results if _says_bytes(y)]
        if not results:
            continue
        columns = min(len(results), COLUMNS)
        rows = math.ceil(len(results) / columns)
        # Speed has a bar for each.
        systems = max(len(x["systems"]) for _, x in results)
        figure, axes = pyplot.subplots(
            rows,
            columns,
            figsize=(5.5 * columns, max(3.4, 0.3 * systems) * rows),
            squeeze=False,
            layout="constrained",
        )
        for ax in axes.flat[len(results) :]:
            ax.set_axis_off()
        for ax, (case, result) in zip(axes.flat, results):
            function(folder, ax, case, result, **options)
            ax.set_title(_title(case, result))
        # Without a date, so that the same results give the same file.
        figure.savefig(folder / f"{kind}.svg", metadata={"Date": None})
        pyplot.close(figure)


if __name__ == "__main__":
    draw(pathlib.Path(__file__).parent / "results")
