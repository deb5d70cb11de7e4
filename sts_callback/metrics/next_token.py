"""The NLL of the next token, and whether it is the most likely one, from logits that come a part of the vocabulary at a time."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def next_token(columns: Iterable[torch.Tensor], targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Read each column once, so that it can be dropped before the next one is made.

    Args:
        columns: logits in any floating dtype, `(n, width)` each, from the first token of the vocabulary to the last.
        targets: the tokens that come next, `(n,)`.

    Returns:
        Their NLL in nats, `(n,)` in float32, with a graph where the logits have one. And which of them are the most likely ones,
        `(n,)` booleans: of equal logits the first, as in greedy decoding; none where logits are not finite.

    """
    start, log_masses, found = 0, list[torch.Tensor](), list[torch.Tensor]()
    tops, likeliest = list[torch.Tensor](), list[torch.Tensor]()
    for logits in columns:
        wide, width = logits.float(), logits.shape[1]
        here = (targets.to(wide.device) - start)[:, None]
        is_here = (here >= 0) & (here < width)
        found.append(torch.where(is_here, wide.gather(1, here.clamp(0, width - 1)), 0.0)[:, 0])
        log_masses.append(wide.logsumexp(dim=1))
        top, place = wide.detach().max(dim=1)
        tops.append(top)
        likeliest.append(place + start)
        start += width
    losses = torch.stack(log_masses).logsumexp(dim=0) - torch.stack(found).sum(dim=0)
    winner = torch.stack(tops).argmax(dim=0, keepdim=True)
    right = torch.stack(likeliest).gather(0, winner)[0] == targets.to(losses.device)
    return losses, right & losses.detach().isfinite()
