"""Which model `policy.path` means, and which device."""

from __future__ import annotations

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

from rexrag.engine import sources
from rexrag.engine.loading import (
    choose_device,
    resolve,
)
from rexrag.errors import ConfigError, ModelError


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

    monkeypatch.setattr(sources, "get_hf_file_metadata", head)
    monkeypatch.setattr(sources, "try_to_load_from_cache", lambda name, file: None)
    for name in ("owner/name", "name"):
        if refused:
            with pytest.raises(ModelError, match=f"^{name}: .*{refused}"):
                resolve(name)
        else:
            assert resolve(name) == name
    assert [name in url and timeout == 10.0 for url, timeout in asked] == [True, True]
    monkeypatch.setattr(sources, "try_to_load_from_cache", lambda name, file: "/cache/config.json")
    assert resolve("owner/name") == "owner/name" and len(asked) == 2


def test_a_name_that_no_hub_could_know_is_refused():
    with pytest.raises(ModelError, match="my model: no such folder, and no name that a hub could know"):
        resolve("my model")


def test_other_names_were_meant_as_folders():
    for path in ("a/b/c", "", "/x", "~/x", "./x", "models/none", "runs/none"):
        with pytest.raises(ModelError, match="no such model folder"):
            resolve(path)


def test_devices_are_checked():
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("warp", "meta:x"):
        with pytest.raises(ConfigError, match=r"policy\.device"):
            choose_device(name)


@pytest.mark.parametrize(
    ("path", "nearest"),
    [("embeded-easy", "embedded-easy"), ("tiny-hrd", "tiny-hard"), ("./tiny-easy", "tiny-easy")],
)
def test_a_name_close_to_a_shipped_checkpoint_names_it(monkeypatch, path, nearest):
    def unknown(url, timeout):
        raise hub_error(RepositoryNotFoundError, 404)

    monkeypatch.setattr(sources, "get_hf_file_metadata", unknown)
    monkeypatch.setattr(sources, "try_to_load_from_cache", lambda name, file: None)
    with pytest.raises(ModelError, match=f"; did you mean '{nearest}'\\?$"):
        resolve(path)
    with pytest.raises(ModelError) as caught:
        resolve("owner/name")
    assert "did you mean" not in str(caught.value)
