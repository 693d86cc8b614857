"""`rexrag model`: imports and exports from the command line."""

from __future__ import annotations

import json

from safetensors.torch import load_file

from rexrag.config.files import dump_toml, parse_config
from rexrag.engine.loading import load_engine
from tests.cli.test_cli import refused, run
from tests.engine.test_gguf import write_gguf

__all__ = ["run"]


def test_an_import_takes_a_dtype_and_prints_the_folder_alone(run, tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    out = tmp_path / "model"
    code, said, err = run("model", "import", tmp_path / "tiny.gguf", "--out", out, "--dtype", "bfloat16")
    assert (code, said, err) == (0, f"model folder {out}\n", "")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_dtype_that_is_none_is_refused_by_both(run, tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    for command, source in (("import", tmp_path / "tiny.gguf"), ("export", tmp_path)):
        result = run("model", command, source, "--out", tmp_path / "out", "--dtype", "int4")
        refused(result, "dtype 'int4': expected float32 or bfloat16")
    assert not (tmp_path / "out").exists()


def test_a_lora_is_exported_in_the_dtype_that_was_asked_for(run, tmp_path):
    settings = parse_config({"policy": {"path": "embedded", "device": "cpu", "lora_rank": 2}})
    policy, learner = load_engine(settings)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-1"
    learner.save(checkpoint)
    policy.codec.tokenizer.save_pretrained(checkpoint)
    (tmp_path / "run" / "config.toml").write_text(dump_toml(settings))
    for source in (tmp_path / "run", checkpoint):
        out = tmp_path / f"out-{source.name}"
        code, said, _ = run("model", "export", source, "--out", out, "--dtype", "bfloat16", "--json")
        assert code == 0 and json.loads(said)["dtype"] == "bfloat16"
        assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
        assert {str(w.dtype) for w in load_file(out / "model.safetensors").values()} == {"torch.bfloat16"}
