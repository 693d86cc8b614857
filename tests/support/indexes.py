"""Index folders that are changed on purpose."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rexrag.retrieval.index.folder import MANIFEST, manifest_digest


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and sign it again, as one who means it would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    manifest["sha256"] = manifest_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
