"""A GPU that is only pretended: its tensors compute on the CPU, say that they are elsewhere, and refuse what
a real GPU would refuse.

Within `pretend_gpu()` tensors of two devices do not mix, `.numpy()` of a tensor "on the GPU" fails, and
accelerate hands the device out. So a machine without a GPU finds out who forgot a `.to(device)` or a
`.cpu()`. It says nothing of speed, memory, rounding or half precision: tests marked `cuda` do.
"""
import threading
from contextlib import contextmanager
from unittest.mock import patch
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

class Hook(torch._C._acc.PrivateUse1Hooks):
    "Outside of `pretend_gpu` there is no such device, as far as torch's own `accelerator` knows."
    def is_available(self): return Pretence.entered
    def has_primary_context(self, device): return True
    def is_built(self): return True

class Backend:
    "What torch asks a device's module."
    def is_initialized(self): return True
    def is_available(self): return Pretence.entered
    def current_device(self): return 0
    def device_count(self): return 1
    def manual_seed_all(self, seed): pass
    def get_amp_supported_dtype(self): return [torch.float16, torch.bfloat16]
    # what `fork_rng` keeps; it is the CPU's here
    def get_rng_state(self, device=0): return torch.get_rng_state()
    def set_rng_state(self, state, device=0): pass
    def _is_in_bad_fork(self): return False

_setup_privateuseone_for_python_backend("pretended", Backend(), Hook())
GPU = torch.device("pretended:0")
# autocast changes nothing here: what is computed is the CPU's, in the precision that it comes in
whole = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
whole.fallback(torch.library.fallthrough_kernel)
aten = torch.ops.aten
JOINS = {aten.cat.default, aten.stack.default}  # here not even a single number may come from the CPU
COPIES = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
# place of the values put
INDEXES = {
    aten.index.Tensor: None, aten.index_put.default: 2, aten.index_put_.default: 2,
    aten._index_put_impl_.default: 2
}

# what a wrapper cannot say of itself
INSIDE = {getattr(torch.Tensor, o): o for o in ("tolist", "untyped_storage", "data_ptr")}

class Pretended(torch.Tensor):
    "Holds a tensor of the CPU in `inner`."
    @staticmethod
    def __new__(cls, inner):
        like = dict(
            strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout
        )
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), **like, device=GPU, requires_grad=inner.requires_grad
        )

    def __init__(self, inner): self.inner = inner
    def __repr__(self): return f"Pretended({self.inner!r})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError(
                f"can't convert {GPU} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to"
                " host memory first."
            )
        if func in INSIDE: return getattr(args[0].inner, INSIDE[func])()
        with torch._C.DisableTorchFunctionSubclass(): out = func(*args, **(kwargs or {}))
        if func == torch.Tensor.data.__set__ and isinstance(args[1], Pretended): args[0].inner = args[1].inner
        return out

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return run(func, args, kwargs or {})

def leaves(values):
    "All that is in lists, at any depth."
    for o in values:
        if isinstance(o, (list, tuple)): yield from leaves(o)
        else: yield o

def mapped(change, value):
    "The same lists, tuples and values, with each tensor changed."
    if isinstance(value, (list, tuple)): return type(value)(mapped(change, o) for o in value)
    return change(value) if isinstance(value, torch.Tensor) else value

def plain(value): return mapped(lambda o: o.inner if on_gpu(o) else o, value)

def on_gpu(o): return isinstance(o, Pretended)
def on_cpu(o): return isinstance(o, torch.Tensor) and not on_gpu(o) and o.device.type == "cpu"

def check(func, args, given):
    "RuntimeError if tensors of two devices meet where CUDA would not take them together."
    if func in INDEXES:  # an index may wait on the CPU, but not the other way round
        if on_cpu(args[0]) and any(map(on_gpu, args[1])):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        given = [args[0], *([args[INDEXES[func]]] if INDEXES[func] else [])]
    if func in COPIES or not any(map(on_gpu, given)): return
    stray = next((o for o in given if on_cpu(o) and (o.dim() or func in JOINS)), None)
    if stray is not None:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {GPU} and cpu!"
            f" ({func}, {tuple(stray.shape)})"
        )

def run(func, args, kwargs):
    "The operation on the CPU; its results are where a GPU's would be."
    given, device = [*leaves(args), *leaves(kwargs.values())], kwargs.get("device")
    check(func, args, given)
    named = device is not None and torch.device(device).type == GPU.type
    there = any(map(on_gpu, given)) if device is None else named
    if func is aten.copy_.default: there = on_gpu(args[0])
    if there and any(isinstance(o, torch.Generator) and o.device.type == "cpu" for o in given):
        raise RuntimeError(f"Expected a {GPU.type!r} device type for generator but found 'cpu'")
    own = {k: plain(v) for k, v in kwargs.items()} | (dict(device=torch.device("cpu")) if named else {})
    if own.get("pin_memory"): own["pin_memory"] = False
    out = func(*plain(args), **own)
    if not there: return out
    if func._schema.returns and writes(func._schema.returns[0]): return args[0]  # in place
    return mapped(Pretended, out)

def writes(returned): return returned.alias_info is not None and returned.alias_info.is_write

class Pretence(TorchDispatchMode):
    "Sees the operations that have no tensor to go by: those that make one."
    entered = False
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return run(func, args, kwargs or {})

run_thread = threading.Thread.run

def run_pretending(thread):
    "A thread's work: torch's modes belong to the thread that entered them, a GPU is there for all."
    torch._C._set_only_lift_cpu_tensors(True)
    with Pretence(): run_thread(thread)

@contextmanager
def pretend_gpu():
    "Within this context the machine has a GPU, as far as accelerate and `.to(device)` know."
    from accelerate.state import AcceleratorState, PartialState
    AcceleratorState._reset_state(reset_partial_state=True)
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # so that `torch.tensor(..., device=GPU)` comes by here
    try:
        with Pretence(), patch.object(threading.Thread, "run", run_pretending):
            Pretence.entered = True
            PartialState(cpu=True).device = GPU
            yield GPU
    finally:
        Pretence.entered = False
        torch._C._set_only_lift_cpu_tensors(before)
        AcceleratorState._reset_state(reset_partial_state=True)
