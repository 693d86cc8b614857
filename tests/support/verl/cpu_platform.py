"""A platform without accelerators for verl (tests only): VERL_PLATFORM=cpu, and this module as a plugin.

verl's workers ask a "device module" for memory figures and caches; here they are `torch.cpu`'s, or constants.
Ray counts two logical accelerators, so that verl places two ranks.
"""

from __future__ import annotations

import contextlib
import types

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

RANKS = 2


def _device_module() -> types.ModuleType:
    module = types.ModuleType("cpu_as_device")
    for name in dir(torch.cpu):
        if not name.startswith("__"):
            setattr(module, name, getattr(torch.cpu, name))
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(module, name, lambda *_, **__: 0)
    for name in ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "manual_seed", "set_device"):
        setattr(module, name, lambda *_, **__: None)
    module.manual_seed_all = module.manual_seed
    module.mem_get_info = lambda *_, **__: (8 << 30, 16 << 30)
    module.get_device_name = lambda *_, **__: "cpu"
    module.get_rng_state, module.set_rng_state = torch.get_rng_state, torch.set_rng_state
    module.current_device = lambda: "cpu"
    module.device_count = lambda: RANKS
    return module


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    device_name = vendor_name = "cpu"
    device_module = _device_module()

    def is_available(self):
        return True

    def current_device(self):
        return "cpu"

    def device_count(self):
        return RANKS

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg):
        yield

    def profiler_start(self):
        pass

    profiler_stop = profiler_start

    def ray_resource_name(self):
        return "GPU"

    def ray_noset_envvars(self):
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self):
        return False

    def cudart(self):
        return None
