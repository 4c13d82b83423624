"""Known GPUs. In: a name; out: memory, rates and the share of its peak that training reaches, with sources.

Memory, bandwidth and multiprocessors are from data sheets; base/device.py has the matmul peaks.
"""

from dataclasses import dataclass

from regpt2.base.device import sheet_flops
from regpt2.base.errors import UsageError, did_you_mean

GIB = 1 << 30
CONTEXT_BYTES = 600_000_000  # of a CUDA process besides its tensors: context, kernels, cuBLAS
SMALL_FLOPS, LARGE_FLOPS = 798e6, 9.80e9  # per token, of GPT-2 124M and 1558M at T = 1024


@dataclass(frozen=True)
class Mfu:
    """The share of the 16-bit peak that training reaches with torch.compile or handwritten kernels at large batches."""

    small: float  # for the 124M model, with causal attention counted once, as in model/flops.py
    large: float  # for the 1558M model
    spread: float  # relative uncertainty
    source: str


_A100 = Mfu(0.56, 0.62, 0.10, "llm.c on 8 x A100: 218K, 80K and 38.6K tokens/s per GPU for 124M, 350M, 774M")
_H100 = Mfu(0.39, 0.48, 0.12, "llm.c on 8 x H100: 468K, 188K and 46.8K tokens/s per GPU for 124M, 350M, 1558M")
_H200 = Mfu(0.44, 0.51, 0.15, "nanoGPT's 1558M on one H200: 49.9K tokens/s; at 124M the H100 and faster memory")
_L40S = Mfu(0.24, 0.30, 0.20, "124M on one L40S: 106K tokens/s; for larger models as the H100's share grows")
_5090 = Mfu(0.39, 0.39, 0.20, "124M on one RTX 5090, 10B tokens in 28 hours with evaluations")
_4090 = Mfu(0.52, 0.52, 0.20, "nanoGPT issue 182 (29 % by the A100's peak), and 110K tokens/s per GPU on 2 x 4090")
_4070 = Mfu(0.77, 0.77, 0.20, "nanochat's d12 (124M's layers, T = 2048) on one RTX 4070: 55.7K tokens/s")
_3090 = Mfu(0.70, 0.70, 0.20, "build-nanogpt issue 4, 124M: 62K tokens/s (WSL2), 52K (Windows)")

# For a card without a published run: matmuls at a share of its peak, plus the bytes per FLOP that the kernels between
# them move, at 124M and 1558M (3.1 MB per token at 124M, at 90 % of the memory's rate). The eight cards with published
# runs are within 35 % of this.
MATMULS = 0.72
BYTES_PER_FLOP = (4.4e-3, 2.2e-3)
NETWORK_SHARE = 0.75  # of the network cards' rate, in an all-reduce: 8 x 400 Gbit/s give 300 GB/s


@dataclass(frozen=True)
class Machine:
    """A GPU, and its node's links."""

    name: str  # the maker's, as in base/device.py's table of peaks
    memory_gib: float  # as the driver reports it
    bandwidth: float  # bytes per second of its memory
    n_sm: int  # multiprocessors: a matmul with fewer tiles than these leaves some idle
    link: float  # bytes per second per GPU in an all-reduce within the node, as NCCL counts bus bandwidth
    network_gbps: float = 12.5
    """Gbit/s between nodes per GPU, in each direction: usually one card of 100 Gbit/s for eight GPUs."""
    published: Mfu | None = None
    precision: str = "bf16"

    @property
    def usable_bytes(self) -> int:
        """Available to tensors."""
        return int(self.memory_gib * GIB) - CONTEXT_BYTES

    @property
    def peak(self) -> float:
        """FLOP/s in 16 bits by the data sheet."""
        flops = sheet_flops(self.name, self.precision)
        assert flops is not None, f"{self.name} has no peak in base/device.py"
        return flops

    @property
    def reached(self) -> Mfu:
        """From published runs of this card, else estimated from its matmul and memory rates."""
        if self.published is not None:
            return self.published
        small, large = (1 / (1 / MATMULS + moved * self.peak / self.bandwidth) for moved in BYTES_PER_FLOP)
        return Mfu(small, large, 0.40, "no published run on this card: estimated from its matmul and memory rates")

    def bus(self, gpus: int, nodes: int, network_gbps: float | None = None) -> float:
        """Bytes per second per GPU of an all-reduce, as NCCL counts, over nodes of `gpus` GPUs each.

        A ring enters and leaves each node once, and NCCL's rings divide the network cards of the node among them: the
        sum of the cards' rates limits it.
        """
        if nodes == 1:
            return self.link
        gbps = self.network_gbps if network_gbps is None else network_gbps
        return min(self.link, NETWORK_SHARE * gpus * gbps * 1e9 / 8)


