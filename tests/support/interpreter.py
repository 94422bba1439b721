"""Triton's interpreter, made to do what a GPU does where it does something else, and to count what moves."""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

try:
    import triton.language as tl
    from triton import knobs
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
except ModuleNotFoundError:
    RUNS = False
else:
    RUNS = knobs.runtime.interpret


def round_to_nearest() -> None:
    """float32 becomes bfloat16 by rounding to nearest even, as on every GPU; the interpreter cuts the digits off."""
    if not RUNS:
        return
    cast = InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            bits = (
                torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16).view(torch.uint16).numpy()
            )
            return TensorHandle(bits, dst_type.scalar)
        return cast(self, src, dst_type)

    InterpreterBuilder.cast_impl = cast_impl


def multiply_as_tensor_cores() -> None:
    """Products of bfloat16 are exact, and of float32 in TF32; the interpreter multiplies bits and float32.

    Tensor cores cut the factors to 10 bits. With three terms, ``tf32x3``, a factor is rounded, and its rest is
    a second factor; the product of the rests is left out.
    """
    if not RUNS:
        return
    dot = InterpreterBuilder.create_dot
    cut = np.uint32(0xFFFFE000)

    def tf32(factor):
        return (factor.view(np.uint32) & cut).view(np.float32)

    def two_terms(factor):
        rounded = tf32((factor.view(np.uint32) + np.uint32(0x1000)).view(np.float32))
        return rounded, tf32(factor - rounded)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        factors = [np.ascontiguousarray(v.data) for v in (a, b)]
        if a.dtype.scalar == tl.bfloat16:
            factors = [(v.astype(np.uint32) << 16).view(np.float32) for v in factors]
        elif a.dtype.scalar == tl.float32 and input_precision.name == "TF32":
            factors = [tf32(v) for v in factors]
        elif a.dtype.scalar == tl.float32 and input_precision.name == "TF32x3":
            (a_0, a_1), (b_0, b_1) = map(two_terms, factors)
            return TensorHandle(
                d.data + (np.matmul(a_1, b_0) + np.matmul(a_0, b_1) + np.matmul(a_0, b_0)), d.dtype.scalar
            )
        else:
            return dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        return TensorHandle(d.data + np.matmul(*factors, dtype=np.float32), d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def count_loops() -> None:
    """A kernel's integer can bound a loop also where it is an array of one, which Triton 3.6 leaves to NumPy, and NumPy 2.4 refuses."""
    if not RUNS:
        return
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def patch_once_a_launch() -> None:
    """triton.language is patched once per launch and module; Triton does it at each call of a device function.

    A second patch replaces nothing but the functions of the first.
    """
    if not RUNS:
        return
    patch, patched = interpreter._patch_lang, set()

    def patch_lang(fn):
        if fn.__module__ in patched:
            return None  # a call of a device function does not use it
        is_kernel = not patched
        patched.add(fn.__module__)
        scope = patch(fn)
        if is_kernel:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    interpreter._patch_lang = patch_lang


def skip_repeated_work() -> None:
    """Interprets in half the time: same values, without work that Triton repeats or throws away.

    Triton makes a table of dtypes for each result, makes its shape anew, and searches the functions to patch for
    each launch. It computes overflow checks of integers that nothing reads unless ``debug`` is set.
    """
    if not RUNS:
        return
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=options.debug)
    np_dtype = lru_cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda dtype: (
        np.dtype(np.uint64) if dtype.scalar.is_ptr() else np_dtype(dtype.scalar)
    )
    builtins = lru_cache(lambda package: [v for v in inspect.getmembers(package) if tl.core.is_builtin(v[1])])

    def patch_builtin(package, builder, scope):
        for name, member in builtins(package):
            interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin

    @lru_cache
    def shape_and_size(shape):
        return tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))

    def init_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_and_size(tuple(type.shape) if type.is_block() else ())

    tl.tensor.__init__ = init_tensor
    init, attributes = tl.block_type.__init__, {}

    def init_block(self, element, shape):
        key = element.name, *shape
        known = attributes.get(key)
        if known is None:
            init(self, element, shape)
            known = attributes[key] = vars(self).copy()
        vars(self).update(known, element_ty=element)

    tl.block_type.__init__ = init_block
    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_unless_equal(self, lhs, rhs):
        equal = lhs.shape is rhs.shape  # of shape_and_size
        return (lhs, rhs) if equal else broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast_unless_equal


