"""vLLM engines on a CPU, each in a process of its own, two at a time: ``python vllm_run.py FOLDER``.

The processes are forks of one that has imported vLLM, which takes longer than anything that follows.

FOLDER/NAME.json says what to run: mode (of LATENTKV_VLLM), model, engine (arguments of both), prompts and answers
(tokens of each; answers are forced, so that every engine sees the same text), without (an attribute of vLLM to delete
first, ``module:name``).
What comes of it: NAME.log; NAME.pt, with the log probabilities of the whole vocabulary at every token of each answer;
and how often the layer's op saw how many decode tokens and tokens.
"""

from __future__ import annotations

import collections
import importlib
import json
import multiprocessing
import os
import pathlib
import sys
from typing import Any

import torch
from latentkv.testing.engines import TINY
from latentkv.testing.vllm import Forced, fill_weights
from vllm import LLM, SamplingParams


def count_steps() -> collections.Counter[tuple[int, int]]:
    """Decode tokens and all tokens of each call of the layer's op, profiling runs left out."""
    from latentkv.engines.vllm import layer

    steps: collections.Counter[tuple[int, int]] = collections.Counter()
    own = layer.Step.__call__

    def counted(self: Any, q: Any, kv: Any, positions: Any, output: Any, metadata: Any, *rest: Any) -> None:
        if metadata is not None:
            steps[metadata.num_decode_tokens, metadata.num_actual_tokens] += 1
        own(self, q, kv, positions, output, metadata, *rest)

    layer.Step.__call__ = counted
    return steps


def engine(file: pathlib.Path) -> None:
    """Runs one engine."""
    log = os.open(file.with_suffix(".log"), os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    run: dict[str, Any] = json.loads(file.read_text())
    os.environ["LATENTKV_VLLM"] = run["mode"]
    model = file.with_suffix(".model")
    model.mkdir()
    config = TINY | run["model"]
    (model / "config.json").write_text(json.dumps(config))
    fill_weights()
    if run["without"]:
        module, name = run["without"].split(":")
        importlib.import_module("vllm.model_executor.layers.attention")
        delattr(importlib.import_module(module), name)
    llm = LLM(
        model=str(model), load_format="dummy", skip_tokenizer_init=True, max_model_len=256, max_num_seqs=3, seed=0,
        attention_backend="CPU_MLA", max_logprobs=-1, logits_processors=[Forced], **run["engine"],
    )  # fmt: skip
    steps = {} if run["mode"] == "off" or run["without"] else count_steps()
    params = [
        SamplingParams(
            temperature=0, max_tokens=len(answer), ignore_eos=True, detokenize=False, logprobs=-1,
            extra_args={"answer": answer},
        )
        for answer in run["answers"]
    ]  # fmt: skip
    done = llm.generate([{"prompt_token_ids": p} for p in run["prompts"]], params, use_tqdm=False)
    assert [list(x.outputs[0].token_ids) for x in done] == run["answers"], "the answers were not forced"
    logprobs = [[[at[t].logprob for t in range(config["vocab_size"])] for at in x.outputs[0].logprobs] for x in done]
    torch.save(([torch.tensor(request) for request in logprobs], dict(steps)), file.with_suffix(".pt"))


if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        for _ in pool.imap_unordered(engine, sorted(pathlib.Path(sys.argv[1]).glob("*.json")), chunksize=1):
            pass
