"""Your own questions and passages. Replace the three files; the model here is the tiny one of the package.

python examples/own_data.py
"""

import json
from pathlib import Path

import rexrag
from rexrag.data.world.generator import World


def write_files(folder: Path) -> dict[str, Path]:
    """Write questions as {"question", "answers"} and passages as {"id", "contents"}; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    world = World(5, 24)
    rows = {
        "train": [{"question": q.text, "answers": q.answers} for q in world.questions("train", 20)],
        "dev": [{"question": q.text, "answers": q.answers} for q in world.questions("held-out", 8)],
        "corpus": [{"id": d.id, "contents": d.contents} for d in world.documents],
    }
    files = {}
    for name, lines in rows.items():
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return files


if __name__ == "__main__":
    from sizes import SMALL

    files = write_files(Path("runs/example-own-data-files"))
    data = [f"data.{name}={path}" for name, path in files.items()]
    run = rexrag.train(
        "quickstart",
        overrides=[*(s for s in SMALL if "world" not in s), "name=example-own-data", *data],
    )
    print(run.verdict)
    question = json.loads(files["dev"].read_text(encoding="utf-8").splitlines()[0])["question"]
    print(question, run.agent().ask(question).answer)
