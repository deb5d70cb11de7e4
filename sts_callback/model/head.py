"""The language-model head apart from the forward: logits of chosen positions only, a piece at a time.

At a vocabulary of 262,144 tokens the logits of 1,024 positions take 1 GiB in float32, and their gradient as much again. What is
wanted of them is a number or two a token, so they are made, read and dropped piece by piece: some positions at a time and, on a
CPU, some of the vocabulary at a time, so that what is made is still in the cache when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sts_callback.model.hooks import text_config, vocab_size

Read: TypeAlias = Callable[[Iterable[torch.Tensor], slice], torch.Tensor]
"""Reads the logits of some of the selected positions and is told which of them these are. They come in columns, `(n, width)`,
from the first token of the vocabulary to the last. Gives one row for each position."""

# Always the same, since another size may be rounded otherwise.
_PIECE_ELEMENTS = 2**26  # 256 MiB of float32
_N_ON_CPU, _WIDTH_ON_CPU = 256, 4096  # positions and tokens of the vocabulary; 4 MiB of float32


def whole_logits(columns: Iterable[torch.Tensor], places: slice) -> torch.Tensor:
    """Keep logits as they are, `(n, vocab)`: a `Read`."""
    return torch.cat(list(columns), dim=-1)


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """Find the module that gives the logits, whatever wraps the model; None without a language-model head."""
    asked = (getattr(m, "get_output_embeddings", lambda: None)() for m in model.modules() if hasattr(m, "config"))
    return next((head for head in asked if head is not None), None)


class Head:
    """A model's own head, and what its forward does to logits afterwards as far as its configuration says so.

    No list says for which architectures this is all: `Capture.can_split_head` compares it with the model's own logits.
    """

    def __init__(self, model: nn.Module, module: nn.Module) -> None:
        self.module = module
        config = text_config(model)
        self._divisor, self._factor, self._cap = (  # of Granite, of Cohere, of Gemma
            getattr(config, name, None) for name in ("logits_scaling", "logit_scale", "final_logit_softcapping")
        )
        self._n_piece = piece_size(model)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it to its inputs, by the same operations as the model's forward, `(..., d)` to `(..., vocab)`."""
        return self._scaled(self.module(x))

    def columns(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """The same, `(n, width)` at a time; equal up to rounding. All at once on a GPU and where the head is no plain product."""
        if x.device.type != "cpu" or not _is_plain(self.module):
            yield self.logits(x)
            return
        weight, bias = self.module.weight, self.module.bias
        for some in pieces(len(weight), _WIDTH_ON_CPU):
            yield self._scaled(nn.functional.linear(x, weight[some], None if bias is None else bias[some]))

    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        if self._divisor is not None:
            logits = logits / self._divisor
        if self._factor is not None:
            logits = logits * self._factor
        if self._cap is not None:
            logits = torch.tanh(logits / self._cap) * self._cap
        return logits

    def called_before(self, use: Callable[[Head, torch.Tensor], object]) -> RemovableHandle:
        """Before it runs, use it and its inputs. It may then be called: this hook waits until that is done."""
        busy = list[bool]()

        def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _tensor_of(args, kwargs)
            if not busy and x is not None:
                busy.append(True)
                use(self, x)
                busy.clear()

        return self.module.register_forward_pre_hook(called, with_kwargs=True)

    def read(self, x: torch.Tensor, read: Read) -> torch.Tensor:
        """Read the logits of its inputs, `(n_selected, d)`, piece by piece."""
        return torch.cat([read(self.columns(x[piece]), piece) for piece in self._pieces(x)])

    def differentiated(self, x: torch.Tensor, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, with the gradient of the sum of what was read, `(n_selected, d)`: no graph holds more than a piece."""
        found, gradients = list[torch.Tensor](), list[torch.Tensor]()
        for piece in self._pieces(x):
            part = x[piece].detach().requires_grad_()
            losses = read(self.columns(part), piece)
            found.append(losses.detach())
            gradients += torch.autograd.grad(losses.sum(), part)
        return torch.cat(found), torch.cat(gradients)

    def _pieces(self, x: torch.Tensor) -> Iterator[slice]:
        return pieces(len(x), min(self._n_piece, _N_ON_CPU) if x.device.type == "cpu" else self._n_piece)


def piece_size(model: nn.Module) -> int:
    """Number of positions whose logits are made, or at least widened, at once."""
    return max(1, _PIECE_ELEMENTS // (vocab_size(model) or 2**16))


def pieces(n: int, size: int) -> Iterator[slice]:
    """Slices of `n` positions, at least one even if there are none."""
    return (slice(start, min(n, start + size)) for start in range(0, max(1, n), size))


def read_in_pieces(logits: torch.Tensor, read: Read, size: int) -> torch.Tensor:
    """Read logits that the model made whole, `(n_selected, vocab)`: float32 copies stay small."""
    return torch.cat([read([logits[piece]], piece) for piece in pieces(len(logits), size)])


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a head is the product with its weights and no more: no adapter, quantised or offloaded weights, hooks but ours."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.device.type == "cpu"
        and "forward" not in vars(module)
        and not module._forward_hooks
        and len(module._forward_pre_hooks) <= 1  # that of `called_before`
    )


def _tensor_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The tensor that a head was called with, `(n_rows, n_positions, d)`; None if it was called otherwise."""
    x = args[0] if len(args) == 1 else None
    return x if not kwargs and isinstance(x, torch.Tensor) and x.dim() == 3 else None
