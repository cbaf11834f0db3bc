"""For tests and benchmarks in vLLM's engine: random weights that matter, and answers that are forced."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


def fill_weights() -> None:
    """Lets vLLM's ``load_format="dummy"`` fill weights with unit gain, the same in each process and for each dtype.

    Its own are so small that a model's answer depends on the last token alone.
    """

    def load_weights(self: Any, model: torch.nn.Module, *_: Any) -> None:
        for name, param in model.named_parameters():
            if not param.is_floating_point():
                continue
            seeded = torch.Generator(param.device).manual_seed(zlib.crc32(name.encode()))
            values = torch.randn(param.shape, generator=seeded, device=param.device)
            values = 1 + 0.1 * values if param.dim() < 2 else values * param.shape[-1] ** -0.5
            param.data.copy_(values.bfloat16())

    DummyModelLoader.load_weights = load_weights


class Forced(AdapterLogitsProcessor):  # type: ignore[misc]
    """Makes a request's answer the one of ``extra_args["answer"]``; log probabilities are those from before."""

    def is_argmax_invariant(self) -> bool:
        """It changes the token."""
        return False

    def new_req_logits_processor(self, params: Any) -> Callable[[list[int], torch.Tensor], torch.Tensor]:
        """The function of the tokens so far and the logits."""
        answer = params.extra_args["answer"]

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            token = answer[len(output_ids)]
            kept = logits[token].item()
            logits.fill_(-torch.inf)
            logits[token] = kept
            return logits

        return force