# NVLink: 600 GB/s (A100), 900 (H100, H200), 1800 (B200), 300 (V100) by the data sheets; NCCL's bus bandwidth is 40 % of
# it. Cards on PCIe 4.0 x16 reach 10 to 20 GB/s; we assume 10. Networks: one card of 200 Gbit/s (A100) or 400 (H100 and
# later) for each GPU, as in the makers' own systems.
_PCIE = 10e9
MACHINES = {
    "A100-40": Machine("A100", 39.5, 1555e9, 108, 230e9, 200, _A100),
    "A100-80": Machine("A100", 79.2, 2039e9, 108, 230e9, 200, _A100),
    "H100": Machine("H100", 79.2, 3350e9, 132, 380e9, 400, _H100),
    "H100-PCIe": Machine("H100 PCIe", 79.2, 2000e9, 114, _PCIE),
    "H200": Machine("H200", 139.8, 4800e9, 132, 380e9, 400, _H200),
    "GH200": Machine("GH200", 94.5, 4000e9, 132, _PCIE, published=_H200),
    "B200": Machine("B200", 178.4, 8000e9, 148, 700e9, 400),
    "5090": Machine("RTX 5090", 31.4, 1792e9, 170, _PCIE, published=_5090),
    "4090": Machine("RTX 4090", 23.5, 1008e9, 128, _PCIE, published=_4090),
    "4070": Machine("RTX 4070", 11.6, 504e9, 46, _PCIE, published=_4070),
    "3090": Machine("RTX 3090", 23.7, 936e9, 82, _PCIE, published=_3090),
    "A6000": Machine("A6000", 47.5, 768e9, 84, _PCIE),
    "A10G": Machine("A10G", 22.1, 600e9, 80, _PCIE),
    "L40S": Machine("L40S", 44.5, 864e9, 142, _PCIE, published=_L40S),
    "L4": Machine("L4", 22.0, 300e9, 58, _PCIE),
    "T4": Machine("T4", 14.6, 320e9, 40, _PCIE, precision="fp16"),
    "V100-16": Machine("V100", 15.8, 900e9, 80, 120e9, precision="fp16"),
    "V100-32": Machine("V100", 31.7, 900e9, 80, 120e9, precision="fp16"),
}


def find_machine(name: str) -> Machine:
    """A machine by its name on the command line, in any case.

    Raises:
        UsageError: an unknown name; the message lists the known ones.
    """
    known = {key.lower(): machine for key, machine in MACHINES.items()}
    if name.lower() not in known:
        raise UsageError(
            f"there is no machine {name!r}{did_you_mean(name.lower(), known)} Available: {', '.join(MACHINES)}; "
            "without --machine the plan is for this machine."
        )
    return known[name.lower()]


def recognize(device_name: str, memory_bytes: int) -> Machine | None:
    """The machine with a card of this name ("NVIDIA H100 80GB HBM3") and about this memory; None: unknown."""
    for machine in MACHINES.values():
        same_card = sheet_flops(device_name, machine.precision) == machine.peak and machine.name in device_name
        if same_card and abs(memory_bytes / GIB - machine.memory_gib) < 0.1 * machine.memory_gib:
            return machine
    return None
