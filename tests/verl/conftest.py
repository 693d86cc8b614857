"""One real run of verl for all tests that look at it: 2 steps, then 1 more after a resume."""

from __future__ import annotations

import importlib.util
import shutil

import pytest

from tests.support.verl.runs import train

needs_verl = pytest.mark.skipif(
    importlib.util.find_spec("verl") is None, reason='needs the extra: pip install -e ".[verl]"'
)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The run folder of two steps."""
    folder = tmp_path_factory.mktemp("verl") / "run"
    done = train(folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="session")
def resumed(run):
    """A copy of it, resumed for a third step, which distils its probes."""
    folder = run.with_name("resumed")
    shutil.copytree(run, folder)
    (folder / "summary.json").unlink()  # a run that has one is over
    settings = {
        "train.steps": 3,
        "algorithm.name": "rex-rag-distill",
        "algorithm.suffix_weight": "unclipped",
        "algorithm.probe_groups": "all",
        "algorithm.probe_target": 0.0,
        "algorithm.filter": "cue-logp",
        "algorithm.keep_per_group": 0,
    }
    done = train(folder, "--resume", settings=settings)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder
