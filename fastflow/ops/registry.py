"""Registers an op with PyTorch from its reference: schema, fake, implementations and gradient."""

import functools
import inspect
from collections.abc import Callable, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import _add_batch_dim
from torch._decomp import register_decomposition
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._functorch.vmap import unwrap_batched
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_map

from fastflow import validation
from fastflow.ops.dispatch import Implementations
from fastflow.transforms import functional, in_transform

OPS: dict[str, Implementations] = {}  # every registered op by name


def folders() -> list[str]:
    """Names of the folders of ops, also used in csrc/, triton_kernels/ and benchmarks/ops/."""
    return sorted({op.folder for op in OPS.values()})


def register(
    reference: Callable[..., Any],
    *,
    check: Callable[..., None] | None = None,
    triton: bool = False,
    compiled: Sequence[str] = (),
    eligible: Callable[..., bool] | None = None,
    eligible_compiled: Callable[..., bool] | None = None,
    call: Callable[..., Any] | None = None,
    compiled_schema: str | None = None,
    fallback: Callable[..., Any] | None = None,
    outputs: str = "",
    backward: Callable[..., Any] | None = None,
    gradients: str = "",
    integers: str = "",
    writes: str = "",
    batched: str = "",
) -> Implementations:
    """Defines ``torch.ops.fastflow.NAME`` from ``reference``, a plain PyTorch function named NAME.

    The schema is the signature of the reference. The reference is also the fake: it runs on fake tensors, so
    shapes, dtypes and strides agree by construction. The gradient is an ``autograd.Function`` under the
    Autograd key, generated from ``backward``. The op itself is therefore differentiable, ``opcheck`` passes
    for inputs that require grad, and torch.compile traces one node. (``torch.library.register_autograd`` was
    measured and rejected: it is slower per call.)

    Where more than a first derivative is wanted, PyTorch differentiates the references, so they must be
    differentiable, and neither read values nor write tensors that vmap does not batch: with ``create_graph=True`` it
    records the reference of the backward, under a transform of torch.func and forward-mode AD the reference of
    the op.

    Args:
        reference: function of ``fastflow/ops/FOLDER/reference.py``; FOLDER is also the name of the Triton
            module.
        check: raises ValueError for invalid arguments, before every call and every trace. Its arguments are
            the name of the op's first argument, that argument, and other arguments of the op by name.
            Arguments that the op does not have keep their defaults. A backward needs no check: autograd
            calls it with checked arguments.
        triton: whether ``triton_kernels/FOLDER.py`` has a launcher with the name and arguments of the op.
        compiled: devices with a compiled op in the extension, ``("cpu",)`` or ``("cpu", "cuda")``.
        eligible, eligible_compiled, call: see :class:`~fastflow.ops.dispatch.Implementations`. By default,
            ``eligible`` decides for the compiled op too.
        compiled_schema: schema of the compiled op if it differs from the op's.
        fallback: plain PyTorch that runs instead of the reference, if it must check values or call other ops.
        outputs: names of the results, for ``backward``.
        backward: the vector-Jacobian product: the reference of another op, or a function. Its arguments are
            any of the op's arguments, its outputs, and ``dNAME`` for the gradient of output NAME. The
            arguments and outputs in its signature are saved.
        gradients: names of the arguments whose gradients ``backward`` returns, in order. The gradient of an
            argument that is None is None, that of a list of tensors is a list.
        integers: names of the outputs that are integers and have no gradient.
        writes: name of the first argument, if the op works in place. The reference then writes it and returns
            None, and so does the op. For ``backward``, the written argument is the output.
        batched: names of the arguments whose first dimension is that of all outputs, such as samples. Under vmap
            over these only, the op runs once, with vmap's dimension folded into the first one. vmap over other
            arguments runs the reference.

    Returns the implementations, for ops that call this op.
    """
    name = reference.__name__
    schema = torch.library.infer_schema(reference, mutates_args=writes.split())
    parameters = list(inspect.signature(reference).parameters.values())
    if writes not in ("", parameters[0].name):
        raise TypeError(f"writes: got {writes!r}, expected the first argument of {name}")
    implementations = Implementations(
        name,
        reference.__module__.split(".")[-2],
        fallback or reference,
        next(i for i, p in enumerate(parameters) if p.annotation is Tensor),
        triton,
        tuple(compiled),
        eligible,
        eligible_compiled or eligible,
        call,
    )
    OPS[name] = implementations
    names = [p.name for p in parameters]
    checked = _checking(check, names)
    qualified = f"fastflow::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "CompositeExplicitAutograd", checked(_without_autocast(implementations)))
    torch.library.register_fake(qualified, checked(reference))
    if not writes:
        op = getattr(torch.ops.fastflow, name).default
        register_decomposition(op)(_decomposition(checked(reference)))
    if writes:
        torch.library.impl(qualified, "ADInplaceOrView", _counting_writes(name))
    recorded = _without_autocast(reference)
    if backward is None:
        autograd = _recorded(recorded, name)
    else:
        function = _function(
            name, parameters, outputs.split(), backward, gradients.split(), integers.split(), bool(writes)
        )
        autograd = _skipping(function, recorded, name)
    torch.library.impl(qualified, "Autograd", _in_place(autograd, writes) if writes else autograd)
    folded = [names.index(v) for v in batched.split()]
    torch.library.impl(qualified, "FuncTorchBatched", _vmapped(recorded, name, folded))
    if compiled:
        define_compiled(name, compiled_schema or schema, emulated="cuda" in compiled)
    return implementations


