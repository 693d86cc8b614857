"""The sampler's merged decoder against the model's own forward, and the models it must leave alone."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rexrag.config.schema import PolicyConfig
from rexrag.engine.attention import PackedPlan, PrefixNode, hidden_states, use_packed_attention
from rexrag.engine.loading import choose_trained
from rexrag.engine.sampling import decoder
from rexrag.engine.sampling.decoder import FusedDecoder, layer_attention
from tests.engine.sampling.test_sampler import Echo, largest_error, rollouts, run, session
from tests.support.scripted import SIZES, VOCABULARY, llama, qwen2, spread

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}

ERNIE = "ernie: the names of llama, and pairs that turn side by side"


def mistral(**changes):
    torch.manual_seed(0)
    return spread(MistralForCausalLM(MistralConfig(**{**SIZES, **changes})))


MERGED = {
    "llama": llama,
    "llama with biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama, gelu": lambda: llama(hidden_act="gelu"),
    "llama, yarn": lambda: llama(rope_parameters=YARN),
    "llama, a head's size of its own": lambda: llama(head_dim=12),
    "qwen2": qwen2,
    "qwen2, one key head, windows": lambda: qwen2(
        num_key_value_heads=1, use_sliding_window=True, sliding_window=16, max_window_layers=1
    ),
    "mistral": lambda: mistral(sliding_window=8),
}


def trained_norms(model):
    """Norm weights and biases away from one and zero, where a mistake would hide."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def forwards(model, settings):
    """Hidden states of the same packed rows by both."""
    sizes = [3, 17, 1, 40]
    ids = torch.randint(0, VOCABULARY, (sum(sizes),), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) + start for n, start in zip(sizes, (0, 5, 90, 200), strict=True)])
    plan = PackedPlan([PrefixNode(n) for n in sizes])
    with torch.inference_mode():
        return FusedDecoder(model.base_model, settings)(ids, positions, plan), hidden_states(
            model, ids, positions, plan
        )


@pytest.mark.parametrize("name", sorted(MERGED))
def test_hidden_states_are_the_model_s_own(name):
    model = trained_norms(MERGED[name]())
    use_packed_attention(model)
    settings = layer_attention(model)
    assert settings is not None
    windows = {h.window for h in settings}
    assert windows == {"mistral": {8}, "qwen2, one key head, windows": {None, 16}}.get(name, {None})
    merged, own = forwards(model, settings)
    assert torch.allclose(merged, own, atol=1e-5 * float(own.abs().max()), rtol=0.0)


def test_weights_of_any_size_give_the_same(monkeypatch):
    """Small and large weights are copied in different layouts; those in bfloat16 keep theirs."""
    model = trained_norms(llama(attention_bias=True, mlp_bias=True))
    use_packed_attention(model)
    settings = layer_attention(model)
    expected = forwards(model, settings)[0]
    monkeypatch.setattr("rexrag.engine.sampling.cpu_weights.SMALL", 0)
    assert torch.allclose(forwards(model, settings)[0], expected, atol=1e-4)
    rounded = trained_norms(llama()).to(torch.bfloat16)
    use_packed_attention(rounded)
    settings = layer_attention(rounded)
    assert settings is not None
    merged, own = (x.float() for x in forwards(rounded, settings))
    assert ((merged - own).norm(dim=-1) / own.norm(dim=-1)).median() < 0.05


def with_another_part():
    """A part that adds nothing until it is trained."""
    model = llama()
    model.model.layers[1].self_attn.extra = torch.nn.Linear(32, 32)
    return model


def with_a_bias_of_queries_alone():
    model = llama()
    model.model.layers[1].self_attn.q_proj.bias = torch.nn.Parameter(torch.ones(32))
    return model


def with_a_hook():
    """The same parts, and other hidden states."""
    model = llama()
    model.model.layers[1].mlp.register_forward_hook(lambda module, given, out: 1.01 * out)
    return model


def with_lora():
    model = llama()
    choose_trained(model, PolicyConfig(lora_rank=2), 0)
    return model


OTHERS = {
    "gemma": lambda: spread(GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=8))),
    "qwen3": lambda: spread(Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8))),
    "granite": lambda: spread(GraniteForCausalLM(GraniteConfig(**SIZES, residual_multiplier=0.5))),
    ERNIE: lambda: spread(Ernie4_5ForCausalLM(Ernie4_5Config(**SIZES))),
    "llama, angles by length": lambda: llama(rope_parameters=DYNAMIC),
    "llama with a LoRA": with_lora,
    "llama with another part": with_another_part,
    "llama with one bias": with_a_bias_of_queries_alone,
    "llama with a hook": with_a_hook,
}


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_other_models_run_their_own_forward(name):
    model = trained_norms(OTHERS[name]()).eval()
    use_packed_attention(model)
    assert layer_attention(model) is None
    episodes = rollouts(3, 2)
    run(model, episodes)
    assert largest_error(model, episodes) < 1e-4


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("gemma", torch.float32),
        ("gemma", torch.bfloat16),
        ("granite", torch.float32),
        ("granite", torch.bfloat16),
        (ERNIE, torch.float32),  # in bfloat16 the difference of such a small model is that of rounding
    ],
)
def test_another_family_s_hidden_states_are_seen_to_differ(name, dtype, monkeypatch):
    """What the comparison is worth by itself, without the list of families."""
    model = trained_norms(OTHERS[name]()).to(dtype).eval()
    use_packed_attention(model)
    monkeypatch.setattr(decoder, "FAMILIES", (model.config.model_type,))
    assert layer_attention(model) is None


def test_a_model_with_fewer_positions_than_the_comparison_needs_is_no_error():
    sizes = {"n_positions": 20, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes)).eval()
    use_packed_attention(model)
    assert layer_attention(model) is None


def test_a_model_too_large_to_copy_runs_its_own_forward(model, monkeypatch):
    assert layer_attention(model) is not None
    monkeypatch.setattr(decoder, "COPIED_BYTES", 100)
    assert layer_attention(model) is None


def test_a_session_keeps_the_weights_of_its_beginning_and_frees_its_copies(model):
    def logps(opened) -> list[float]:
        episodes = rollouts(2, 1)
        opened.run(episodes, Echo(), 0.0, 0)
        return [logp for episode in episodes for logp in episode.logps]

    opened = session(model)
    before = logps(opened)
    with torch.no_grad():
        model.base_model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert logps(opened) == pytest.approx(before, abs=1e-5)
    assert logps(session(model)) != pytest.approx(before, abs=1e-5)
    opened.close()
    assert not any(isinstance(value, FusedDecoder) for value in vars(opened).values())
