"""How long the fusion pass takes, by layers and by elementwise nodes a layer.

    python benchmarks/compile_pass.py [--csv OUT.csv]

Each graph is what Inductor hands to its passes: decode layers with DeepSeek-V3's heads, RoPE in PyTorch or by an op,
and further elementwise steps, half of them before RoPE, on the hidden state and the key, half after it, on the query.
The pass is timed alone, as the time that its thread has the CPU; nothing is compiled.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Annotated, Any

import latentkv as lk
import torch
import torch._inductor.config
import typer
from latentkv.compile import FusionPass, layer_index, step
from latentkv.testing.mla import rotate
from torch import Tensor
from torch.fx import Graph

N, H, P, R, L, HIDDEN = 8, 128, 128, 64, 512, 256
SIZES = ((1, 0), (1, 200), (8, 200), (61, 200))


class Timed(Exception):
    """Ends a compilation once the pass has run."""


class Stopwatch(FusionPass):
    """The pass, timed."""

    def __call__(self, graph: Graph) -> None:
        """Runs the pass on the graph, and raises."""
        self.nodes = len(graph.nodes)
        start = time.thread_time()
        super().__call__(graph)
        self.seconds = time.thread_time() - start
        raise Timed


def model(layers: int, steps: int, op: bool, w_q: Tensor, w_kv: Tensor, w_o: Tensor, table: Tensor) -> Any:
    """A function of hidden state and positions with so many layers, of so many further steps each."""

    names = [layer_index(f"{i}") for i in range(layers)]

    def forward(x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = table[positions].unsqueeze(1).chunk(2, -1)
        for layer in names:
            y = x
            for j in range(steps // 4):
                y = y * 1.5 if j % 2 else y + x
            q = (y @ w_q).view(-1, H, P + R)
            kv_c, k_pe = (y @ w_kv).split([L, R], -1)
            for j in range(steps // 4):
                k_pe = k_pe * 1.5 if j % 2 else k_pe + k_pe * 0.5
            if op:
                torch.ops.latentkv.rope_(positions, q[..., P:], k_pe, table, False)
            else:
                q[..., P:] = rotate(q[..., P:], cos, sin, False)
                k_pe = rotate(k_pe[:, None], cos, sin, False)
            done = torch.ops.latentkv.layer_write_cache(kv_c, k_pe, layer)
            for j in range(steps // 2):
                q = q * 1.5 if j % 2 else q + q[:, :1]
            x = x + q.flatten(1) @ w_o + done.sum()
        return x

    return forward


def seconds(layers: int, steps: int, op: bool, dynamic: bool) -> tuple[int, int, float]:
    """The graph's nodes, the sites fused in it, and the time of the pass."""
    weights = [torch.zeros(shape, dtype=torch.bfloat16) for shape in ((HIDDEN, H * (P + R)), (HIDDEN, L + R))]
    weights.append(torch.zeros(H * (P + R), HIDDEN, dtype=torch.bfloat16))
    table = lk.build_cos_sin_cache(qk_rope_head_dim=R, rope_theta=1e4, max_position_embeddings=4096)
    watch = Stopwatch()
    torch._dynamo.reset()
    x, positions = torch.zeros(N, HIDDEN, dtype=torch.bfloat16), torch.arange(N)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(positions, 0)
    settings = {"post_grad_custom_pre_pass": watch, "fx_graph_cache": False}
    with torch._inductor.config.patch(settings), torch.no_grad(), step({}, None):
        try:
            torch.compile(model(layers, steps, op, *weights, table), fullgraph=True)(x, positions)
        except Exception as error:
            if "Timed" not in str(error) and not isinstance(error, Timed):
                raise
    return watch.nodes, len(watch.report.fused), watch.seconds


def main(csv_file: Annotated[Path | None, typer.Option("--csv", help="where the figures go, too")] = None) -> None:
    """Times the pass on graphs of growing size."""
    rows = [("layers", "steps", "rope", "rows", "nodes", "fused", "seconds")]
    print(*rows[0], sep=",")
    for layers, steps in SIZES:
        for op in (False, True):
            for dynamic in (False, True):
                nodes, fused, taken = seconds(layers, steps, op, dynamic)
                row = (
                    layers,
                    steps,
                    "op" if op else "PyTorch",
                    "dynamic" if dynamic else N,
                    nodes,
                    fused,
                    f"{taken:.3f}",
                )
                rows.append(tuple(map(str, row)))
                print(*row, sep=",", flush=True)
    if csv_file is not None:
        with csv_file.open("w", newline="") as file:
            csv.writer(file).writerows(rows)


if __name__ == "__main__":
    typer.run(main)
