"""Functions that bring their own gradient, in each of the ways in which torch runs one.

- Eager mode: a `torch.autograd.Function` without ``setup_context``, for whose sake torch binds signatures at each call.
- torch.func (grad, vjp, jacrev, vmap): one with it. torch.library's operators have no derivative there.
- What traces (torch.compile, torch.export, fake tensors), and meta tensors: an operator of torch.library, one opaque
  node with the shapes of its results; a few plain operations need none, and are traced as such.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ccl_fast.checks import is_plain

# What a refusal of second derivatives ends with where there is a dense backend.
USE_REFERENCE = ' Use backend="reference", which is dense and differentiable any number of times.'


class Differentiable:
    """A function of tensors and constants, called as it is.

    Args:
        name: what errors call it.
        forward: of the inputs: a tensor or several. It is not traced by autograd.
        save: of a context, the inputs and the output: keeps what the gradient needs, none but inputs and outputs.
        gradients: of a context and the outputs' gradients: those of all inputs.
        fake: of the inputs: empty tensors of the output's shapes and dtypes; with it an operator of torch.library is
            registered, ``ccl_fast::name``.
    """

    def __init__(self, name: str, forward: Callable, save: Callable, gradients: Callable, fake: Callable | None = None):
        self.name, self.forward, self.operator = name, forward, None
        if fake is not None:
            self.operator = torch.library.custom_op(f"ccl_fast::{name}", forward, mutates_args=())
            self.operator.register_fake(fake)
            self.operator.register_autograd(gradients, setup_context=save)

        def run(ctx, *inputs):
            output = forward(*inputs)
            save(ctx, inputs, output)
            return output

        def save_in(ctx, inputs, output) -> None:
            save(ctx, inputs, output)

        refuse = {"jvp": staticmethod(refuse_forward_mode(name))}
        # The compiler traces no Function with a `jvp`.
        self._traced = _function(name, {"forward": run, "backward": gradients})
        self._eager = type(name, (self._traced,), refuse)
        of_transforms = {"forward": self._at_the_bottom, "setup_context": save_in, "backward": gradients}
        self._transformed = _function(name, of_transforms | {"vmap": one_by_one(self)})
        self._transformed = type(name, (self._transformed,), refuse)

    def __call__(self, *inputs) -> Any:
        if self.operator is not None and is_traced(inputs[0]):
            return self.operator(*inputs)
        if torch.compiler.is_compiling():
            # (Without a gradient the compiler takes a Function's two arguments, context and inputs, for two inputs.)
            return self._traced.apply(*inputs) if _need_gradients(inputs) else self.forward(*inputs)
        if are_transforms_active():
            return self._transformed.apply(*inputs)
        return self._eager.apply(*(savable(x) if isinstance(x, Tensor) else x for x in inputs))

    def _at_the_bottom(self, *inputs) -> Any:
        """Below all transforms: no tensor is wrapped any more, unless something traces them."""
        run = self.forward if self.operator is None or not is_traced(inputs[0]) else self.operator
        return run(*inputs)


class GradientOperator(Differentiable):
    """A gradient as an operator of torch.library of its own, which refuses to be differentiated.

    Args:
        name, forward, fake: as of `Differentiable`.
        of: whose gradient it is.
        instead: what else can be differentiated twice.
    """

    def __init__(self, name: str, forward: Callable, fake: Callable, of: str, instead: str = ""):
        refuse = refuse_double_backward(of, instead)
        super().__init__(name, forward, lambda ctx, inputs, output: None, refuse, fake)

    def __call__(self, *inputs) -> Any:
        # Only a graph of the gradient (create_graph) needs a node, which refuses to be differentiated.
        if torch.is_grad_enabled() or is_traced(inputs[0]) or are_transforms_active():
            return super().__call__(*inputs)
        return self.forward(*inputs)


def refuse_forward_mode(name: str) -> Callable:
    """Return a ``jvp`` that raises."""

    def refuse(*_):
        raise RuntimeError(
            f"{name}: forward-mode derivatives (torch.func.jvp, jacfwd, forward_ad) are not implemented. "
            "Use the reverse mode's (torch.func.grad, vjp, jacrev, backward)."
        )

    return refuse


def refuse_double_backward(of: str, instead: str = "") -> Callable:
    """Return a ``backward`` of a gradient that raises."""

    def refuse(*_):
        raise RuntimeError(
            f"{of}: the gradient of its gradient is not implemented (double backward, create_graph=True).{instead}"
        )

    return refuse


def differentiable_once(name: str, inputs: tuple[Tensor | None, ...], *gradients: Tensor | None) -> tuple:
    """Gradients, which refuse to be differentiated where a graph of them is made (create_graph).

    Args:
        name: of what they are the gradients.
        inputs: what they depend on.
        gradients: as they are returned.
    """
    return _Once.apply(name, len(inputs), *inputs, *gradients) if torch.is_grad_enabled() else gradients


class _Once(Function):
    @staticmethod
    def forward(ctx, name, count, *inputs_and_gradients):
        ctx.name = name
        return inputs_and_gradients[count:]

    @staticmethod
    def backward(ctx, *_):
        refuse_double_backward(ctx.name, USE_REFERENCE)()


def savable(x: Tensor) -> Tensor:
    """Return x, or a copy of what was made in inference mode, as centres fitted there: autograd keeps none."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not x.is_inference():
        return x
    return x.clone()


def _need_gradients(inputs: tuple) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def one_by_one(function: Callable) -> Callable:
    """Make the rule of a function under vmap: a loop, as there is nothing that its calls could share."""

    def rule(info, in_dims, *inputs) -> tuple[Any, Any]:
        calls = [
            function(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(inputs, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        results = tuple(torch.stack(results) for results in zip(*calls, strict=True))
        return results, (0,) * len(results)

    return rule


def _function(name: str, methods: dict[str, Callable]) -> type[Function]:
    return type(name, (Function,), {key: staticmethod(method) for key, method in methods.items()})


def is_traced(x: Tensor) -> bool:
    """Tell whether what is done with x is recorded, or its shapes alone are followed."""
    return torch.compiler.is_compiling() or not is_plain(x)


def are_transforms_active() -> bool:
    """Tell whether torch.func transforms the caller."""
    return torch._C._are_functorch_transforms_active()
