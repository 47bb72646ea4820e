"""Which kernel serves an op: ours, compiled from ``custom_ops/``, or the reference in plain Paddle.

The library is found or compiled at the first question, once a process. Where that cannot be done, one warning says why
and every op runs its reference; on a GPU likewise where the library has no CUDA kernels. ``ERNIE5_KERNELS=reference``
asks for the references.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import lru_cache
from pathlib import Path

import paddle

from ernie5.ops.build import BuildError, architectures_of, cuda_note, cuda_targets, find_or_build

CHOICE_VARIABLE = "ERNIE5_KERNELS"
PREFIX = "ernie5_"
SERVED_DTYPES = {paddle.float32, paddle.bfloat16}
INTEGER_DTYPES = {paddle.int32, paddle.int64}
OPS = {  # op -> what the model uses it for
    "moe_ffn": "routed experts",
    "moe_ffn_backward_rows": "routed experts of tokens that come in parts, on the CPU",
    "moe_ffn_backward_weights": "gradients of their weights, over all parts",
    "dense_ffn": "shared expert; float32 on the CPU is linear around swiglu",
    "swiglu": "activation of the shared expert in float32, on the CPU",
    "linear": "projections and heads in bfloat16; in float32 where the processor has AMX, else Paddle's matmul",
    "add": "sums of activations",
    "fork": "sums of gradients",
    "cast": "between float32 and bfloat16",
    "flashmask_attention": "attention under interval masks",
    "uni_rope": "rotary positions",
    "route": "expert selection",
    "rms_norm": "norms",
    "add_rms_norm": "norms of a sum",
    "permute": "assignments grouped by expert",
    "cross_entropy": "token losses",
    "patch_embed": "pictures and clips to patches",
    "decode_step": "generation",
    "decode_text": "generation of text, many tokens a call",
    "adamw": "optimizer",
    "sum_of_squares": "gradient clipping",
    "exchange_start": "tokens between ranks over gloo",
}
ON_GPU = frozenset(  # the ops whose bindings call CUDA kernels
    {
        "moe_ffn",
        "dense_ffn",
        "uni_rope",
        "route",
        "permute",
        "rms_norm",
        "add_rms_norm",
        "cross_entropy",
        "patch_embed",
    }
)


class _Library:
    """The loaded library, or why there is none (``problem``), and the names of the ops it registered.

    ``architectures``: the GPUs it has CUDA kernels for; ``cuda_problem``: why there are none though a GPU wants them.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.problem = self.cuda_problem = ""
        self.names: frozenset[str] = frozenset()
        self.architectures: tuple[str, ...] = ()
        if chosen_reference():
            self.problem = f"{CHOICE_VARIABLE}=reference"
            return
        try:
            self.path = find_or_build()
            from paddle.utils.cpp_extension.extension_utils import load_op_meta_info_and_register_op

            self.names = frozenset(load_op_meta_info_and_register_op(str(self.path)))
            self.architectures = architectures_of(self.path)
        except (BuildError, OSError, RuntimeError) as error:
            self.problem = str(error).splitlines()[0]
            warnings.warn(
                f"ernie5: the compiled kernels are not available ({self.problem}); every op runs its slower reference",
                stacklevel=2,
            )
            return
        self.cuda_problem = "" if self.architectures else cuda_targets()[1]
        if self.cuda_problem:
            warnings.warn(cuda_note(self.cuda_problem), stacklevel=2)


@lru_cache(maxsize=1)
def library() -> _Library:
    """Finds, compiles or gives up on the library; the answer is kept."""
    return _Library()


def available(name: str) -> bool:
    """Whether the library holds a kernel for the op ``name``, such as "moe_ffn"."""
    return PREFIX + name in library().names


def reaches(name: str, tensor: paddle.Tensor) -> bool:
    """Whether ours computes the op where the tensor lies: on the CPU, or on a GPU that it has a CUDA kernel for."""
    return available(name) and (not on_gpu(tensor) or (name in ON_GPU and bool(library().architectures)))


@lru_cache(maxsize=1)
def matrix_unit() -> bool:
    """Whether the library multiplies large matrices on the processor's matrix unit, in float32 too."""
    path = library().path
    return path is not None and bool(ctypes.CDLL(str(path)).ernie5_has_matrix_unit())


def keep_awake(on: bool = True) -> bool:
    """A thread of the lowest priority keeps this process's core from falling asleep while it waits, or no longer does.

    False without the compiled library, which has that thread.
    """
    path = library().path
    if path is not None:
        ctypes.CDLL(str(path)).ernie5_keep_awake(int(on))
    return path is not None


def serves(name: str, *tensors: paddle.Tensor) -> bool:
    """Whether ours computes the op for these floating-point tensors: all float32 or all bfloat16, within reach."""
    first = tensors[0].dtype
    if first not in SERVED_DTYPES or any(tensor.dtype != first for tensor in tensors[1:]):
        return False
    return reaches(name, tensors[0])


def on_gpu(tensor: paddle.Tensor) -> bool:
    """Whether the tensor, or in a static graph the device that will run it, is a GPU."""
    if paddle.in_dynamic_mode():
        return tensor.place.is_gpu_place()
    return paddle.device.get_device().startswith("gpu")


def call(name: str, inputs: list, attributes: list | None = None) -> paddle.Tensor | list[paddle.Tensor]:
    """Runs the kernel ``name``, differentiably, in dynamic and in static graphs.

    ``inputs`` (tensors, lists of tensors, or None where optional) and ``attributes`` in the order of the op's binding.
    """
    outputs = paddle._C_ops._run_custom_op(PREFIX + name, *inputs, *(attributes or []))
    for output in outputs:
        if output.dtype in INTEGER_DTYPES:  # else a later op's backward would wait for a gradient that never comes
            output.stop_gradient = True
    return outputs[0] if len(outputs) == 1 else outputs


def chosen_reference() -> bool:
    """Whether the user asked for the references."""
    return os.environ.get(CHOICE_VARIABLE) == "reference"


def serving(name: str) -> tuple[str, str]:
    """(kernel, why) for the op on this machine's default device, for ``tools/doctor.py``."""
    if paddle.device.get_device().startswith("gpu"):
        return _serving_on_gpu(name)
    if available(name):
        return "compiled", f"{library().path}"
    return "reference", library().problem or "no compiled kernel for this op"


def _serving_on_gpu(name: str) -> tuple[str, str]:
    if name == "flashmask_attention":
        return "Paddle's GPU kernel", "float16 and bfloat16"
    if name not in ON_GPU:
        return "reference", "ours is for the CPU"
    if available(name) and library().architectures:
        return "compiled", f"CUDA for {targets()}, {library().path}"
    return "reference", library().problem or library().cuda_problem or "the library has no CUDA kernels"


def targets() -> str:
    """The GPUs that the library has CUDA kernels for, as nvcc names them; "" if it has none."""
    return ", ".join(f"sm_{name}" for name in library().architectures)
