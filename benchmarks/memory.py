#!/usr/bin/env python
"""Peak memory and time of a training step of the E64 model with recomputation and expert sub-batches.

    python benchmarks/memory.py --json out.json

Each setting runs in a process of its own: forward and backward over 8 rows of 512 tokens, no optimizer. Memory is what
the process holds at most, less what it held before the first step. Losses must agree.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import common, peer_models  # noqa: E402

SETTINGS = {
    "plain": {},
    "sub_batch_1024": {"moe_sub_batch": 1024},
    "recompute": {"recompute": True},
    "recompute_sub_batch_1024": {"recompute": True, "moe_sub_batch": 1024},
}
ROWS, STEPS = 8, 4


def measure(name: str) -> dict[str, float]:
    """Loss, seconds of the fastest step and MB of one setting, in this process."""
    import time

    import paddle

    from benchmarks.train_step import Given, token_ids
    from ernie5.model.modeling import Ernie5ForCausalLM
    from ernie5.sequence.layout import lay_out
    from ernie5.sequence.packing import collate, pack
    from ernie5.sequence.parts import Sample, Text
    from ernie5.sequence.spec import LayoutSpec

    shape = replace(common.SHAPES["E64"], batch=ROWS)
    config = peer_models.ours_config(shape)
    for key, value in SETTINGS[name].items():
        setattr(config, key, value)
    model = Ernie5ForCausalLM(config)
    model.train()
    spec = LayoutSpec.of_model(config, (1, 2), [config.vision_bits])
    rows = [lay_out(Sample([Text("")]), Given(ids[1:-1]), spec) for ids in token_ids(shape)]
    batch = {
        key: paddle.to_tensor(value) for key, value in collate([pack([row], shape.length) for row in rows]).items()
    }
    for parameter in model.parameters():  # gradients exist before the measurement, as they do in the second step
        parameter.grad = paddle.zeros_like(parameter)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, fastest = _held("VmRSS"), float("inf")
    for _ in range(STEPS):
        model.clear_gradients(set_to_zero=True)
        start = time.perf_counter()
        loss = model(**batch)["losses"]["text"]
        loss.backward()
        fastest = min(fastest, time.perf_counter() - start)
    return {"loss": float(loss), "seconds": fastest, "megabytes": _held("VmHWM") - before}


def _held(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] == "--measure":
        Path(sys.argv[3]).write_text(json.dumps(measure(sys.argv[2])), encoding="utf-8")
        return
    parser = common.argparse.ArgumentParser(description=__doc__, formatter_class=common.argparse.RawTextHelpFormatter)
    parser.add_argument("--json", metavar="PATH", help="write the figures here")
    options = parser.parse_args()
    found = {}
    for name in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--measure", name, f"{folder}/out.json"]
            subprocess.run(command, check=True)
            found[name] = json.loads(Path(f"{folder}/out.json").read_text(encoding="utf-8"))
    losses = [values["loss"] for values in found.values()]
    assert max(losses) - min(losses) < 1e-4, f"losses differ: {losses}"
    print(f"{'setting':28}{'MB':>8}{'of plain':>10}{'seconds':>9}{'of plain':>10}")
    plain, figures = found["plain"], {}
    for name, values in found.items():
        ratios = [values[key] / plain[key] for key in ("megabytes", "seconds")]
        print(f"{name:28}{values['megabytes']:8.0f}{ratios[0]:10.2f}{values['seconds']:9.2f}{ratios[1]:10.2f}")
        figures |= {f"memory_{name}": ratios[0], f"time_{name}": ratios[1]}
    if options.json:
        Path(options.json).write_text(json.dumps({"figures": figures}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
