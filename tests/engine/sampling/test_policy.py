"""Scores of a policy, and a policy and learner built from a model folder, driving real episodes."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from rexrag.agent.episode import Episode, State
from rexrag.config.files import parse_config
from rexrag.config.schema import AgentConfig, Config, MethodConfig, PolicyConfig
from rexrag.engine import loading
from rexrag.engine.attention import use_packed_attention
from rexrag.engine.learning.packing import pack_rows
from rexrag.engine.loading import (
    choose_device,
    choose_trained,
    export_model,
    load_engine,
    load_model,
    load_policy,
    resolve,
)
from rexrag.engine.sampling import policy as policy_module
from rexrag.engine.sampling.policy import LocalPolicy
from rexrag.errors import ConfigError, ModelError
from rexrag.training.components import check_window
from rexrag.types import Document, Origin, Question, Sample
from tests.engine.learning.test_learner import naive_logps, samples
from tests.engine.sampling.test_sampler import largest_error
from tests.support.scripted import MAKERS, SIZES, VOCABULARY, Echo, Script, llama, prompts, qwen2, spread

TAGS = ["<search>", "</search>", "<answer>", "</answer>", "<information>", "</information>", "<think>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama folder with a word-level tokenizer in which tags are frequent."""
    made = tmp_path_factory.mktemp("model")
    words = ["<eos>", "<unk>", *TAGS, *(f"w{i}" for i in range(VOCABULARY - 2 - len(TAGS)))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    tokenizer.save_pretrained(str(made))
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)  # nearly even odds, so that random text holds actions
    model.save_pretrained(str(made))
    return made


def test_a_sampler_in_bfloat16_is_the_model_that_is_loaded_in_bfloat16(folder: Path) -> None:
    config = parse_config({}, [f"policy.path={folder}", "policy.dtype=bfloat16"])
    sampler, learner = load_engine(config)
    loaded = load_policy(config.policy)
    rows = [([1, 2, 3], [4 + i % 20 for i in range(400)])]
    assert torch.equal(sampler.score(rows, 1.0)[0], loaded.score(rows, 1.0)[0])
    assert learner.sampler_model is sampler.model


def test_scores_under_autocast_are_what_the_learner_starts_from(folder: Path) -> None:
    policy, learner = load_engine(config(folder, autocast=True))
    own = LocalPolicy(learner.model, policy.codec, autocast=True)
    rows = [([1, 2, 3], [4 + i % 20 for i in range(60)])]
    with torch.autocast("cpu", torch.bfloat16):
        (pack,) = pack_rows(rows, [0], 8192)
        expected = pack.logps(learner.model, 1.0)
    assert torch.equal(own.score(rows, 1.0)[0], expected.detach())
    assert not torch.equal(own.score(rows, 1.0)[0], policy.score(rows, 1.0)[0])


class Library:
    digest = "library"

    def search(self, queries, topk):
        return [[Document(str(i), f'"w{i}"\nw{i} w{i + 1}') for i in range(topk)] for _ in queries]


def config(folder: Path, **policy: object) -> Config:
    return parse_config({"policy": {"path": str(folder), "device": "cpu", **policy}, "seed": 3})


def question(i: int) -> Question:
    return Question(id=str(i), text=f"w{i} w{i + 1}?", answers=(f"w{i}",))