@dataclass
class Traffic:
    """What the kernels of a block read and wrote, and what else ran."""

    read: int = 0  # bytes, of lanes that are not masked out
    written: int = 0
    launches: list[tuple[str, int]] = field(default_factory=list)  # kernels and their programs
    operations: list[str] = field(
        default_factory=list
    )  # torch's own that give new values: on a GPU a launch each, a copy among them


class _Operations(TorchDispatchMode):
    """Records torch's operations, within the bodies of FastFlow's ops too, but not what the interpreter itself does."""

    def __init__(self, found: Traffic, numel: int | None) -> None:
        super().__init__()
        self.found, self.numel, self.launching = found, numel, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastflow":
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not self.launching and not name.startswith(("empty", "new_empty")):
            given = {v.untyped_storage().data_ptr() for v in args if isinstance(v, torch.Tensor)}
            results = result if isinstance(result, (tuple, list)) else [result]
            new = any(
                isinstance(v, torch.Tensor) and v.untyped_storage().data_ptr() not in given for v in results
            )
            if new or func._schema.is_mutable:
                self.found.operations.append(name)
                self._count(func, args, results)
        return result

    def _count(self, func, args: tuple, results: tuple | list) -> None:
        """Adds the tensors of ``numel`` elements that an operation reads and writes.

        A library computes the gradients of a convolution one by one: each of them reads dy.
        """

        def size(tensors) -> int:
            return sum(v.nbytes for v in tensors if isinstance(v, torch.Tensor) and v.numel() == self.numel)

        name = func.overloadpacket.__name__
        if name == "convolution_backward":
            dx, dweight, dbias = args[-1]
            self.found.read += size(args[:1]) * (dx + dweight + dbias) + size(args[1:2]) * dweight
            self.found.written += size(results)
            return
        changed = [v for v, a in zip(args, func._schema.arguments, strict=False) if a.is_write]
        self.found.read += size(args[1:] if name == "copy_" else args)
        self.found.written += size(changed or results)


@contextmanager
def traffic(numel: int | None = None) -> Iterator[Traffic]:
    """Counts what the kernels of a block move, as they ask for it: what a cache would answer counts as well.

    With ``numel``, only what lies in tensors of so many elements is counted, and of torch's operations as well.
    """
    found = Traffic()
    operations = _Operations(found, numel)
    spans: list[
        tuple[int, int]
    ] = []  # first address and size of the launched kernel's tensors of numel elements
    load, store, launch = (
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
        GridExecutor.__call__,
    )

    def size(pointers, mask) -> int:
        lanes = np.broadcast_to(mask.data, pointers.data.shape)
        if numel is not None:
            addresses = pointers.data[lanes.astype(bool)]
            lanes = np.concatenate(
                [addresses - np.uint64(start) < np.uint64(size) for start, size in spans] or [[]]
            )
        return int(np.count_nonzero(lanes)) * max(pointers.get_element_ty().primitive_bitwidth // 8, 1)

    # a load or store without a mask goes through these two as well
    def counted_load(self, pointers, mask, *rest):
        found.read += size(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        found.written += size(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_launch(self, *args, **kwargs):
        found.launches.append((self.fn.__name__, math.prod(self.grid)))
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        spans[:] = {(v.data_ptr(), v.nbytes) for v in given if v.numel() == numel}
        operations.launching = True
        try:
            return launch(self, *args, **kwargs)
        finally:
            operations.launching = False

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = (
        counted_load,
        counted_store,
    )
    GridExecutor.__call__ = counted_launch
    try:
        with operations:
            yield found
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
        GridExecutor.__call__ = launch
