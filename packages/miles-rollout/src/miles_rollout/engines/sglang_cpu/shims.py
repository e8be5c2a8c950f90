"""Lets an unmodified SGLang be imported where there is no GPU; copied into its environment, never imported by Miles.

A `.pth` file imports this at the start of every interpreter of that environment, so that the processes SGLang spawns
have it too. It must therefore cost nothing: each shim is put in place when the module it is for is first imported.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["install"]

_TORCHVISION_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_held: list[object] = []
"""Operator declarations, which end with the object that made them."""


class _Finder(MetaPathFinder):
    """Finds `sgl_kernel`, and does what must come before `sglang` and `torchvision`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "sgl_kernel":
            return ModuleSpec(name, _KernelLoader())
        if name == "sglang":
            _without_triton()
        elif name == "torchvision":
            _declare_torchvision_operators()
        elif name == "sglang.srt.mem_cache.pool_host.common":
            return _unpinned(PathFinder.find_spec(name, path))
        return None


class _KernelLoader(Loader):
    """`sgl_kernel` is a wheel of CUDA kernels. SGLang imports names from it everywhere and calls none on a CPU."""

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__getattr__"] = _kernel


def _kernel(name: str) -> object:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: object, **__: object) -> None:
        raise RuntimeError(
            f"sgl_kernel.{name} is a CUDA kernel; this environment was made for a CPU (miles sglang-cpu)"
        )

    return missing


def _without_triton() -> None:
    """Use SGLang's own stand-in for triton, which it installs on a Mac alone; the rest of it goes to a dummy torch."""
    where = PathFinder.find_spec("sglang")
    if PathFinder.find_spec("triton") is not None or where is None or not where.submodule_search_locations:
        return
    spec = importlib.util.spec_from_file_location(
        "_miles_platform_stubs", f"{where.submodule_search_locations[0]}/_platform_stubs.py"
    )
    if spec is None or spec.loader is None:
        return
    stubs = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = stubs  # its dataclasses look themselves up
    torch = sys.modules.get("torch")
    sys.modules["torch"] = mock.MagicMock()
    try:
        spec.loader.exec_module(stubs)
        mac = SimpleNamespace(platform="darwin", modules=sys.modules, meta_path=sys.meta_path)
        with mock.patch.multiple(stubs, sys=mac, platform=SimpleNamespace(machine=lambda: "arm64")):
            stubs.install_platform_stubs()
    finally:
        del sys.modules["torch"]
        if torch is not None:
            sys.modules["torch"] = torch


def _declare_torchvision_operators() -> None:
    """torchvision's wheel on PyPI is a CUDA build: its library does not load beside a CPU build of torch, and the
    operators that it would have declared are then described all the same, which fails."""
    import torch  # noqa: PLC0415 - at the start of each interpreter this would cost seconds

    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "DEF")
    for operator in _TORCHVISION_OPERATORS:
        library.define(operator)
    _held.append(library)


def _unpinned(spec: ModuleSpec | None) -> ModuleSpec | None:
    """Returning routed experts allocates its buffer as pinned memory; without CUDA there is nothing to pin for."""
    if spec is not None and spec.loader is not None:
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            vars(module)["_cuda_host_register"] = lambda *_, **__: None

        vars(spec.loader)["exec_module"] = exec_module
    return spec


def install() -> None:
    """Put the shims in place, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


install()
