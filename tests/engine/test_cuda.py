"""The same sampler and learner on a GPU. Skipped where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rexrag.config.algorithms import Grpo
from rexrag.config.presets import resolve
from rexrag.engine.attention import use_packed_attention
from rexrag.engine.learning.learner import LocalLearner
from rexrag.engine.loading import load_engine
from rexrag.engine.sampling import cache, sampler
from rexrag.engine.sampling.cache import CacheShape
from rexrag.engine.sampling.cuda_graphs import CudaGraphs
from rexrag.engine.sampling.decoder import layer_attention
from rexrag.engine.sampling.sampler import LocalSession
from rexrag.training.loop import train
from rexrag.types import Origin
from tests.engine.learning.test_learner import distance, gradients, learner, near_policy, samples
from tests.engine.sampling.test_sampler import (
    CUE,
    full_logps,
    generate_turns,
    last_sampled,
    rollouts,
    session,
)
from tests.support.scripted import MAKERS, Echo, Script, llama

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _tensors_on_the_gpu():
    """What the shared helpers make lies where the model is."""
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


def on_gpu(name: str = "qwen2", dtype: torch.dtype = torch.float32, **changes: object):
    with torch.device("cpu"):  # the same random weights as on the CPU
        made = MAKERS[name](**changes)
    made.to("cuda", dtype)
    use_packed_attention(made)
    return made


def run(model, episodes: list[Script], temperature: float = 1.0, seed: int = 0) -> LocalSession:
    opened = session(model)
    with torch.device("cpu"):  # as in a run: only the model is on the GPU
        opened.run(episodes, Echo(), temperature, seed)
    return opened


def scripts(n: int = 8, each: int = 3, **options) -> list[Script]:
    with torch.device("cpu"):
        return rollouts(n, each, **options)


def errors(model, episodes: list[Script], temperature: float = 1.0) -> torch.Tensor:
    """Differences of the sampled log-probs to a full forward of the model's own."""
    found = []
    for episode in episodes:
        kept = torch.tensor(episode.origins) == int(Origin.POLICY)
        found.append((full_logps(model, episode, temperature) - torch.tensor(episode.logps))[kept].abs())
    return torch.cat(found)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_greedy_is_generate_token_for_token_over_turns(name):
    model, reference = on_gpu(name, seed=3), on_gpu(name, seed=3)
    reference.set_attn_implementation("sdpa")
    episodes = scripts(10, 1, turns=4)
    run(model, episodes, temperature=0.0)
    expected = [generate_turns(reference, Script(e.prompt, turns=4), Echo()) for e in episodes]
    assert [e.tokens for e in episodes] == [e.tokens for e in expected]


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_log_probs_are_those_of_a_full_forward(name):
    model = on_gpu(name)
    for temperature in (0.7, 1.0):
        episodes = scripts()
        run(model, episodes, temperature)
        assert errors(model, episodes, temperature).max() < 1e-4  # float32 sums of a GPU's own order


@pytest.fixture
def captures(monkeypatch):
    """Sizes of the steps that were captured."""
    sizes: list[int] = []
    capture = CudaGraphs._capture

    def watched(self, step, device, keep):
        replay = capture(self, step, device, keep)
        sizes.append(len(keep[0]))
        return replay

    monkeypatch.setattr(CudaGraphs, "_capture", watched)
    return sizes


@pytest.mark.parametrize("grain", [8, 256])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_captured_steps_sample_what_uncaptured_ones_do(name, own, grain, monkeypatch, captures):
    """The merged decoder and the model's own; banks that rows leave, that grow, stay or go."""
    model = on_gpu(name)
    settings = None if own else layer_attention(model)
    monkeypatch.setattr(sampler, "MAX_ROWS", 20)
    monkeypatch.setattr(cache, "GRAPH_CAPACITY_STEP", grain)
    monkeypatch.setattr(cache, "KEPT_BYTES", 0 if grain == 8 else 1 << 30)
    found = []
    for graphs in (True, False):
        shape = replace(CacheShape.of(model), cuda_graphs=graphs)
        opened = LocalSession(model, shape, settings)
        for seed, count in enumerate((2, 8, 8)):  # few rows first: a bank that stays has to grow
            episodes = scripts(count, turns=4)
            with torch.device("cpu"):
                opened.run(episodes, Echo(), 1.0, seed)
        assert errors(model, episodes).max() < 1e-4
        found.append([episode.tokens for episode in episodes])
        assert bool(captures) == graphs
        captures.clear()
    same = sum(a == b for a, b in zip(*found, strict=True))
    assert same >= len(found[0]) - 1  # a number on the edge of two tokens may fall to the other side