def define_compiled(name: str, schema: str, emulated: bool = False) -> None:
    """Defines ``fastflow_C::NAME``, the op of the C++ extension. The extension registers its implementations.

    The namespace differs from ``fastflow`` because ``fastflow::NAME`` chooses between these implementations
    and others. ``emulated`` also defines ``fastflow_emulated::NAME``, which runs the CUDA kernel on the CPU.
    """
    for namespace in ("fastflow_C", *(["fastflow_emulated"] if emulated else [])):
        torch.library.define(f"{namespace}::{name}", schema.replace("SymInt", "int"))


def _decomposition(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference for torch.onnx.export, in operators that write no tensor; strides may then differ.

    torch.compile and torch.export keep the op: their tables of decompositions are others. Fake tensors with
    symbolic sizes call it too, and get the reference.
    """

    def body(*args: object) -> object:
        if not torch.onnx.is_in_onnx_export():
            return reference(*args)
        with functional():
            return reference(*args)

    return body


def _checking(
    check: Callable[..., None] | None, names: list[str]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that runs ``check`` on the arguments of an op before its body."""
    if check is None:
        return lambda body: body
    _, _, *expected = inspect.signature(check).parameters.values()  # without the first argument and its name
    missing = [p.name for p in expected if p.name not in names and p.default is p.empty]
    if missing:
        raise TypeError(
            f"{check.__qualname__}: got {', '.join(missing)}, expected arguments of the op: {names}"
        )
    defaults = tuple(p.default for p in expected if p.name not in names)
    places = [*names, *(p.name for p in expected if p.name not in names)]
    pick = _getter([places.index(p.name) for p in expected])
    first = names[0]

    def checked(body: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(body)
        def run(*args: object) -> object:
            check(first, args[0], *pick(args + defaults))
            return body(*args)

        return run

    return checked


def _getter(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Like ``itemgetter(*places)``, but the result is a tuple for any number of places."""
    if len(places) > 1:
        return itemgetter(*places)
    return (lambda values: (values[places[0]],)) if places else (lambda values: ())


def _without_autocast(body: Callable[..., Any]) -> Callable[..., Any]:
    """Disables autocast in an op, which would compute its matrix products in half precision."""

    def exact(*args: object) -> object:
        if not torch._C._is_any_autocast_enabled():  # the public functions take 0.5 us per device
            return body(*args)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return body(*args)

    return exact


class _OpFunction(torch.autograd.Function):
    """Base of the autograd functions of ops."""

    lists: list[int]
    """Places of the arguments that are lists of tensors."""


def _function(
    name: str,
    parameters: list[inspect.Parameter],
    outputs: list[str],
    backward: Callable[..., Any],
    gradients: list[str],
    integers: list[str],
    in_place: bool,
) -> type[_OpFunction]:
    """Makes the autograd.Function of an op, which saves the tensors in the signature of ``backward``."""
    op = getattr(torch.ops.fastflow, name).default
    arguments = [p.name for p in parameters]
    values = [*arguments, *outputs]  # of a call, in this order
    tensors = [*(p.name for p in parameters if p.annotation in (Tensor, Tensor | None)), *outputs]
    wanted = list(inspect.signature(backward).parameters)
    available = [*values, *(f"d{v}" for v in outputs)]
    if unknown := [p for p in wanted if p not in available]:
        raise TypeError(f"{backward.__name__}: got the arguments {unknown}, expected some of {available}")
    named_lists = [p.name for p in parameters if p.annotation == Sequence[Tensor]]
    saved = [p for p in wanted if p in (*tensors, *named_lists)]
    others = [p for p in wanted if p in values and p not in saved]
    if [p for p in wanted if p in named_lists] != named_lists:
        raise TypeError(f"{backward.__name__}: got {wanted}, expected all lists of tensors: {named_lists}")
    lists, saved_lists = ([found.index(p) for p in named_lists] for found in (arguments, saved))
    saved_of, others_of = (_getter([values.index(p) for p in found]) for found in (saved, others))
    order = [*saved, *others, *(f"d{v}" for v in outputs)]
    arguments_of_backward = _getter([order.index(p) for p in wanted])
    # picks each argument's gradient from those that backward returns and a None
    arranged = _getter([gradients.index(p) if p in gradients else len(gradients) for p in arguments])
    optional = [arguments.index(p.name) for p in parameters if p.annotation == Tensor | None]
    # prefer the op of that name, which chooses its implementation
    vjp = getattr(torch.ops.fastflow, backward.__name__).default if _is_op(backward.__name__) else backward
    differentiable_vjp = _without_autocast(backward)

    # with one gradient, autograd need not make zeros for the others
    given = [i for i, v in enumerate(outputs) if v not in integers]
    single = given[0] if len(given) == 1 else None
    # mark_dirty increments the version of a written argument, so that the op below need not
    below = torch._C._AutoDispatchBelowADInplaceOrView if in_place else torch._C._AutoDispatchBelowAutograd

    class Function(_OpFunction):
        @staticmethod
        def forward(ctx, *args):
            if lists:
                ctx.lengths = args[0]
                args = _nested(args[0], args[1:], lists)
            with below():
                results = op(*args)
            if in_place:
                results = args[0]
                ctx.mark_dirty(results)
            everything = args + results if type(results) is tuple else (*args, results)
            found = saved_of(everything)
            ctx.save_for_backward(*(_flat(found, saved_lists)[1:] if lists else found))
            ctx.others = others_of(everything)
            if single is not None:
                ctx.set_materialize_grads(False)
            if optional:
                ctx.absent = [i for i in optional if args[i] is None]
            if integers:
                ctx.mark_non_differentiable(*(everything[values.index(v)] for v in integers))
            return results

        @staticmethod
        def backward(ctx, *grads):
            found = ctx.saved_tensors
            if lists:
                found = _nested(ctx.lengths, found, saved_lists)
            values = arguments_of_backward(found + ctx.others + grads)
            if single is not None and grads[single] is None:
                found = (None,) * len(gradients)
            elif torch.is_grad_enabled():  # create_graph=True
                found = differentiable_vjp(*values)
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    found = vjp(*values)
            result = arranged((*found, None) if type(found) is tuple else (found, None))
            for i in ctx.absent if optional else ():
                result = (*result[:i], None, *result[i + 1 :])
            return _flat_gradients(ctx.lengths, result, lists) if lists else result

    Function.__name__ = Function.__qualname__ = f"{name}_function"
    Function.lists = lists
    return Function


# autograd tracks tensors that are arguments themselves, not those in lists


def _flat(values: Sequence, lists: list[int]) -> tuple:
    """The lengths of the lists at these places, the other values, and the elements of the lists."""
    others = (v for i, v in enumerate(values) if i not in lists)
    return ([len(values[i]) for i in lists], *others, *chain.from_iterable(values[i] for i in lists))


def _nested(lengths: list[int], flat: tuple, lists: list[int]) -> tuple:
    """The values that ``_flat`` was given, with tuples for lists."""
    first = len(flat) - sum(lengths)
    values = list(flat[:first])
    for place, length in zip(lists, lengths, strict=True):
        values.insert(place, flat[first : first + length])
        first += length
    return tuple(values)


def _flat_gradients(lengths: list[int], gradients: tuple, lists: list[int]) -> tuple:
    """Gradients of the arguments that ``_flat`` returns; that of a list may be None."""
    found = list(gradients)
    for place, length in zip(lists, lengths, strict=True):
        found[place] = found[place] or (None,) * length
    return None, *_flat(found, lists)[1:]


def _is_op(name: str) -> bool:
    return hasattr(torch.ops.fastflow, name)


def _skipping(function: type[_OpFunction], reference: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Calls ``function.apply``, in a transform the reference, or the op below autograd if gradients are disabled.

    ``apply`` takes 7 us, half the time of a small op. Forward-mode AD stays enabled under ``no_grad``.
    """
    op, lists = getattr(torch.ops.fastflow, name).default, function.lists

    def body(*args: object) -> object:
        if in_transform():
            return reference(*args)
        if torch.is_grad_enabled():
            return function.apply(*(_flat(args, lists) if lists else args))
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return body


def _recorded(reference: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Calls ``reference`` if autograd records it, otherwise the op below autograd."""
    op = getattr(torch.ops.fastflow, name).default

    def body(*args: object) -> object:
        wanted = torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in args)
        if wanted or in_transform():
            return reference(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return body


def _vmapped(reference: Callable[..., Any], name: str, folded: list[int]) -> Callable[..., Any]:
    """Runs an op under vmap: on samples at the positions ``folded`` at once, else the reference.

    Not ``torch.library.register_vmap``, which could not run the reference: it hides vmap from it.
    """
    op = getattr(torch.ops.fastflow, name).default

    def body(*args: object) -> object:
        interpreter: Any = retrieve_current_functorch_interpreter()
        values, dims = unwrap_batched(args, interpreter.level())
        mapped = [i for i, d in enumerate(dims) if d is not None]
        # a vector is one value per channel, which the samples share
        if mapped and (not set(mapped) <= set(folded) or any(values[i].ndim == 2 for i in mapped)):
            return reference(*args)
        # nor can arguments be folded of which the samples share one
        given = [i for i in folded if values[i] is not None]
        if mapped and len({_samples(values[i], dims[i]) for i in given}) > 1:
            return reference(*args)
        size, values = interpreter.batch_size(), list(values)
        for i in folded if mapped else ():
            if dims[i] is not None:
                values[i] = values[i].movedim(dims[i], 0).flatten(0, 1)
            elif values[i] is not None and values[i].ndim > 1:
                values[i] = values[i].expand(size, *values[i].shape).flatten(0, 1)
        with torch._C._ExcludeDispatchKeyGuard(
            torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)
        ):
            results = op(*values)
            if not mapped:
                return results
            split = tree_map(lambda v: v.unflatten(0, (size, v.shape[0] // size)), results)
        return tree_map(lambda v: _add_batch_dim(v, 0, interpreter.level()), split)

    return body


def _samples(value: Tensor, mapped: int | None) -> int:
    return value.shape[0 if mapped is None or mapped % value.ndim else 1]


def _counting_writes(name: str) -> Callable[..., Any]:
    """Runs an in-place op after it increments the version of the written tensor.

    By the version, autograd finds that a tensor was changed after an operation had saved it.
    """
    op = getattr(torch.ops.fastflow, name).default

    def body(*args: Any) -> None:
        increment_version(args[0])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            op(*args)

    return body


def _in_place(differentiable: Callable[..., Any], argument: str) -> Callable[..., Any]:
    """Checks that autograd permits a write, which ``autograd.Function`` only does after it, and returns None."""

    def body(x: Tensor, *args: object) -> None:
        if torch.is_grad_enabled():
            validation.not_a_leaf(argument, x)
        differentiable(x, *args)

    return body
