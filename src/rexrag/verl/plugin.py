"""What verl imports in each of its processes (`VERL_USE_EXTERNAL_MODULES`): our registrations."""

from rexrag.verl import agent, loss, trainer

__all__ = ["agent", "loss", "trainer"]
