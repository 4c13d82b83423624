"""Known accelerators. In: a name; out: memory, rates and the share of its peak that training reaches, with sources.

Memory, bandwidth and multiprocessors are the data sheets'; matmul peaks stand in base/device.py.
"""

from dataclasses import dataclass

from regpt2.base.device import sheet_flops
from regpt2.base.errors import UsageError, did_you_mean

GIB = 1 << 30
CONTEXT_BYTES = 600_000_000  # that a CUDA process takes beside its tensors: context, kernels, cuBLAS
SMALL_FLOPS, LARGE_FLOPS = 798e6, 9.80e9  # per token, of GPT-2 124M and 1558M at T = 1024


@dataclass(frozen=True)
class Reached:
    """The share of its 16-bit peak that training reaches with torch.compile or hand-made kernels at large batches."""

    small: float
    """For the 124M model; causal attention counted once, as model/flops.py does."""
    large: float
    """For the 1558M model."""
    spread: float
    """How far off this may be, as a share of it."""
    source: str


_UNKNOWN = Reached(0.33, 0.42, 0.5, "no published run on this card: 17 to 50 % of its peak, as others reach")
_A100 = Reached(0.56, 0.62, 0.10, "llm.c on 8 x A100: 218K, 80K and 38.6K tokens/s per GPU for 124M, 350M, 774M")
_H100 = Reached(0.39, 0.48, 0.12, "llm.c on 8 x H100: 468K, 188K and 46.8K tokens/s per GPU for 124M, 350M, 1558M")
_H200 = Reached(0.44, 0.50, 0.15, "H100's runs and the faster memory; nobody has published one on an H200")
_4090 = Reached(0.52, 0.52, 0.20, "nanoGPT issue 182 (29 % by the A100's peak), and 110K tokens/s per GPU on 2 x 4090")


@dataclass(frozen=True)
class Machine:
    """A GPU of a node."""

    name: str
    """As in base/device.py's table of peaks, which follows the makers."""
    memory_gib: float
    """As the driver reports it."""
    bandwidth: float
    """Bytes per second of its memory."""
    n_sm: int
    """Multiprocessors: a matmul smaller than a tile for each leaves some idle."""
    link: float
    """Bytes per second and GPU in an all-reduce within the node, as NCCL counts bus bandwidth."""
    network: float = 10e9
    """The same between nodes; this usual one is assumed (100 Gbit/s)."""
    reached: Reached = _UNKNOWN
    precision: str = "bf16"

    @property
    def usable_bytes(self) -> int:
        """For tensors."""
        return int(self.memory_gib * GIB) - CONTEXT_BYTES

    @property
    def peak(self) -> float:
        """FLOP/s in 16 bits by the data sheet."""
        flops = sheet_flops(self.name, self.precision)
        assert flops is not None, f"{self.name} has no peak in base/device.py"
        return flops


# NVLink: 600 GB/s (A100), 900 (H100, H200), 1800 (B200), 300 (V100) by the data sheets; NCCL's bus bandwidth is 40 % of
# it. Between such nodes 8 x 400 Gbit/s give 300 GB/s. Cards on PCIe 4.0 x16 reach 10 to 20 GB/s; 10 is assumed.
_PCIE = 10e9
MACHINES = {
    "A100-40": Machine("A100", 39.5, 1555e9, 108, 230e9, 150e9, _A100),
    "A100-80": Machine("A100", 79.2, 2039e9, 108, 230e9, 150e9, _A100),
    "H100": Machine("H100", 79.2, 3350e9, 132, 380e9, 300e9, _H100),
    "H100-PCIe": Machine("H100 PCIe", 79.2, 2000e9, 114, _PCIE),
    "H200": Machine("H200", 139.8, 4800e9, 132, 380e9, 300e9, _H200),
    "GH200": Machine("GH200", 94.5, 4000e9, 132, _PCIE, reached=_H200),
    "B200": Machine("B200", 178.4, 8000e9, 148, 700e9, 300e9),
    "5090": Machine("RTX 5090", 31.4, 1792e9, 170, _PCIE),
    "4090": Machine("RTX 4090", 23.5, 1008e9, 128, _PCIE, reached=_4090),
    "3090": Machine("RTX 3090", 23.7, 936e9, 82, _PCIE),
    "A6000": Machine("A6000", 47.5, 768e9, 84, _PCIE),
    "A10G": Machine("A10G", 22.1, 600e9, 80, _PCIE),
    "L40S": Machine("L40S", 44.5, 864e9, 142, _PCIE),
    "L4": Machine("L4", 22.0, 300e9, 58, _PCIE),
    "T4": Machine("T4", 14.6, 320e9, 40, _PCIE, precision="fp16"),
    "V100-16": Machine("V100", 15.8, 900e9, 80, 120e9, precision="fp16"),
    "V100-32": Machine("V100", 31.7, 900e9, 80, 120e9, precision="fp16"),
}


def find_machine(name: str) -> Machine:
    """A machine by the name on the command line, whatever its case.

    Raises:
        UsageError: it is not known; the message lists those that are.
    """
    known = {key.lower(): machine for key, machine in MACHINES.items()}
    if name.lower() not in known:
        raise UsageError(
            f"there is no machine {name!r}{did_you_mean(name.lower(), known)} There is: {', '.join(MACHINES)}; "
            "without --machine the plan is for this one."
        )
    return known[name.lower()]


def recognize(device_name: str, memory_bytes: int) -> Machine | None:
    """The machine whose card is called so ("NVIDIA H100 80GB HBM3") and has about as much memory; None: not known."""
    for machine in MACHINES.values():
        same_card = sheet_flops(device_name, machine.precision) == machine.peak and machine.name in device_name
        if same_card and abs(memory_bytes / GIB - machine.memory_gib) < 0.1 * machine.memory_gib:
            return machine
    return None
