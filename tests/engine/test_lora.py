"""LoRA checkpoints in peft's format: read by peft, transformers, a policy, a resume and an export."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rexrag.config.algorithms import Grpo
from rexrag.config.files import dump_toml, parse_config
from rexrag.config.schema import PolicyConfig
from rexrag.engine import lora
from rexrag.engine.loading import identity, load_engine, load_policy, resolve
from rexrag.errors import CheckpointError, ModelError
from rexrag.io import sha256_file
from rexrag.verl.export import export
from tests.engine.conftest import model_folder
from tests.engine.learning.test_learner import samples

ROWS = [(sample.prompt, sample.tokens) for sample in samples()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("base"))


def settings(base: Path, **policy: object):
    return parse_config({"policy": {"path": str(base), "device": "cpu", "lora_rank": 3, **policy}, "seed": 3})


def train(learner, steps: int = 2) -> None:
    learner.config = learner.config.model_copy(update={"lr": 0.01})
    for _ in range(steps):
        learner.update([dataclasses.replace(s, advantage=1.0) for s in samples()], Grpo(), 1.0)


@pytest.fixture
def run(base: Path, tmp_path: Path):
    """A run folder with one checkpoint of a trained LoRA, and the log-probs of the trained policy."""
    policy, learner = load_engine(settings(base))
    train(learner)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-2"
    learner.save(checkpoint)
    policy.codec.tokenizer.save_pretrained(checkpoint)
    (tmp_path / "run" / "config.toml").write_text(dump_toml(settings(base)))
    return checkpoint, torch.cat(policy.score(ROWS, 1.0)), learner


def scores(path: Path, **options: object) -> torch.Tensor:
    return torch.cat(load_policy(PolicyConfig(path=str(path), device="cpu", **options)).score(ROWS, 1.0))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[1, 2, 3, 4, 5]]), use_cache=False).logits


def as_old(checkpoint: Path) -> None:
    """The checkpoint as 0.1.0 wrote it: raw parameter names, and no adapter_config.json."""
    tensors = load_file(checkpoint / lora.WEIGHTS)
    raw = {
        name.removeprefix(lora.PREFIX).replace(".weight", ".default.weight"): tensor
        for name, tensor in tensors.items()
    }
    save_file(raw, checkpoint / lora.OLD_WEIGHTS, {"format": "pt"})
    (checkpoint / lora.WEIGHTS).unlink()
    (checkpoint / lora.CONFIG).unlink()


def test_peft_and_transformers_load_a_checkpoint_without_an_export(base, run):
    from peft import PeftModel

    checkpoint, _, learner = run
    learner.model.set_attn_implementation("eager")
    expected = logits(learner.model)
    assert not torch.allclose(expected, logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-2)
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), checkpoint)
    assert torch.allclose(logits(by_peft), expected, atol=1e-4)
    by_transformers = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert torch.allclose(logits(by_transformers), expected, atol=1e-4)


def test_the_checkpoint_names_its_base_and_has_plain_files(base, run):
    checkpoint, _, _ = run
    config = json.loads((checkpoint / lora.CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(base.resolve())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 6)
    assert (checkpoint / lora.WEIGHTS).stat().st_mode & 0o777 == 0o644
    names = load_file(checkpoint / lora.WEIGHTS)
    assert all(name.startswith("base_model.model.model.layers.") for name in names)


@pytest.mark.parametrize("old", [False, True])
def test_an_adapter_is_a_policy(run, old):
    checkpoint, trained, _ = run
    if old:
        as_old(checkpoint)
    assert torch.allclose(scores(checkpoint), trained, atol=1e-4)
    assert scores(checkpoint, precision="bfloat16").sub(trained).abs().mean() < 0.1


@pytest.mark.parametrize("old", [False, True])
def test_a_resume_reads_both_formats_bit_for_bit(base, run, old):
    checkpoint, _, learner = run
    if old:
        as_old(checkpoint)
    _, again = load_engine(settings(base))
    again.load(checkpoint)
    assert again.progress.updates == learner.progress.updates > 0
    assert all(torch.equal(again.trained[name], p) for name, p in learner.trained.items())


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("dtype", ["", "float32", "bfloat16"])
def test_an_export_has_the_dtype_it_was_asked_for(run, tmp_path, old, dtype):
    checkpoint, trained, _ = run
    if old:
        as_old(checkpoint)
    facts = export(tmp_path / "run", tmp_path / "out", dtype)
    wanted = dtype or "float32"
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert facts["dtype"] == wanted and {str(w.dtype) for w in weights.values()} == {f"torch.{wanted}"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == wanted
    assert not any("lora" in name for name in weights)
    assert torch.allclose(scores(tmp_path / "out"), trained, atol=1e-4 if wanted == "float32" else 0.2)


def test_a_run_that_was_moved_knows_its_base_by_its_configuration(base, run, tmp_path):
    checkpoint, trained, _ = run
    elsewhere = shutil.copytree(base, tmp_path / "elsewhere")
    config = json.loads((checkpoint / lora.CONFIG).read_text())
    (checkpoint / lora.CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))
    (tmp_path / "run" / "config.toml").write_text(dump_toml(settings(elsewhere)))
    assert lora.base_of(checkpoint) == str(elsewhere)
    assert torch.allclose(scores(checkpoint), trained, atol=1e-4)


def test_an_adapter_of_an_adapter_counts_both(run, tmp_path):
    checkpoint, _, _ = run
    policy, learner = load_engine(settings(checkpoint))
    train(learner)
    trained = torch.cat(policy.score(ROWS, 1.0))
    learner.save(tmp_path / "second")
    assert lora.base_of(tmp_path / "second") == str(checkpoint.resolve())
    assert torch.allclose(scores(tmp_path / "second"), trained, atol=1e-4)


def test_the_identity_of_an_adapter_has_that_of_its_base(base, run):
    checkpoint, _, _ = run
    before = identity(str(checkpoint))
    assert set(identity(str(base))) <= set(before)
    (checkpoint / lora.CONFIG).write_text((checkpoint / lora.CONFIG).read_text() + "\n")
    assert identity(str(checkpoint)) != before


def changed(checkpoint: Path, **changes: object) -> None:
    config = json.loads((checkpoint / lora.CONFIG).read_text())
    (checkpoint / lora.CONFIG).write_text(json.dumps(config | changes))


def test_adapters_that_cannot_be_used_are_refused_in_one_line(base, run, tmp_path):
    checkpoint, _, _ = run
    folders: list[Path] = []

    def refused(expected: str, prepare) -> None:
        folder = shutil.copytree(checkpoint, tmp_path / "alone" / str(len(folders)))
        folders.append(folder)
        prepare(folder)
        with pytest.raises(ModelError, match=expected) as caught:
            load_policy(PolicyConfig(path=str(folder), device="cpu"))
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)

    def without(name: str):
        return lambda folder: (folder / name).unlink()

    def shifted(folder: Path) -> None:
        tensors = load_file(folder / lora.WEIGHTS)
        save_file(dict(list(tensors.items())[1:]), folder / lora.WEIGHTS, {"format": "pt"})

    refused(
        "an adapter of '/gone'.*no such model folder", lambda f: changed(f, base_model_name_or_path="/gone")
    )
    refused("nothing names its base model", lambda f: changed(f, base_model_name_or_path=None))
    refused("kind IA3; only LORA is supported", lambda f: changed(f, peft_type="IA3"))
    refused("without weights", without(lora.WEIGHTS))
    refused("not readable as safetensors", lambda f: (f / lora.WEIGHTS).write_bytes(b"nonsense"))
    refused("not readable as JSON", lambda f: (f / lora.CONFIG).write_text("{"))
    refused("does not fit its base model: .* tensors of a LoRA", shifted)
    refused("does not fit its base", lambda f: changed(f, r=5))


def test_an_adapter_with_pickled_weights_is_not_opened(run):
    checkpoint, _, _ = run
    (checkpoint / lora.WEIGHTS).unlink()
    (checkpoint / "adapter_model.bin").write_bytes(b"\x80\x04K\x00.")
    with pytest.raises(ModelError, match=r"without weights; expected adapter_model\.safetensors"):
        load_policy(PolicyConfig(path=str(checkpoint), device="cpu"))


def test_settings_of_an_adapter_that_import_modules_are_ignored(run):
    checkpoint, trained, _ = run
    changed(
        checkpoint,
        megatron_config={"x": 1},
        megatron_core="os.system",
        auto_mapping={"parent_library": "this"},
    )
    assert torch.allclose(scores(checkpoint), trained, atol=1e-4)


def test_an_adapter_is_no_model_for_verl(run):
    checkpoint, _, _ = run
    with pytest.raises(ModelError, match="rexrag model export"):
        resolve(str(checkpoint), adapters=False)


def test_a_checkpoint_without_its_adapter_is_not_resumed(base, run):
    checkpoint, _, _ = run
    (checkpoint / lora.WEIGHTS).unlink()
    _, learner = load_engine(settings(base))
    with pytest.raises(CheckpointError, match="without weights"):
        learner.load(checkpoint)


def test_a_run_of_a_lora_is_evaluated_and_asked_without_an_export(run, tmp_path):
    from rexrag.evaluation.policies import EndpointOptions, open_policy, resolve_config

    checkpoint, trained, _ = run
    shutil.copy(checkpoint / "learner.json", checkpoint / "state.json")
    digests = {file.name: sha256_file(file) for file in checkpoint.iterdir()}
    (checkpoint / "digests.json").write_text(json.dumps(digests))
    for named in (tmp_path / "run", checkpoint):
        config = resolve_config(str(named), None, [])
        assert config.policy.path == str(checkpoint)
        source = open_policy(str(named), config.policy, EndpointOptions())
        assert torch.allclose(torch.cat(source.load().score(ROWS, 1.0)), trained, atol=1e-4)
