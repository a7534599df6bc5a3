"""The table of several runs counts what they wrote."""

import pytest

from tests import summary

PASSED = '<testcase name="a"/>'
SKIPPED = '<testcase name="b"><skipped message="no such format"/></testcase>'
FILE = (
    '<testcase name="f"><skipped message="collection skipped">'
    "('f.py', 1, 'Skipped: another backend')</skipped></testcase>"
)
FAILED = '<testcase name="c"><failure message="1 != 2"/></testcase>'
ERROR = '<testcase name="d"><error message="in a fixture"/></testcase>'


@pytest.mark.parametrize(
    "cases, counts, status",
    [
        ([PASSED, PASSED, SKIPPED, FILE], (2, 0, 2), 0),
        ([PASSED, FAILED, ERROR], (1, 2, 0), 1),
    ],
)
def test_counts(cases, counts, status, tmp_path, capsys):
    path = tmp_path / "torch-oldest.xml"
    path.write_text(
        '<testsuites><testsuite time="90">'
        f"{''.join(cases)}</testsuite></testsuites>"
    )
    row, reasons = summary.summarize(path)
    assert row == ("torch-oldest", *counts, 1.5)
    assert reasons.total() == counts[2]
    assert summary.main([str(path)]) == status
    printed = capsys.readouterr().out
    assert "torch-oldest" in printed
    for reason in ("no such format", "another backend"):
        assert (f"skipped 1: {reason}" in printed) == (counts[2] == 2)


def test_the_longest_files(tmp_path, capsys):
    path = tmp_path / "jax.xml"
    cases = [
        f'<testcase classname="tests.{name}" name="x" time="{time}"/>'
        for name, time in (
            ("test_a", 1.25),
            ("test_b.TestCase", 2),
            ("test_a", 2.25),
            ("test_c", 0.5),
        )
    ]
    path.write_text(f'<testsuite time="6">{"".join(cases)}</testsuite>')
    assert summary.slowest(path, 2) == [("test_a", 3.5), ("test_b", 2.0)]
    assert summary.slowest(tmp_path / "torch.xml") == []
    assert summary.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "jax longest: test_a 4 s, test_b 2 s, test_c 0 s" in printed


def test_a_run_that_wrote_nothing(tmp_path, capsys):
    assert summary.main([str(tmp_path / "jax.xml")]) == 1
    assert "did not run" in capsys.readouterr().out


def test_what_may_have_been_deselected(tmp_path, capsys):
    paths = [tmp_path / name for name in ("jax.xml", "jax-patched.xml")]
    for path, case in zip(paths, (PASSED, FAILED)):
        assert summary.main([str(paths[0]), "--optional", str(path)]) == (
            not paths[0].exists()
        )
        path.write_text(f'<testsuite time="60">{case}</testsuite>')
    assert summary.main([str(paths[0]), "--optional", str(paths[1])]) == 1
    assert "jax-patched" in capsys.readouterr().out
