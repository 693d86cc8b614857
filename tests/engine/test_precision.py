"""What `policy.precision` means: by machine, by checkpoint, for a run, and under its older names."""

from __future__ import annotations

import pytest
import torch

from rexrag.config import presets
from rexrag.config.files import dump_toml, load_config, parse_config
from rexrag.config.schema import Config, PolicyConfig
from rexrag.engine import precision
from rexrag.engine.precision import MISMATCH_CAP, bfloat16_unit, precision_of, settled
from rexrag.engine.sources import EMBEDDED
from rexrag.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def has_units(monkeypatch):
    """A machine that multiplies in bfloat16."""
    monkeypatch.setattr(precision, "bfloat16_unit", lambda device: "avx512_bf16")


@pytest.fixture
def intel(monkeypatch):
    """A function that makes this an x86 CPU with the named units."""

    def make(*units: str) -> None:
        monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx" in units)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "avx512" in units)

    return make


def algorithm_of(config: Config):
    return getattr(config, "algorithm", None) or config.method


def test_a_cpu_is_known_by_its_units(intel):
    for units, expected in ((("amx", "avx512"), "amx_bf16"), (("avx512",), "avx512_bf16"), ((), "")):
        intel(*units)
        assert bfloat16_unit(CPU) == expected


def test_an_arm_cpu_is_asked_through_onednn(monkeypatch):
    monkeypatch.setattr(precision.platform, "machine", lambda: "arm64")

    class Kernels:
        def __init__(self, answer):
            self.answer = answer

        def _is_mkldnn_bf16_supported(self):
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    for answer, expected in ((True, "ARM bf16"), (False, ""), (RuntimeError("no oneDNN"), "")):
        monkeypatch.setattr(torch.ops, "mkldnn", Kernels(answer))
        assert bfloat16_unit(CPU) == expected


def test_a_gpu_that_only_emulates_bfloat16_has_no_units(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    for native in (True, False):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, n=native: n or including_emulation
        )
        assert bfloat16_unit(torch.device("cuda")) == ("A GPU" if native else "")


def test_other_devices_have_no_units():
    assert bfloat16_unit(torch.device("mps")) == ""


def test_auto_follows_the_machine_and_says_why(has_units):
    found = precision_of(PolicyConfig(path="some/model"), CPU)
    assert found.name == "bfloat16" and found.reason == "the CPU multiplies in bfloat16 (avx512_bf16)"
    assert found.dtype == torch.bfloat16 and found.autocast


def test_auto_is_float32_without_units():
    found = precision_of(PolicyConfig(path="some/model"), CPU)
    assert found.name == "float32" and found.reason == "the CPU has no bfloat16 units"
    assert found.dtype == torch.float32 and not found.autocast


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_shipped_checkpoints_are_pinned_to_float32_unless_told_otherwise(name, has_units):
    assert precision_of(PolicyConfig(path=name)).name == "float32"
    assert "pinned" in precision_of(PolicyConfig(path=name)).reason
    assert precision_of(PolicyConfig(path=name, precision="bfloat16")).name == "bfloat16"


def test_presets_behind_published_figures_do_not_follow_the_machine():
    fixed = {path.stem: presets.resolve(path.stem).policy.precision for path in presets.FOLDER.glob("*.toml")}
    assert fixed == {
        "own-data": "auto",
        "quickstart": "float32",
        "smollm2-2wiki": "float32",
        "qwen2.5-3b-lora-24gb": "bfloat16",
        "qwen2.5-3b-nq-hotpot": "bfloat16",
        "qwen2.5-7b-nq-hotpot": "bfloat16",
    }


def test_a_run_records_its_precision_and_goes_on_in_it(has_units, monkeypatch, tmp_path):
    run = settled(parse_config({}, ["policy.path=some/model"]))
    assert run.policy.precision == "bfloat16" and algorithm_of(run).mismatch_cap == MISMATCH_CAP
    (tmp_path / "config.toml").write_text(dump_toml(run))
    monkeypatch.setattr(precision, "bfloat16_unit", lambda device: "")  # resumed on another machine
    assert settled(load_config(tmp_path / "config.toml")) == run


def test_a_run_in_float32_has_no_mismatch_weight(has_units):
    assert algorithm_of(settled(parse_config({}, ["policy.precision=float32"]))).mismatch_cap == 0.0


@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_a_mismatch_cap_that_is_set_stays(cap, has_units):
    section = "algorithm" if "algorithm" in Config.model_fields else "method"
    run = settled(parse_config({}, ["policy.path=some/model", f"{section}.mismatch_cap={cap}"]))
    assert run.policy.precision == "bfloat16" and algorithm_of(run).mismatch_cap == cap


def test_verl_runs_on_gpus_whatever_the_driver_has():
    assert settled(parse_config({}, ["engine=verl", "policy.path=some/model"])).policy.precision == "bfloat16"


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({"dtype": "bfloat16", "autocast": True}, "bfloat16"),
        ({"dtype": "float32", "autocast": False}, "float32"),
        ({"dtype": "float32", "autocast": True}, "float32"),
        ({"dtype": "bfloat16", "autocast": False}, "bfloat16"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"autocast": True}, "bfloat16"),
        ({"autocast": False}, "float32"),
    ],
)
def test_older_keys_of_a_file_are_read_and_say_the_new_name_once(policy, expected, capsys, monkeypatch):
    monkeypatch.setattr("rexrag.io._SAID", set())
    for _ in range(2):
        assert parse_config({"policy": policy}, where="old.toml").policy.precision == expected
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(policy)
    assert all("old.toml: policy." in line and "policy.precision" in line for line in said)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["policy.dtype=bfloat16", "policy.autocast=true"], "bfloat16"),
        (["policy.autocast=true"], "bfloat16"),
        (["policy.precision=bfloat16", "policy.dtype=float32"], "float32"),
    ],
)
def test_older_keys_of_an_override_are_read(overrides, expected):
    assert parse_config({}, overrides).policy.precision == expected


def test_an_older_key_beside_the_new_one_is_refused():
    with pytest.raises(ConfigError, match=r"mine: policy\.precision and its older name policy\.dtype"):
        parse_config({"policy": {"precision": "auto", "dtype": "float32"}}, where="mine")


def test_an_older_key_with_a_wrong_value_is_refused_by_its_new_name():
    with pytest.raises(ConfigError, match=r"policy\.precision = 'float16'"):
        parse_config({"policy": {"dtype": "float16"}})
