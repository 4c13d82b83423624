"""Which kernel computes attention. In: a function that computes; out: the name of the kernel that it used."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

from regpt2.base.device import quiet_profiler

# torch's operators behind scaled_dot_product_attention, without the parts that differ by version; and FlexAttention.
_ATTENTION = {
    "flex_attention": "FlexAttention",
    "_scaled_dot_product_cudnn_attention": "cuDNN",
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_efficient_attention": "efficient",
    "_scaled_dot_product_attention_math": "math",
}


def attention_kernel(work: Callable[[], object]) -> str:
    """The kernel behind attention, found by running `work` once more; "matmul" if it is none of torch's."""
    quiet_profiler()
    with profile(activities=[ProfilerActivity.CPU]) as seen:  # the CPU calls the operators of every device
        work()
    ran = {event.name for event in seen.events() or ()}
    names = [name for operator, name in _ATTENTION.items() if any(operator in one for one in ran)]
    return names[0] if names else "matmul"
