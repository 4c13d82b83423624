"""Bytes that kernels read and write. In: some work on the dry GPU; out: sums for three kinds of kernel.

Each tensor counts once as read and once as written by a kernel, as if a second read came from the cache. Matrix
products are left out, because their arithmetic hides their traffic.
"""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OURS = "regpt2"  # the namespace of our operators
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "_scaled_mm"}
ONLY_WRITTEN = {"copy_", "fill_", "zero_"}  # their first argument is not read
FEW_ELEMENTS = {"gather", "scatter_", "scatter_add_"}  # touch as many elements as their index has


def n_bytes(tensors: object) -> int:
    """The bytes of all tensors among these; for a tensor that repeats its elements (expand) those in memory."""
    found = [t for t in tree_leaves(tensors) if isinstance(t, Tensor) and t.device.type == "cuda"]
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in found)


def of_operator(operator: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], result: object) -> int:
    """The bytes of one call of one of torch's operators."""
    name = operator.overloadpacket.__name__
    returns = [value.alias_info for value in operator._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in returns)
    if is_view or name in PRODUCTS or name.startswith(("empty", "new_empty", "_unsafe_view", "detach")):
        return 0
    if name in FEW_ELEMENTS:
        index = arguments[2]
        return n_bytes(index) + 2 * index.numel() * arguments[0].element_size()
    return n_bytes([arguments[1:] if name in ONLY_WRITTEN else arguments, keywords]) + n_bytes(result)


class Operators(TorchDispatchMode):
    """Counts torch's operators, those inside our own operators and all others. The work must not be compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = self.outside = 0
        self.depth = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == OURS:
            return self.look_inside(func, args, kwargs)
        result = func(*args, **kwargs)
        moved = of_operator(func, args, kwargs, result)
        if self.depth:
            self.inside += moved
        else:
            self.outside += moved
        return result

    def look_inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call the function behind the operator, so that its own operators are counted."""
        functions = OPDEFS[func._schema.name]._backend_fns  # by device; None = every device
        self.depth += 1
        try:
            with self:
                return functions.get("cuda", functions.get(None))(*args, **kwargs)
        finally:
            self.depth -= 1


class OwnKernels:
    """Counts the Triton kernels of this project: every tensor argument, as read and as written."""

    def __init__(self) -> None:
        self.bytes = 0

    def __enter__(self) -> "OwnKernels":
        from triton.runtime.jit import JITFunction  # torch for the CPU has none

        self.kind, self.run = JITFunction, JITFunction.run
        run = self.run

        def counted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            self.bytes += 2 * n_bytes([args, {k: v for k, v in kwargs.items() if k not in ("grid", "warmup")}])
            return run(kernel, *args, **kwargs)

        JITFunction.run = counted
        return self

    def __exit__(self, *_: object) -> None:
        self.kind.run = self.run


class Generated:
    """Counts the kernels that Inductor makes: its nodes after fusion pass through `see`.

    Inductor's own count limits a tensor to 1e9 elements, and the logits of 65,536 tokens have 3.3e9.
    """

    def __init__(self) -> None:
        self.bytes = 0

    def see(self, nodes: list[Any]) -> list[Any]:
        from torch._inductor.ir import UserDefinedTritonKernel

        for node in nodes:
            if not node.is_extern() or isinstance(node.node, UserDefinedTritonKernel):
                self.bytes += self.of_kernel(node)
        return nodes

    def of_kernel(self, kernel: Any) -> int:
        """Every buffer except those that never leave the kernel."""
        fused = set(kernel.get_nodes())
        kept_inside = {
            buffer.get_name() for buffer in kernel.get_outputs() if all(user.node in fused for user in buffer.users)
        }
        found = kernel.read_writes
        return sum(of_buffers([d for d in deps if d.name not in kept_inside]) for deps in (found.reads, found.writes))


def of_buffers(accesses: Iterable[Any]) -> int:
    """The bytes of these accesses (Inductor's MemoryDep): what they touch of each buffer, at most the whole."""
    from torch._inductor.virtualized import V

    touched: dict[str, int] = {}
    for access in accesses:
        if hasattr(access, "size"):  # others only keep an order
            n_elements = math.prod(map(int, access.size)) if access.is_indirect() else int(access.get_numel())
            touched[access.name] = touched.get(access.name, 0) + n_elements
    return sum(
        V.graph.get_dtype(name).itemsize * min(n_elements, int(V.graph.get_numel(name)))
        for name, n_elements in touched.items()
    )