def episodes(policy: LocalPolicy, n: int = 24) -> list[Episode]:
    agent = AgentConfig(turn_tokens=40, evidence_tokens=20, total_tokens=400, search_turns=3)
    return [Episode(question(i // 4), policy.codec, agent, topk=2) for i in range(n)]


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_scores_are_log_probs_of_a_full_forward(model, temperature, monkeypatch):
    monkeypatch.setattr(policy_module, "SCORE_TOKENS", 60)
    policy = LocalPolicy(model, codec=None)
    rows = [*samples(14), dataclasses.replace(samples(1)[0], tokens=())]
    scores = policy.score([(row.prompt, row.tokens) for row in rows], temperature)
    assert [len(score) for score in scores] == [len(row.tokens) for row in rows]
    with torch.no_grad():
        for row, score in zip(rows, scores, strict=True):
            assert score.dtype == torch.float32 and not score.requires_grad
            assert torch.allclose(score, naive_logps(model, row, temperature or 1.0), atol=1e-5)
    assert policy.score([], 1.0) == []


def test_scores_of_a_windowed_model_look_back_as_far_as_the_model_does():
    model = qwen2(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    use_packed_attention(model)
    # Responses of two tokens feed one token after a shared prompt; longer ones feed several.
    rows = [((1, 2, 3, 4, 5, 6, 7), tuple(range(9, 9 + size))) for size in (1, 2, 5, 9)] + [
        ((8,) * 9, (3, 4))
    ]
    scores = LocalPolicy(model, codec=None).score(rows, 1.0)
    with torch.no_grad():
        for (prompt, response), score in zip(rows, scores, strict=True):
            ids = torch.tensor([[*prompt, *response]])
            logp = model(ids, use_cache=False).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            assert torch.allclose(score, logp.gather(1, ids[0, len(prompt) :, None])[:, 0], atol=1e-5)


def test_rollouts_of_real_episodes_are_scored_as_they_were_sampled(folder):
    policy = load_policy(PolicyConfig(path=str(folder), device="cpu"))
    running = episodes(policy)
    session = policy.session()
    session.run(running, Library(), 1.0, seed=1)
    probes = [e.fork(policy.codec.encode("<think> w1 w2"), 0, i) for i, e in enumerate(running)]
    session.run(probes, Library(), 1.0, seed=2)
    session.close()
    rollouts = [e.rollout() for e in running + probes]
    assert any(r.answer is not None for r in rollouts)
    assert {o for r in rollouts for o in r.origins} == set(Origin)
    scores = policy.score([(r.prompt, r.tokens) for r in rollouts], 1.0)
    for rollout, score in zip(rollouts, scores, strict=True):
        ours = torch.tensor(rollout.origins) <= int(Origin.CUE)
        assert torch.allclose(score[ours], torch.tensor(rollout.logps)[ours], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_is_visible_to_the_sampler(folder, dtype):
    policy, learner = load_engine(config(folder, dtype=dtype))
    assert next(policy.model.parameters()).dtype == getattr(torch, dtype)
    assert all(p.dtype == torch.float32 for p in learner.trained.values())
    rows = [((1, 2, 3), (4, 5, 6, 7))]
    before = policy.score(rows, 1.0)[0]
    sample = Sample(*rows[0], mask=(True,) * 4, behaviour_logp=tuple(before.tolist()), advantage=1.0)
    for _ in range(8):  # warm-up, and bfloat16's coarse steps
        learner.update([sample], MethodConfig(clip_high=10.0), 1.0)
    after = policy.score(rows, 1.0)[0]
    assert after.sum() > before.sum() + 0.01
    running = episodes(policy, 4)
    policy.session().run(running, Library(), 1.0, seed=0)
    assert all(e.state is State.DONE for e in running)


@pytest.mark.parametrize("change", [{}, {"lora_rank": 4}])
def test_an_exported_model_scores_like_the_trained_one(folder, tmp_path, change):
    policy, learner = load_engine(config(folder, **change))
    learner.config = learner.config.model_copy(update={"lr": 0.01})
    rows = [(s.prompt, s.tokens) for s in samples()]
    start = policy.score(rows, 1.0)
    for _ in range(3):
        learner.update([dataclasses.replace(s, advantage=1.0) for s in samples()], MethodConfig(), 1.0)
    export_model(learner.model, policy.codec, tmp_path / "out")
    loaded = load_policy(PolicyConfig(path=str(tmp_path / "out"), device="cpu"))
    trained, again = policy.score(rows, 1.0), loaded.score(rows, 1.0)
    assert torch.allclose(torch.cat(trained), torch.cat(again), atol=1e-4)
    assert not torch.allclose(torch.cat(trained), torch.cat(start), atol=0.01)
    assert loaded.codec.encode("w1 w2") == policy.codec.encode("w1 w2")


def test_lora_starts_are_the_seed_s_and_leave_global_randomness_alone():
    def start(seed: int) -> dict[str, torch.Tensor]:
        model = qwen2()
        torch.manual_seed(9)
        choose_trained(model, PolicyConfig(lora_rank=2), seed)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(9)))
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    one, same, other = start(1), start(1), start(2)
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)


def test_model_folders_that_cannot_be_used_are_named(folder, tmp_path):
    def refused(path: Path | str, expected: str) -> None:
        with pytest.raises(ModelError, match=expected) as caught:
            load_policy(PolicyConfig(path=str(path), device="cpu"))
        assert "\n" not in str(caught.value)

    refused(tmp_path / "none", "no such model folder")
    refused("./none", "no such model folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, r"no config\.json")
    (empty / "config.json").write_text((folder / "config.json").read_text())
    refused(empty, r"no weights; expected \*\.safetensors")
    (empty / "pytorch_model.bin").write_bytes(b"\x80\x04K\x00.")
    refused(empty, r"pickled \(pytorch_model\.bin\); expected \*\.safetensors")
    (empty / "model.safetensors").write_bytes(b"nonsense")
    refused(empty, "no usable causal language model")
    weights = load_file(folder / "model.safetensors")
    lacking = {name: value for name, value in weights.items() if "mlp.up" not in name}
    save_file(lacking, empty / "model.safetensors", {"format": "pt"})
    refused(empty, "the weights lack model.layers.0.mlp.up_proj.weight")
    save_file(weights, empty / "model.safetensors", {"format": "pt"})
    refused(empty, "tokenizer")
    (empty / "config.json").write_text('{"model_type": "of-nobody"}')
    refused(empty, "no usable causal language model")


def hub_error(kind, status):
    return kind("no", response=httpx.Response(status, request=httpx.Request("HEAD", "https://hub")))


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        (None, None),
        (hub_error(RemoteEntryNotFoundError, 404), None),
        (hub_error(GatedRepoError, 403), None),
        (hub_error(HfHubHTTPError, 503), None),
        (hub_error(RepositoryNotFoundError, 404), "no such folder, and no such model on http"),
        (httpx.ConnectError("Name or service not known"), "cannot be asked: Name or service"),
        (httpx.ConnectTimeout(""), "cannot be asked: ConnectTimeout"),
        (OfflineModeIsEnabled("it is set"), "cannot be asked: it is set"),
    ],
)
def test_names_that_may_be_ids_are_looked_up_once(monkeypatch, answer, refused):
    asked = []

    def head(url, timeout):
        asked.append((url, timeout))
        if answer is not None:
            raise answer

    monkeypatch.setattr(loading, "get_hf_file_metadata", head)
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda name, file: None)
    for name in ("owner/name", "name"):
        if refused:
            with pytest.raises(ModelError, match=f"^{name}: .*{refused}"):
                resolve(name)
        else:
            assert resolve(name) == name
    assert [name in url and timeout == 10.0 for url, timeout in asked] == [True, True]
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda name, file: "/cache/config.json")
    assert resolve("owner/name") == "owner/name" and len(asked) == 2


