"""Which kernels run. In: something that computes; out: the name of the attention kernel that it used."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

from regpt2.base.device import quiet_profiler

# torch's operators behind scaled_dot_product_attention, up to what differs by version; and FlexAttention, compiled.
_ATTENTION = {
    "flex_attention": "FlexAttention",
    "_scaled_dot_product_cudnn_attention": "cuDNN",
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_efficient_attention": "efficient",
    "_scaled_dot_product_attention_math": "math",
}


def attention_kernel(work: Callable[[], object]) -> str:
    """The kernel behind attention, seen by running `work` once more; "matmul" if it is none of torch's."""
    quiet_profiler()
    with profile(activities=[ProfilerActivity.CPU]) as seen:  # operators are called there, wherever they compute
        work()
    ran = {event.name for event in seen.events() or ()}
    names = [name for operator, name in _ATTENTION.items() if any(operator in one for one in ran)]
    return names[0] if names else "matmul"
