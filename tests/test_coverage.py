"""Whatever makes text in keras_hub is covered, or said not to be, and why."""

import pathlib
import re

import keras_hub
import pytest

from keras_nlp_cache import coverage
from keras_nlp_cache import drop_in
from keras_nlp_cache import models
from keras_nlp_cache.command_line.cli import main

ROOT = pathlib.Path(__file__).resolve().parent.parent
TASKS = [
    task
    for task in drop_in.replacements()
    if issubclass(task, keras_hub.models.CausalLM)
]
COVERED = {coverage.family_name(task) for task in TASKS}


def test_each_class_stands_in_one_place():
    tasks = coverage.upstream_tasks()
    assert keras_hub.models.Qwen2CausalLM in tasks
    assert keras_hub.models.MoonshineAudioToText in tasks
    # Two classes of one family share a reason.
    families = {coverage.family_name(task) for task in tasks}
    assert len(families) > 25
    missing = set(drop_in.not_covered())
    by_name = {x.__name__: x for x in tasks}
    # Of a family with several classes, one may be covered and another not.
    alone = {x for x in missing if x in by_name}
    assert families == COVERED | (missing - alone)
    assert not COVERED & missing
    assert {coverage.family_name(by_name[x]) for x in alone} <= COVERED
    assert not alone


def test_covered_classes_are_exported():
    for task in TASKS:
        assert getattr(models, task.__name__) is task
        upstream = getattr(keras_hub.models, task.__name__)
        assert task is not upstream
        assert issubclass(task, upstream)


def test_the_readme_lists_them():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = dict(
        re.findall(r"^\| not covered \| (.*) \| (.*) \|$", readme, re.M)
    )
    listed = {
        name.strip("` "): reason
        for names, reason in rows.items()
        for name in names.split(", ")
    }
    assert listed == drop_in.not_covered()


def test_info_lists_them(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for name, reason in drop_in.not_covered().items():
        assert re.search(rf"^{name} +{re.escape(reason)}$", printed, re.M)


def test_a_class_that_is_not_covered_is_refused():
    with pytest.raises(ValueError, match=r"EdRecB.*positions.*CONTR"):
        drop_in.replacement(keras_hub.models.EdRecBackbone)
    with pytest.raises(ValueError, match="Received: ViTBackbone. Load"):
        drop_in.replacement(keras_hub.models.ViTBackbone)
