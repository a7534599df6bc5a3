"""Results as text."""

from tabulate import tabulate


def show(result):
    """Prints a result, by precision first if it has several."""
    by_precision(result)
    rows = []
    for name, values in result["systems"].items():
        if isinstance(values, list):
            values = {
                f"{cache:.0f} MiB": f"{added:.0f} ({added / cache:.2f}x)"
                for cache, added in zip(result["cache_mib"], values)
            }
        rows.append({"system": name, **values})
        rows[-1].pop("precision", None)  # The name says it.
    print(tabulate(rows, headers="keys", floatfmt=".3g"))
    if result.get("ties"):
        print(f"{result['ties']} rows parted at a tie")
    for precision, count in result.get("differing_rows", {}).items():
        print(f"{count} rows went on otherwise in {precision}")
    for backend, floor in result.get("floors", {}).items():
        steps = {k: f"{v * 1e3:.1f} ms" for k, v in floor.items()}
        print(f"floors of a step, {backend}: {steps}")


def by_precision(result):
    """Prints precisions as columns, where there are several."""
    columns = {}
    for name, values in result["systems"].items():
        for measure in ("tokens_per_second", "perplexity"):
            if measure in values:
                column = columns.setdefault(measure, {})
                row = column.setdefault(name.partition(" ")[0], {})
                row[values["precision"]] = values[measure]
    for measure, systems in columns.items():
        if max(len(row) for row in systems.values()) < 2:
            continue
        rows = [{measure: name, **row} for name, row in systems.items()]
        print(tabulate(rows, headers="keys", floatfmt=".4g"), end="\n\n")
