"""Time one step of ours beside the best that others offer, in one run: every optimizer takes its turn in every round.

Each lives in a process of its own, since what one leaves in the allocator changes the time of another; the order of
every round is drawn. The first figure is processor time, which does not count what other programs take; the time on the
clock is kept beside it. A step begins with cold caches, as behind a backward pass. What does not run says why.
The limit is what a step must move (cache lines of selected columns, compact state) at the speed of a copy in this run.
Usage: python -m benchmarks.optimizer.steps [--rounds 40] [--quick] [--force]
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import shutil
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.optimizer.contenders import CONTENDERS, COPY, step_of, touched_bytes
from benchmarks.optimizer.peers import SIZES, Problem, Size
from benchmarks.results import RESULTS, command, environment, write_result

WARM = 3
QUICK = Size(96, 1536, 2, 2)


def serve(name: str, size: Size, fraction: float, threads: int, pipe: Connection) -> None:
    """Step once for every word that comes in, and answer with the milliseconds that it took."""
    torch.set_num_threads(threads)
    try:
        step = step_of(name, Problem(size, size.layers, fraction, "cpu", torch.float32))
        for _ in range(WARM):
            step()
    except Exception as error:
        pipe.send({"does_not_run": f"{type(error).__name__}: {error}".splitlines()[0][:300]})
        return
    pipe.send({})
    while pipe.recv():
        clock, processor = time.perf_counter(), time.process_time()
        step()
        passed = time.perf_counter() - clock, time.process_time() - processor
        pipe.send([round(1e3 * each, 4) for each in passed])


def measured(
    size: Size, fraction: float, rounds: int, names: Sequence[str], threads: int = 1
) -> list[dict[str, object]]:
    """A row for every contender, with the times of each round, and one for the limit."""
    problem = Problem(size, size.layers, fraction, "cpu", torch.float32)
    common = {"layers": size.layers, "d_model": size.d_model, "d_ff": size.d_ff, "fraction": fraction}
    rows: list[dict[str, object]] = []
    pipes: dict[str, Connection] = {}
    # Forked from a process that has imported what all of them need, and has started no thread.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.optimizer.contenders"])
    for name in names:
        pipe, theirs = context.Pipe()
        context.Process(target=serve, args=(name, size, fraction, threads, theirs), daemon=True).start()
        theirs.close()
        said = answer(pipe)
        rows.append({"what": "step", **common, "optimizer": name, **said})
        if said:
            sys.stderr.write(f"{name}: does not run: {said['does_not_run']}\n")
        else:
            pipes[name] = pipe
            rows[-1] |= {"milliseconds": [], "processor_milliseconds": []}
    draw, found = random.Random(0), {row["optimizer"]: row for row in rows}
    for _ in range(rounds):
        for name in draw.sample(sorted(pipes), len(pipes)):
            pipes[name].send(True)
            for key, value in zip(("milliseconds", "processor_milliseconds"), pipes[name].recv(), strict=True):
                found[name][key].append(value)
    for pipe in pipes.values():
        pipe.send(False)
    moved = 2 * sum(weight.nbytes for weight in problem.weights)
    limit = {"what": "limit", **common, "bytes": touched_bytes(problem)}
    for key in ("milliseconds", "processor_milliseconds"):
        limit[key] = [round(each * limit["bytes"] / moved, 4) for each in found[COPY][key]]
    return [*rows, limit]


def answer(pipe: Connection) -> dict[str, str]:
    """What a process says when it is ready, or why it is not; of one that ended, that it did."""
    try:
        return pipe.recv()
    except EOFError:
        return {"does_not_run": "its process ended"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small layers and three rounds, to try the script")
    parser.add_argument("--force", action="store_true", help="replace an older result file")
    parser.add_argument("--out", type=Path, default=RESULTS / "optimizer_peers_cpu_202611.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size, rounds = (QUICK, 3) if options.quick else (SIZES["bar"], options.rounds)
    rows = measured(size, options.fraction, rounds, list(CONTENDERS), options.threads)
    write_result(
        options.out,
        force=options.force,
        claim="optimizer_peers",
        command=command(),
        environment={**environment(), "compiler": shutil.which("g++") is not None},
        seeds=[0],
        rows=rows,
    )


if __name__ == "__main__":
    main()
