"""The table of what works where is made of what tests say."""

import pathlib

from tests import compatibility

CASE = '<testcase classname="tests.{}" name="{}">{}</testcase>'


def results(folder, cases):
    path = folder / "results.xml"
    lines = [CASE.format(*case) for case in cases]
    path.write_text(f"<testsuite>{''.join(lines)}</testsuite>")
    return list(compatibility.outcomes(path))


def test_cells(tmp_path):
    name = "test_reduced_precision"
    file = "test_cached_decoding"
    found = {
        "jax": results(tmp_path, [(file, f"{name}[bfloat16-gpt2]", "")]),
        "tensorflow": results(
            tmp_path,
            [
                (file, f"{name}[bfloat16-gpt2]", ""),
                (file, f"{name}[float16-gpt2]", "<skipped/>"),
            ],
        ),
        "torch": results(
            tmp_path,
            [
                (file, f"{name}[bfloat16-gpt2]", ""),
                (file, f"{name}[float16-gpt2]", "<failure/>"),
                (file, f"{name}[float16-gemma2]", ""),
                ("test_pickling", "test_a_process[pickle]", ""),
            ],
        ),
    }
    feature = "bfloat16, float16, mixed"
    cells = {
        family: compatibility.cell(found, feature, family)
        for family in compatibility.FAMILIES
    }
    assert cells.pop("Gemma 1 to 3") == "JtP"
    # Where a family had no turn, what the others had counts.
    assert set(cells.values()) == {"Jt-"}
    # Tests that are not repeated for each family count for all.
    assert compatibility.cell(found, "pickling", "Gemma 1 to 3") == "--P"


def test_the_readme_has_a_row_for_each_feature():
    readme = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
    _, _, section = readme.partition("\n## What works, with which family")
    section, _, _ = section.partition("\n## ")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    of_text = 2 + len(compatibility.FEATURES)
    for table, features, families in (
        (rows[:of_text], compatibility.FEATURES, compatibility.FAMILIES),
        (
            rows[of_text:],
            compatibility.FEATURES_OF_READERS,
            compatibility.READERS,
        ),
    ):
        assert table[0][1:] == list(families)
        assert [row[0] for row in table[2:]] == list(features)
        for row in table[2:]:
            assert set("".join(row[1:]).upper()) & set("JTP")
