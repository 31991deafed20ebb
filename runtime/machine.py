"""The machine under the program: which device and precision, what it can compile, how much memory it has."""

import contextlib
import ctypes
import os
import re

import torch
import torch.nn.functional as F

from runtime.files import UserError

# Dense bf16 matrix-product peaks in FLOP/s, from the makers' data sheets; for the utilisation (MFU) in logs and plans.
PEAKS = {"a100": 312e12, "h100 pcie": 756e12, "h100 nvl": 835e12, "h100": 989e12, "h200": 989e12}  # h100 alone: SXM


def pick_device(name="auto", local_rank=0):
    """torch.device for --device: auto takes cuda, then mps, then cpu. UserError if the named one is not there.

    "cuda" is the GPU of this rank. One that is named by its number would be that of all ranks: UserError too.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        elif device.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
            raise UserError(f"--device {name} names one GPU for several processes: use --device cuda")
        torch.empty(0, device=device).cpu()  # the copy fails on "meta", which computes nothing
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here ({str(error).splitlines()[0]})")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return device


def pick_precision(name, device):
    """ "bf16" or "fp32" for --precision. auto takes bf16 where matrix products in it are the faster ones.

    That is on GPUs, and on CPUs with AMX or AVX512-BF16 instructions; elsewhere a CPU emulates bf16 slowly.
    """
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    fast = device.type == "cuda" or able.get("amx_bf16") or able.get("avx512_bf16")
    return name if name != "auto" else "bf16" if fast else "fp32"


def autocast(device, precision):
    """The context in which a forward pass runs: matrix products in bf16, weights and sums in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextlib.contextmanager
def full_float32():
    """Within it, GPUs compute in full float32: TF32 would keep 10 bits of a number, too few for FID."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def float64_device(device):
    """Where to compute in float64: on `device`, unless that is one of Apple's GPUs, which do not have it."""
    return torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)


def attention(q, k, v):
    """softmax(q k^T / sqrt(Dh)) v of (B, Nh, L, Dh) each, in the precision that is fast on their device.

    CPUs have no fast backward kernel for bf16 attention: 10 ms against 2 ms in float32 (Nano, batch 64).
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)  # (B, Nh, L, Dh)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).type_as(v)  # (B, Nh, L, Dh)


class PackedLinear(torch.nn.Module):
    """A linear layer for inference on a CPU, its weights already in the blocks that oneDNN's product reads.

    nn.Linear sorts them at every call: for the 256 tokens of one image, a good part of the work.
    """

    def __init__(self, linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())  # opaque, of the same size
        self.bias = linear.bias

    def forward(self, x):
        x = x.to(self.weight.dtype)  # (..., in): autocast does not know this product
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")  # (..., out)


def freeze(model, precision, pack=True):
    """Prepares a model for inference only, in place.

    bf16: casts the weights of linear layers once, where autocast would do so at every call; half the memory, and the
    same numbers to the last bit. pack: on a CPU, large linear layers become PackedLinear, which torch.compile cannot
    read; the same numbers but for the order of sums.
    """
    # A CPU without bf16 instructions computes in it all the same, but cannot pack.
    pack = pack and torch.backends.mkldnn.is_available()
    pack = pack and (precision == "fp32" or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            if precision == "bf16":
                layer.bfloat16()
            if pack and layer.weight.device.type == "cpu" and layer.weight.numel() >= 2**18:  # small ones gain nothing
                model.set_submodule(name, PackedLinear(layer))


def keep_memory():
    """Makes the C library keep freed memory for the next tensor. Linux with glibc; nothing happens elsewhere.

    By itself it gives large blocks back to the system, which hands them out again page by page, zeroed: up to a quarter
    of the time of a bf16 training step of L's shape went there, for 5 to 8 % less memory.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_THRESHOLD: larger tensors go back when they are freed. glibc before 2.35 takes 32 MB at most.
        mallopt(-3, 2**30) or mallopt(-3, 2**25)
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: how much of the others is kept


def compiler_trouble(device="cpu"):
    """Why torch.compile cannot work there, in a few words, or None if it can: it is tried on one small function."""
    try:
        torch.compile(lambda x: torch.sin(x) + 1)(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001  whatever goes wrong in there, the answer is "then without"
        return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
    finally:
        torch.compiler.reset()


def will_compile(choice, device, say=print):
    """Whether to compile, for --compile on, off or auto (where it works; else it says why not). UserError for on."""
    if choice == "off":
        return False
    if (trouble := compiler_trouble(device)) and choice == "on":
        raise UserError(f"--compile on: {trouble}")
    if trouble:
        say(f"not compiling, which is slower but the same: {trouble}")
    return not trouble


def peak_flops(device):
    """Data-sheet bf16 FLOP/s of this GPU, or 0 where PEAKS does not know it."""
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else ""
    return next((peak for key, peak in PEAKS.items() if re.search(rf"\b{key}\b", name)), 0)  # not the A1000


def available_memory(device):
    """Free bytes: of the GPU's memory, or of the machine's on Linux; else None."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