def test_a_name_that_no_hub_could_know_is_refused():
    with pytest.raises(ModelError, match="my model: no such folder, and no name that a hub could know"):
        resolve("my model")


def test_other_names_were_meant_as_folders():
    for path in ("a/b/c", "", "/x", "~/x", "./x", "models/none", "runs/none"):
        with pytest.raises(ModelError, match="no such model folder"):
            resolve(path)


def test_a_tokenizer_that_the_model_does_not_know_is_refused(folder, tmp_path):
    made = shutil.copytree(folder, tmp_path / "small")
    llama(vocab_size=20).save_pretrained(made)
    with pytest.raises(ModelError, match=r"its tokenizer has an id [0-9]+, its model 20 tokens"):
        load_policy(config(made).policy)


def test_special_tokens_that_are_never_written_may_lack_a_row(folder, tmp_path):
    made = shutil.copytree(folder, tmp_path / "image")
    tokenizer = load_policy(config(folder).policy).codec.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(str(made))
    assert len(tokenizer) == VOCABULARY + 1
    policy = load_policy(config(made).policy)
    assert max(policy.codec.encode("w1 <image_soft_token> w2")) < VOCABULARY


def test_a_window_too_short_for_a_rollout_is_refused(folder):
    policy = load_policy(config(folder).policy)
    fits, longer = (
        parse_config({}, [f"policy.path={folder}", f"agent.total_tokens={tokens}"]) for tokens in (512, 513)
    )
    check_window(policy, fits)
    policy.model.config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    assert policy.window is None, "scaled positions reach further"
    policy.model.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    with pytest.raises(ConfigError, match=r"agent.total_tokens = 513: .* reads 512 tokens at most"):
        check_window(policy, longer)


