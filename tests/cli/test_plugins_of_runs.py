"""A run folder's plug-ins run only where the user allows it, those of its control too."""

import pytest

from rexrag.cli.training import _kept_control
from rexrag.config import presets
from rexrag.config.files import dump_toml
from rexrag.config.plugin_keys import require_plugins_allowed
from rexrag.errors import ConfigError


def test_a_control_that_names_a_plug_in_is_asked_for(tmp_path):
    settings = presets.resolve("quickstart", overrides=["train.control=grpo"])
    control = presets.resolve("quickstart", "grpo", ["agent.reward=somebody:reward", "train.control=''"])
    (tmp_path / "control.toml").write_text(dump_toml(control))
    kept = _kept_control(settings, tmp_path, [])
    with pytest.raises(ConfigError, match=r"names a plug-in \(agent.reward = 'somebody:reward'\)"):
        require_plugins_allowed(kept, False, tmp_path / "control.toml")