def test_a_forward_that_waits_for_the_device_is_not_captured(captures):
    model = on_gpu("llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0})
    assert layer_attention(model) is None
    episodes = scripts()
    run(model, episodes)
    assert errors(model, episodes).max() < 1e-4
    assert not captures


def test_log_probs_in_bfloat16_are_near_a_full_forward_in_bfloat16():
    model = on_gpu(dtype=torch.bfloat16)
    episodes = scripts()
    run(model, episodes)
    found = errors(model, episodes)
    assert found.mean() < 0.03 and found.max() < 0.5  # see the same test on the CPU


def test_the_seed_draws_the_tokens_that_it_draws_on_the_cpu():
    model = on_gpu()
    episodes, expected = scripts(), scripts()
    run(model, episodes, seed=5)
    with torch.device("cpu"):
        model.cpu()
        session(model).run(expected, Echo(), 1.0, 5)
    same = sum(a.tokens == b.tokens for a, b in zip(episodes, expected, strict=True))
    assert same >= len(episodes) - 1  # a number on the edge of two tokens may fall to the other side


@pytest.mark.parametrize("cue", [CUE, []])
def test_a_probe_equals_prefilling_its_prefix_anew(cue):
    model = on_gpu()
    parents = scripts(5, 2)
    opened = run(model, parents)
    cuts = [max(1, (1 + last_sampled(p)) * (i % 5) // 4) for i, p in enumerate(parents)]
    probes, again = ([p.fork(cue, cut) for p, cut in zip(parents, cuts, strict=True)] for _ in range(2))
    with torch.device("cpu"):
        opened.run(probes, Echo(), 1.0, 3)
    run(model, again, seed=3)
    for probe, other in zip(probes, again, strict=True):
        assert probe.tokens == other.tokens
        assert np.allclose(probe.logps, other.logps, atol=1e-4)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_the_gradient_is_the_cpu_s(name):
    algorithm = Grpo(clip_low=0.1, clip_high=0.15)
    with torch.device("cpu"):
        reference = learner(MAKERS[name](), micro_tokens=40)
        rows = near_policy(reference.model, samples(24))
        expected, wanted = gradients(reference, rows, algorithm)
        trainer = learner(MAKERS[name]().to("cuda"), micro_tokens=40)
        found, metrics = gradients(trainer, rows, algorithm)
    assert distance({name: grad.cpu() for name, grad in found.items()}, expected) < 1e-4
    assert metrics == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_autocast_stays_near_float32_and_keeps_float32_weights():
    with torch.device("cpu"):
        full, half = (learner(llama().to("cuda"), autocast=autocast) for autocast in (False, True))
        rows = near_policy(llama(), samples(24))
        expected, _ = gradients(full, rows)
        found, _ = gradients(half, rows)
    assert 0 < distance(found, expected) < 0.1
    assert all(p.dtype == torch.float32 for p in half.trained.values())


def test_a_checkpoint_moves_between_gpu_and_cpu(tmp_path: Path):
    with torch.device("cpu"):
        rows = near_policy(llama(), samples(24))
        here = learner(llama().to("cuda"))
        here.update(rows, Grpo(), 1.0)
        here.save(tmp_path)
        moved: dict[str, LocalLearner] = {}
        for device in ("cuda", "cpu"):
            moved[device] = learner(llama(seed=1).to(device))
            moved[device].load(tmp_path)
        for trainer in (here, *moved.values()):
            trainer.update(rows, Grpo(), 1.0)
    for trainer in moved.values():
        for name, weight in here.trained.items():
            assert torch.allclose(weight.cpu(), trainer.trained[name].cpu(), atol=1e-5)


@pytest.mark.parametrize("changes", [[], ["policy.precision=bfloat16"], ["policy.lora_rank=8"]])
def test_a_run_goes_on_where_it_stopped(changes, tmp_path: Path):
    with torch.device("cpu"):
        fixed = ["train.control=''", "train.evals=1", "data.dev_limit=40", "train.questions=4", *changes]
        assert str(load_engine(resolve(None, "rex-rag-distill", fixed))[0].model.device).startswith("cuda")
        for steps in (1, 2):
            config = resolve(None, "rex-rag-distill", [*fixed, f"train.steps={steps}"])
            train(config, tmp_path / "run", resume=steps > 1)
    assert (tmp_path / "run" / "checkpoints" / "step-2").is_dir()
