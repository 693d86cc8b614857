"""Every example runs as it stands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if path.name != "sizes.py")
BY_NAME = {
    "reward.py": ["agent.reward=examples.reward:reward"],
    "answer_judge.py": ["agent.answer_judge=examples.answer_judge:holds_gold"],
    "dead_end_judge.py": [
        "algorithm.dead_ends=judge",
        "algorithm.dead_end_judge=examples.dead_end_judge:unsure",
    ],
    "retriever.py": ["retriever.kind=plugin", "retriever.plugin=examples.retriever:from_world"],
    "protocol.py": ["agent.protocol=examples.protocol:NumberedEvidence"],
    "callback.py": ['train.callbacks=["examples.callback:print_reward"]'],
    "template.txt": ["agent.template=examples/template.txt"],
    "cue_pool.txt": ["agent.cues=examples/cue_pool.txt"],
}
"""Example -> the settings that name it in a configuration."""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), *sys.path]), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_runs(script, tmp_path):
    done = subprocess.run(
        [sys.executable, str(FOLDER / script)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_every_plug_in_example_resolves_by_its_dotted_name(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    monkeypatch.chdir(FOLDER.parent)
    from rexrag.agent.prompts import cue_pool, render_prompt
    from rexrag.agent.protocols import protocol_of
    from rexrag.agent.scoring import Scoring
    from rexrag.config import presets
    from rexrag.retrieval.plugin import load_retriever
    from rexrag.training.callbacks import load_callbacks
    from rexrag.training.components import dead_end_judge

    for example, overrides in BY_NAME.items():
        config = presets.resolve("quickstart", overrides=overrides)
        agent = config.agent
        Scoring.of(agent), protocol_of(agent.protocol), load_callbacks(config), cue_pool(agent.cues)
        assert render_prompt(agent.template, "Who?"), example
        if config.retriever.plugin:
            assert load_retriever(config.retriever.plugin).search(["who"], 2)
        if example == "dead_end_judge.py":
            assert dead_end_judge(config, None) is not None


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(FOLDER / "notebook.ipynb", as_version=4)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert outputs and not any(o.output_type == "error" for o in outputs)