def test_devices_are_checked():
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("warp", "meta:x"):
        with pytest.raises(ConfigError, match=r"policy\.device"):
            choose_device(name)


def test_an_architecture_with_other_logits_is_refused():
    model = qwen2()
    model.register_forward_hook(lambda *args: args[2].__setitem__("logits", args[2]["logits"].tanh()))
    with pytest.raises(ModelError, match="not supported by the local engine"):
        use_packed_attention(model)


def built(kind: str):
    """A small random model of an architecture that the library knows."""
    sizes = {**SIZES, "head_dim": 8}
    if kind == "gpt2":
        sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 4}
    elif kind == "gpt_oss":
        sizes |= {"num_local_experts": 2, "num_experts_per_tok": 1}
    torch.manual_seed(0)
    return spread(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)))


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "mistral", "qwen3", "gemma", "phi3", "smollm3"])
def test_other_architectures_run_unchanged(kind):
    model = built(kind)
    use_packed_attention(model)
    rows = samples(6)
    policy = LocalPolicy(model, codec=None)
    scores = policy.score([(row.prompt, row.tokens) for row in rows], 1.0)
    with torch.no_grad():
        for row, score in zip(rows, scores, strict=True):
            assert torch.allclose(score, naive_logps(model, row), atol=1e-5)
    running = [Script(prompt) for prompt in prompts(3)]
    policy.session().run(running, Echo(), 1.0, 0)
    assert largest_error(model, running) < 1e-5


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("gemma2", "softcap"), ("gpt_oss", "s_aux"), ("cohere", "other logits"), ("bloom", "packed attention")],
)
def test_architectures_that_attend_or_score_otherwise_are_refused(kind, reason):
    with pytest.raises(ModelError, match=reason):
        use_packed_attention(built(kind))


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_bfloat16_models_load_and_score_near_float32(name, tmp_path):
    MAKERS[name]().save_pretrained(str(tmp_path))
    rows = [(s.prompt, s.tokens) for s in samples()]
    scores = {}
    for dtype in ("float32", "bfloat16"):
        model, _ = load_model(PolicyConfig(path=str(tmp_path), dtype=dtype, device="cpu"))
        assert model.dtype == getattr(torch, dtype)
        scores[dtype] = torch.cat(LocalPolicy(model, codec=None).score(rows, 1.0))
    assert (scores["float32"] - scores["bfloat16"]).abs().mean() < 0.1


@pytest.mark.parametrize("change", [{"lora_rank": 2}, {}])
def test_a_local_checkpoint_is_exported_as_a_model(folder, tmp_path, change):
    """A LoRA is merged into the start that the run's config names; moments are no weights."""
    from rexrag.config.files import dump_toml
    from rexrag.verl.export import export

    settings = config(folder, **change)
    policy, learner = load_engine(settings)
    learner.config = learner.config.model_copy(update={"lr": 0.01})
    for _ in range(2):
        learner.update([dataclasses.replace(s, advantage=1.0) for s in samples()], MethodConfig(), 1.0)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-2"
    learner.save(checkpoint)
    policy.codec.tokenizer.save_pretrained(checkpoint)
    (tmp_path / "run" / "config.toml").write_text(dump_toml(settings))
    facts = export(tmp_path / "run", tmp_path / "out")
    loaded = load_policy(PolicyConfig(path=str(tmp_path / "out"), device="cpu"))
    assert facts["parameters"] == sum(p.numel() for p in loaded.model.parameters())
    rows = [(s.prompt, s.tokens) for s in samples()]
    trained, again = policy.score(rows, 1.0), loaded.score(rows, 1.0)
    assert torch.allclose(torch.cat(trained), torch.cat(again), atol=1e-4)
