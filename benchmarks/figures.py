"""Draws `benchmarks/results/*.json`.

python -m benchmarks.figures
"""

import json
import pathlib

from matplotlib import pyplot

pyplot.switch_backend("Agg")
pyplot.rcParams["svg.hashsalt"] = "The same results give the same file."

# One color per system, one line or hatch per backend.
COLORS = {"ours": "#d0410c", "keras_hub": "#8d99ae", "transformers": "#e9b44c"}
STYLES = {"jax": "-", "tensorflow": "--", "torch": ":", "": "-."}
HATCHES = {"jax": "", "tensorflow": "//", "torch": "..", "": ""}


def _look(name):
    system, _, backend = name.partition("-")
    return COLORS.get(system, "#5b5b5b"), backend


def _results(folder, command):
    for path in sorted(folder.glob(f"{command}-*.json")):
        yield path.stem[len(command) + 1 :], json.loads(path.read_text())


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
        "speed": (draw_speed, {}),
        "first-token": (
            draw_lines,
            {
                "xlabel": "max_length",
                "ylabel": "ms to first token",
                "scale": 1e3,
            },
        ),
        "position": (
            draw_lines,
            {"xlabel": "position", "ylabel": "ms/token"},
        ),
        "memory": (
            draw_lines,
            {
                "xlabel": "MiB of keys and values",
                "ylabel": "MiB above the weights at the peak",
            },
        ),
    }
    for command, (function, options) in kinds.items():
        results = list(_results(folder, command))
        if not results:
            continue
        figure, axes = pyplot.subplots(
            1,
            len(results),
            figsize=(5.5 * len(results), 3.4),
            squeeze=False,
            layout="constrained",
        )
        for ax, (case, result) in zip(axes[0], results):
            function(folder, ax, case, result, **options)
            ax.set_title(f"{case}, {result['arguments']['dtype']}")
        # Without a date, so that the same results give the same file.
        figure.savefig(folder / f"{command}.svg", metadata={"Date": None})
        pyplot.close(figure)


if __name__ == "__main__":
    draw(pathlib.Path(__file__).parent / "results")
